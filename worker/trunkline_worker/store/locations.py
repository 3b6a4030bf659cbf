"""An index from ids to places in chunks, in bulk: a hundred thousand ids in a few dozen queries, never one each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import sqlalchemy as sa
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.rows import ROW_ID_BYTES

from trunkline_worker.store import schema
from trunkline_worker.store.database import Database
from trunkline_worker.store.records import RowLocation

_T = TypeVar("_T")

_SLICE = 8000
"""Ids in one query: SQLite binds at most 32,766 variables, PostgreSQL 65,535."""


class LocationIndex:
    """The rows of one table under fixed values of its leading key columns (the tenant, and what else there is)."""

    def __init__(self, database: Database, table: sa.Table) -> None:
        """Use ``table``: ``schema.rows`` or ``schema.embeddings``."""
        self._database = database
        self._table = table

    def present(
        self, connection: sa.Connection, scope: Mapping[str, str], row_ids: Sequence[bytes]
    ) -> dict[bytes, tuple[int, int]]:
        """Return the ids that are there, with the chunk's number and the place in it."""
        table = self._table
        query = sa.select(table.c.row_id, table.c.chunk_id, table.c.position).where(
            *(table.c[column] == value for column, value in scope.items()),
            self._database.any_of(table.c.row_id, "row_ids"),
        )
        found: dict[bytes, tuple[int, int]] = {}
        for part in _slices(row_ids):
            for row_id, chunk_id, position in connection.execute(query, {"row_ids": part}):
                found[row_id] = (chunk_id, position)
        return found

    def missing(self, connection: sa.Connection, scope: Mapping[str, str], row_ids: Sequence[bytes]) -> list[int]:
        """Return the indices into ``row_ids`` of ids that are not there."""
        found = self.present(connection, scope, row_ids)
        return [index for index, row_id in enumerate(row_ids) if row_id not in found]

    def add(self, connection: sa.Connection, scope: Mapping[str, str], chunk_id: int, row_ids: Sequence[bytes]) -> int:
        """Name the rows of a chunk, and return how many of the names are this chunk's.

        Ids already there keep their place. The answer is the same for a retry: it counts what this chunk holds, not
        what this call did.

        Raises:
            WireError: EMPTY_BATCH for a chunk without rows.
        """
        if not row_ids:
            raise WireError(ErrorCode.EMPTY_BATCH, "a chunk without row ids")
        size = len(row_ids)
        columns: dict[str, Sequence[object]] = {column: [value] * size for column, value in scope.items()}
        columns |= {"row_id": row_ids, "chunk_id": [chunk_id] * size, "position": range(size)}
        self._database.insert_many(connection, self._table, columns)
        found = self.present(connection, scope, row_ids)
        return sum(where[0] == chunk_id for where in found.values())

    def locate(
        self, connection: sa.Connection, scope: Mapping[str, str], row_ids: Sequence[bytes], what: str
    ) -> list[RowLocation]:
        """Return where each id lies, in the order asked.

        Raises:
            WireError: NOT_FOUND, saying how many are not there.
        """
        found = self.present(connection, scope, row_ids)
        num_missing = sum(row_id not in found for row_id in row_ids)
        if num_missing:
            raise WireError(ErrorCode.NOT_FOUND, f"{num_missing} of {len(row_ids)} {what} are not stored")
        names = {
            chunk_id: row.sha256
            for chunk_id, row in _chunks(connection, self._database, {one for one, _ in found.values()}).items()
        }
        return [RowLocation(row_id, names[found[row_id][0]], found[row_id][1]) for row_id in row_ids]


def add_chunk(
    connection: sa.Connection, database: Database, *, tenant: str, sha256: str, fingerprint: str, codec: str, now: float
) -> int:
    """Name a chunk that is already durable in blob storage, and return its number."""
    check_sha256(sha256)
    key = {"tenant": tenant, "sha256": sha256, "fingerprint": fingerprint, "codec": codec}
    connection.execute(database.insert_or_ignore(schema.chunks).values(**key, create_time=now))
    query = sa.select(schema.chunks.c.id).where(*(schema.chunks.c[column] == value for column, value in key.items()))
    return int(connection.execute(query).scalar_one())


def check_row_ids(row_ids: Sequence[bytes]) -> None:
    """Check the length of every id.

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    for index, row_id in enumerate(row_ids):
        if len(row_id) != ROW_ID_BYTES:
            raise WireError(
                ErrorCode.INVALID_ARGUMENT, f"row id {index} has {len(row_id)} bytes; a row id has {ROW_ID_BYTES}"
            )


def check_sha256(sha256: str) -> None:
    """Check that ``sha256`` is 64 lower-case hexadecimal digits.

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise WireError(
            ErrorCode.INVALID_ARGUMENT, f"{sha256[:80]!r} is not a SHA-256: 64 hexadecimal digits are needed"
        )


def count_spaces(
    connection: sa.Connection, database: Database, found: Mapping[bytes, tuple[int, int]], row_ids: Sequence[bytes]
) -> tuple[int, dict[tuple[str, str], int]]:
    """Return how many of ``row_ids`` are not in ``found``, and how many rows each (fingerprint, codec) holds."""
    by_chunk = Counter(found[row_id][0] for row_id in row_ids if row_id in found)
    spaces: Counter[tuple[str, str]] = Counter()
    for chunk_id, row in _chunks(connection, database, set(by_chunk)).items():
        spaces[row.fingerprint, row.codec] += by_chunk[chunk_id]
    return len(row_ids) - by_chunk.total(), dict(spaces)


def _chunks(
    connection: sa.Connection, database: Database, chunk_ids: set[int]
) -> dict[int, sa.Row[tuple[object, ...]]]:
    query = sa.select(schema.chunks).where(database.any_of(schema.chunks.c.id, "chunk_ids"))
    return {
        row.id: row for part in _slices(sorted(chunk_ids)) for row in connection.execute(query, {"chunk_ids": part})
    }


def _slices(values: Sequence[_T]) -> Iterator[list[_T]]:
    for start in range(0, len(values), _SLICE):
        yield list(values[start : start + _SLICE])
