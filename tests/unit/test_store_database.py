"""The database: its settings really hold, its errors are public, its versions are checked."""

import os
import sqlite3
import stat
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_worker.store import schema
from trunkline_worker.store.clock import ManualClock
from trunkline_worker.store.context import StoreContext
from trunkline_worker.store.database import Database
from trunkline_worker.store.failpoints import Failpoints, SimulatedKill
from trunkline_worker.store.ids import random_id


def insert(connection: sa.Connection, key: str) -> None:
    connection.execute(
        schema.idempotency.insert().values(
            tenant="t", method="m", key=key, content_sha256="", result="", create_time=0.0
        )
    )


def count(database: Database) -> int:
    with database.read() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(schema.idempotency)).scalar_one())


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/meta.db"


@pytest.mark.parametrize("kind", ["read", "write"])
def test_pragmas_hold_on_every_connection(url: str, kind: str) -> None:
    database = Database(url, busy_timeout_s=3)

    def settings() -> dict[str, object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        with getattr(database, kind)() as connection:
            return {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names}

    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 3000}
    assert settings() == expected
    with database.read():  # holds a connection, so that the next is a new one
        found: list[dict[str, object]] = []
        thread = threading.Thread(target=lambda: found.append(settings()))
        thread.start()
        thread.join()
        assert found == [expected]
    database.close()


def test_write_transactions_take_the_lock_before_they_read(url: str) -> None:
    first, second = Database(url), Database(url, busy_timeout_s=0)
    with first.write():
        with pytest.raises(WireError) as error, second.write():
            pytest.fail("two write transactions at once")
        assert error.value.code is ErrorCode.UNAVAILABLE
        assert error.value.retry_delay_s > 0
        with second.read() as connection:  # readers do not wait
            connection.execute(sa.select(schema.store_info)).one()
    with second.write() as connection:
        insert(connection, "a")
    assert count(first) == 1
    first.close()
    second.close()


def test_a_reader_sees_one_moment(url: str) -> None:
    first, second = Database(url), Database(url)
    query = sa.select(sa.func.count()).select_from(schema.idempotency)
    with first.read() as connection:
        assert connection.execute(query).scalar() == 0
        with second.write() as other:
            insert(other, "a")
        assert connection.execute(query).scalar() == 0
    assert count(first) == 1
    first.close()
    second.close()


def test_an_error_in_the_block_undoes_it(url: str) -> None:
    database = Database(url)
    with pytest.raises(KeyError), database.write() as connection:
        insert(connection, "a")
        raise KeyError
    assert count(database) == 0
    database.close()


def test_failpoints_around_the_commit(url: str) -> None:
    database, failpoints = Database(url), Failpoints()
    context = StoreContext(database, ManualClock(), random_id, failpoints)
    failpoints.arm("store.x.before_commit")
    with pytest.raises(SimulatedKill), context.mutation("x") as connection:
        insert(connection, "a")
    assert count(database) == 0
    failpoints.arm("store.x.after_commit")
    with pytest.raises(SimulatedKill), context.mutation("x") as connection:
        insert(connection, "a")
    assert count(database) == 1
    database.close()


def test_foreign_keys_are_enforced(url: str) -> None:
    database = Database(url)
    with pytest.raises(sa.exc.IntegrityError), database.write() as connection:
        connection.execute(schema.rows.insert().values(tenant="t", row_id=bytes(32), chunk_id=7, position=0))
    database.close()


def test_the_file_is_private(url: str, tmp_path: Path) -> None:
    database = Database(url)
    with database.write() as connection:
        insert(connection, "a")
        for path in tmp_path.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    database.close()


def test_another_schema_version_is_refused(url: str) -> None:
    database = Database(url)
    with database.write() as connection:
        connection.execute(schema.store_info.update().values(schema_version=schema.VERSION + 1))
    database.close()
    with pytest.raises(WireError, match=f"needs {schema.VERSION}") as error:
        Database(url)
    assert error.value.code is ErrorCode.INCOMPATIBLE


def test_what_was_written_is_there_after_reopening(url: str) -> None:
    database = Database(url)
    with database.write() as connection:
        insert(connection, "a")
    database.close()
    again = Database(url)
    assert count(again) == 1
    again.close()


def test_every_table_but_the_version_has_the_tenant() -> None:
    for table in schema.metadata.tables.values():
        if table is schema.store_info:
            continue
        keys = [
            set(constraint.columns.keys()) for constraint in table.constraints if not constraint_is_foreign(constraint)
        ]
        assert any("tenant" in key for key in keys), table.name
        # Besides numbers that only the store gives out, no key stands without the tenant.
        alone = [key for key in keys if "tenant" not in key and key not in ({"id"}, {"number"}) and key]
        assert not alone, (table.name, alone)


def constraint_is_foreign(constraint: object) -> bool:
    return not isinstance(constraint, sa.PrimaryKeyConstraint | sa.UniqueConstraint)


@pytest.mark.parametrize("url", ["nonsense", "mysql://host/x", "duckdb:///x"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(WireError) as error:
        Database(url)
    assert error.value.code is ErrorCode.UNSUPPORTED


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="cannot be opened") as error:
        Database(f"sqlite:///{tmp_path}/not/there/meta.db")
    assert error.value.code is ErrorCode.UNAVAILABLE
    assert str(tmp_path) not in error.value.message


def test_a_damaged_file(url: str, tmp_path: Path) -> None:
    (tmp_path / "meta.db").write_bytes(os.urandom(8192))
    with pytest.raises(WireError) as error:
        Database(url)
    assert error.value.code is ErrorCode.CORRUPT_DATA


def test_a_database_that_may_not_grow(url: str) -> None:
    database = Database(url)
    with pytest.raises(WireError) as error, database.write() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=1")  # SQLite then answers SQLITE_FULL
        insert(connection, "x" * 1_000_000)
    assert error.value.code is ErrorCode.STORAGE_FULL
    assert count(database) == 0
    with database.write() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=1000000")
        insert(connection, "a")
    database.close()


def test_a_bug_of_ours_is_not_dressed_up(url: str) -> None:
    database = Database(url)
    with pytest.raises(sa.exc.OperationalError, match="no such table"), database.read() as connection:
        connection.exec_driver_sql("SELECT * FROM missing_table")
    database.close()


def test_memory_keeps_nothing() -> None:
    database = Database("sqlite://")
    with database.write() as connection:
        insert(connection, "a")
    assert count(database) == 1
    database.close()
    assert sqlite3.sqlite_version_info >= (3, 35)  # upserts that skip, in the dialect's form
