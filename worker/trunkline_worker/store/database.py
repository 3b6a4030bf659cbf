"""The SQL database behind the metadata: SQLite by default, PostgreSQL by URL.

Write transactions run one at a time on either: ``BEGIN IMMEDIATE`` on SQLite, an advisory lock on PostgreSQL. So what a
transaction has read (a fence, the newest version of a name) still holds when it commits.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.pool import StaticPool
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.store import schema

_BEGIN = "trunkline_begin"
_WRITER_LOCK = 0x7472756E6B
_SQLITE_FULL_CODES = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
_POSTGRES_FULL = "53100"


class Database:
    """Connections to one database. Safe to use from several threads, except in memory."""

    def __init__(self, url: str, *, busy_timeout_s: float = 10.0) -> None:
        """Open the database and make its tables, or bring those of an earlier version to this one.

        Args:
            url: ``sqlite:////path/file.db``, ``sqlite://`` (in memory, gone with this object) or
                ``postgresql://user:password@host/name``.
            busy_timeout_s: How long a transaction waits for another's.

        Raises:
            WireError: UNSUPPORTED for another kind of database, INCOMPATIBLE for tables of a later version,
                UNAVAILABLE or STORAGE_FULL.
        """
        self._url = _parse(url)
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        self._busy_timeout_s = busy_timeout_s
        self._engine = self._sqlite_engine() if self.is_sqlite else self._postgres_engine()
        try:
            with self.write() as connection:
                schema.create(connection)
        except BaseException:
            self.close()
            raise
        if self._file:
            # SQLite syncs the file, not the directory that names it.
            _sync_directory(os.path.dirname(os.path.abspath(self._file)))

    @property
    def _file(self) -> str:
        name = self._url.database or ""
        return "" if not self.is_sqlite or name in ("", ":memory:") else name

    def _sqlite_engine(self) -> sa.Engine:
        if self._file:
            try:
                # Made here for its mode: the database holds what every tenant has.
                os.close(os.open(self._file, os.O_CREAT | os.O_RDWR, 0o600))
            except OSError as error:
                raise WireError(
                    ErrorCode.UNAVAILABLE, f"the metadata database cannot be opened: {error.strerror}"
                ) from error
            engine = sa.create_engine(self._url)
        else:
            engine = sa.create_engine(self._url, poolclass=StaticPool, connect_args={"check_same_thread": False})
        sa.event.listen(engine, "connect", self._set_up_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        self._reader = engine
        self._writer = engine.execution_options(**{_BEGIN: "BEGIN IMMEDIATE"})
        return engine

    def _set_up_sqlite(self, connection: sqlite3.Connection, _record: object) -> None:
        # The driver must not begin transactions of its own accord: `_begin_sqlite` says which kind.
        connection.isolation_level = None
        connection.execute(f"PRAGMA busy_timeout={round(self._busy_timeout_s * 1000)}")
        (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        if self._file and mode != "wal":
            raise WireError(
                ErrorCode.UNSUPPORTED,
                f"SQLite cannot keep a write-ahead log where the database lies (journal mode {mode!r}); "
                "put it on a local disk or use PostgreSQL",
            )
        # NORMAL may lose commits that were acknowledged.
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    def _postgres_engine(self) -> sa.Engine:
        engine = sa.create_engine(self._url, pool_pre_ping=True, pool_size=4)
        # A reader sees one moment throughout; a writer, once it has the lock, sees all that was committed before.
        self._reader = engine.execution_options(isolation_level="REPEATABLE READ")
        self._writer = engine.execution_options(isolation_level="READ COMMITTED")
        return engine

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Open a transaction that sees one moment of the database.

        Raises:
            WireError: UNAVAILABLE, STORAGE_FULL or CORRUPT_DATA, where the database says so.
        """
        with _public_errors(), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Open a transaction that no other write transaction overlaps; committed, durably, when the block ends.

        Raises:
            WireError: UNAVAILABLE, STORAGE_FULL or CORRUPT_DATA, where the database says so. Nothing was changed.
        """
        with _public_errors(), self._writer.begin() as connection:
            if not self.is_sqlite:
                connection.execute(sa.text(f"SET LOCAL lock_timeout = {round(self._busy_timeout_s * 1000)}"))
                connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})"))
            yield connection

    def insert_or_ignore(self, table: sa.Table) -> Any:
        """Return an insert into ``table`` that skips rows whose key is already there."""
        if self.is_sqlite:
            return sqlite.insert(table).on_conflict_do_nothing()
        return postgresql.insert(table).on_conflict_do_nothing()

    def insert_many(self, connection: sa.Connection, table: sa.Table, columns: Mapping[str, Sequence[object]]) -> None:
        """Insert many rows, given column by column, in one round trip; rows whose key is already there are skipped."""
        if self.is_sqlite:
            names = list(columns)
            values = [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            connection.execute(self.insert_or_ignore(table), values)
            return
        arrays = [
            sa.func.unnest(sa.bindparam(name, type_=postgresql.ARRAY(table.c[name].type))).label(name)
            for name in columns
        ]
        insert = self.insert_or_ignore(table).from_select(list(columns), sa.select(*arrays))
        connection.execute(insert, {name: list(values) for name, values in columns.items()})

    def any_of(self, column: sa.Column[Any], name: str) -> sa.ColumnElement[bool]:
        """Return the condition that ``column`` is one of the list bound as ``name``, however long that is."""
        if self.is_sqlite:
            return column.in_(sa.bindparam(name, expanding=True))
        # One array instead of thousands of variables: PostgreSQL hashes it.
        return column == sa.any_(sa.bindparam(name, type_=postgresql.ARRAY(column.type)))

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise WireError(
            ErrorCode.UNSUPPORTED,
            "the metadata database is not a URL; write sqlite:////path/file.db or postgresql://...",
        ) from error
    if parsed.drivername == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise WireError(
            ErrorCode.UNSUPPORTED, f"metadata cannot be kept in {parsed.drivername}; sqlite or postgresql is needed"
        )
    return parsed


def _begin_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get(_BEGIN, "BEGIN"))


@contextmanager
def _public_errors() -> Iterator[None]:
    try:
        yield
    except sa.exc.DBAPIError as error:
        public = _public(error)
        if public is None:
            raise
        raise public from error


def _public(error: sa.exc.DBAPIError) -> WireError | None:
    """Return what a caller may be told, or None for a bug of ours."""
    if isinstance(error, sa.exc.IntegrityError):
        return None
    full = WireError(
        ErrorCode.STORAGE_FULL,
        "the disk of the cluster's database is full; free space there or ask its operator, then retry",
    )
    busy = WireError(ErrorCode.UNAVAILABLE, "the cluster's database does not answer now; try again", retry_delay_s=1.0)
    damaged = WireError(ErrorCode.CORRUPT_DATA, "the cluster's database is damaged; restore it from a backup")
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code is not None:
        if code in _SQLITE_FULL_CODES:
            return full
        primary = code & 0xFF
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            return busy
        return damaged if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) else None
    state = getattr(error.orig, "sqlstate", None)
    if state == _POSTGRES_FULL:
        return full
    if state is None:  # no answer from the server at all
        return busy if isinstance(error, sa.exc.OperationalError) else None
    # Connection exceptions, the server's shutdown, and a lock that was not free in time.
    return busy if state[:2] in ("08", "57") or state in ("55P03", "40001", "40P01") else None


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
