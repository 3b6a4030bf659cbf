"""Cached embeddings: what makes a second training on the same rows need no trunk."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.store import locations, schema
from trunkline_worker.store.context import StoreContext
from trunkline_worker.store.records import RowLocation

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+@-]{0,255}")
_CODEC = "embedding"


class Embeddings:
    """Embeddings by tenant, key and row. The key says all that the numbers depend on besides the row."""

    def __init__(self, context: StoreContext) -> None:
        """Use the context of the whole store."""
        self._context = context
        self._index = locations.LocationIndex(context.database, schema.embeddings)

    def missing(self, tenant: str, key: str, row_ids: Sequence[bytes]) -> list[int]:
        """Return the indices into ``row_ids`` of rows whose embedding is not cached under ``key``.

        Raises:
            WireError: INVALID_ARGUMENT for an id or key that is none.
        """
        locations.check_row_ids(row_ids)
        with self._context.database.read() as connection:
            return self._index.missing(connection, _scope(tenant, key), row_ids)

    def add_chunk(self, tenant: str, key: str, chunk_sha256: str, row_ids: Sequence[bytes]) -> int:
        """Name the embeddings in a chunk that is already durable in blob storage. Repeating it changes nothing.

        Args:
            tenant: Whose rows they are.
            key: Embedding fingerprint, precision and the like: all that the numbers depend on besides the row.
            chunk_sha256: The chunk's id: SHA-256 of its packed bytes, in hex.
            row_ids: One per row of the chunk, in its order.

        Returns:
            Embeddings that this chunk added. A retry gets the same answer.

        Raises:
            WireError: INVALID_ARGUMENT for an id or key that is none.
        """
        locations.check_row_ids(row_ids)
        context = self._context
        scope = _scope(tenant, key)
        with context.mutation("embeddings.add_chunk") as connection:
            chunk_id = locations.add_chunk(
                connection,
                context.database,
                tenant=tenant,
                sha256=chunk_sha256,
                fingerprint=key,
                codec=_CODEC,
                now=context.clock.now(),
            )
            num_added = self._index.add(connection, scope, chunk_id, row_ids)
        return num_added

    def locate(self, tenant: str, key: str, row_ids: Sequence[bytes]) -> list[RowLocation]:
        """Return where each row's embedding lies, in the order asked.

        Raises:
            WireError: NOT_FOUND.
        """
        locations.check_row_ids(row_ids)
        with self._context.database.read() as connection:
            return self._index.locate(connection, _scope(tenant, key), row_ids, "embeddings")


def _scope(tenant: str, key: str) -> dict[str, str]:
    if not _KEY.fullmatch(key):
        raise WireError(
            ErrorCode.INVALID_ARGUMENT, f"{key[:80]!r} is not an embedding key: letters, digits and ._:+@- are allowed"
        )
    return {"tenant": tenant, "key": key}
