"""Rows that clients uploaded, by content: what makes a second upload free."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from trunkline_wire.specs import FeatureSpace

from trunkline_worker.store import locations, schema
from trunkline_worker.store.context import StoreContext
from trunkline_worker.store.records import RowLocation


class Rows:
    """Which rows a tenant has, and where they lie. Rows are never removed or moved."""

    def __init__(self, context: StoreContext) -> None:
        """Use the context of the whole store."""
        self._context = context
        self._index = locations.LocationIndex(context.database, schema.rows)

    def missing(self, tenant: str, row_ids: Sequence[bytes]) -> list[int]:
        """Return the indices into ``row_ids`` of rows that the tenant has not uploaded.

        Raises:
            WireError: INVALID_ARGUMENT for an id that is none.
        """
        locations.check_row_ids(row_ids)
        with self._context.database.read() as connection:
            return self._index.missing(connection, {"tenant": tenant}, row_ids)

    def add_chunk(
        self, tenant: str, chunk_sha256: str, space: FeatureSpace, codec: str, row_ids: Sequence[bytes]
    ) -> int:
        """Name the rows of a chunk that is already durable in blob storage. Repeating it changes nothing.

        Args:
            tenant: Whose rows they are.
            chunk_sha256: The chunk's id: SHA-256 of its packed bytes, in hex.
            space: Where the features live.
            codec: How the rows were made and sent, as ``codec_label`` says.
            row_ids: One per row of the chunk, in its order.

        Returns:
            Rows that this chunk added. Those already there keep their place and are not counted; a retry gets the same
            answer.

        Raises:
            WireError: INVALID_ARGUMENT for an id that is none.
        """
        locations.check_row_ids(row_ids)
        context = self._context
        with context.mutation("rows.add_chunk") as connection:
            chunk_id = locations.add_chunk(
                connection,
                context.database,
                tenant=tenant,
                sha256=chunk_sha256,
                fingerprint=space.fingerprint,
                codec=codec,
                now=context.clock.now(),
            )
            num_added = self._index.add(connection, {"tenant": tenant}, chunk_id, row_ids)
        return num_added

    def locate(self, tenant: str, row_ids: Sequence[bytes]) -> list[RowLocation]:
        """Return where each row lies, in the order asked.

        Raises:
            WireError: NOT_FOUND, another tenant's rows included.
        """
        locations.check_row_ids(row_ids)
        with self._context.database.read() as connection:
            return self._index.locate(connection, {"tenant": tenant}, row_ids, "rows")

    def spaces(
        self, connection: sa.Connection, tenant: str, row_ids: Sequence[bytes]
    ) -> tuple[int, dict[tuple[str, str], int]]:
        """Return how many of the ids are not there, and how many rows each (fingerprint, codec) holds.

        Args:
            connection: The transaction of whoever needs the rows to be there.
            tenant: Whose rows.
            row_ids: May name a row more than once; each time counts.
        """
        found = self._index.present(connection, {"tenant": tenant}, row_ids)
        return locations.count_spaces(connection, self._context.database, found, row_ids)
