"""Rows and cached embeddings by id: in bulk, idempotent, per tenant."""

import hashlib
import time

import pytest
import sqlalchemy as sa
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import FeatureSpace
from trunkline_worker.store.clock import ManualClock
from trunkline_worker.store.database import Database
from trunkline_worker.store.metadata import MetadataStore

SPACE = FeatureSpace("net", "blocks.2", 96, "f" * 64)


@pytest.fixture
def store(database: Database) -> MetadataStore:
    return MetadataStore(database, clock=ManualClock())


def ids(*numbers: int) -> list[bytes]:
    return [hashlib.sha256(str(number).encode()).digest() for number in numbers]


def chunk(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def test_missing_then_added_then_located(store: MetadataStore) -> None:
    assert store.rows.missing("t", ids(1, 2, 3, 1)) == [0, 1, 2, 3]
    assert store.rows.missing("t", []) == []
    assert store.rows.add_chunk("t", chunk("a"), SPACE, "float16", ids(1, 2)) == 2
    assert store.rows.missing("t", ids(1, 3, 2)) == [1]
    where = store.rows.locate("t", ids(2, 1, 2))
    assert [(one.row_id, one.chunk, one.index) for one in where] == [
        (*ids(2), chunk("a"), 1),
        (*ids(1), chunk("a"), 0),
        (*ids(2), chunk("a"), 1),
    ]
    assert store.rows.locate("t", []) == []


def test_a_retry_gets_the_same_answer(store: MetadataStore) -> None:
    store.rows.add_chunk("t", chunk("a"), SPACE, "float16", ids(1, 2))
    for _ in range(2):
        assert store.rows.add_chunk("t", chunk("b"), SPACE, "float16", ids(2, 3, 4, 3)) == 2
    assert [one.chunk for one in store.rows.locate("t", ids(2, 3))] == [chunk("a"), chunk("b")]
    assert store.rows.locate("t", ids(3))[0].index == 1


def test_unknown_rows_are_counted(store: MetadataStore) -> None:
    store.rows.add_chunk("t", chunk("a"), SPACE, "float16", ids(1))
    with pytest.raises(WireError, match="2 of 3 rows are not stored") as error:
        store.rows.locate("t", ids(1, 2, 3))
    assert error.value.code is ErrorCode.NOT_FOUND


def test_tenants_do_not_see_each_other(store: MetadataStore) -> None:
    store.rows.add_chunk("a", chunk("a"), SPACE, "float16", ids(1))
    assert store.rows.missing("b", ids(1, 2)) == [0, 1]
    errors = []
    for number in (1, 2):  # not theirs, not anyone's
        with pytest.raises(WireError) as error:
            store.rows.locate("b", ids(number))
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert store.rows.add_chunk("b", chunk("a"), SPACE, "float16", ids(1)) == 1


@pytest.mark.parametrize("bad", [b"", bytes(31), bytes(33)])
def test_what_is_no_row_id(store: MetadataStore, bad: bytes) -> None:
    for call in (
        lambda: store.rows.missing("t", [bad]),
        lambda: store.rows.locate("t", [bad]),
        lambda: store.rows.add_chunk("t", chunk("a"), SPACE, "float16", [bad]),
        lambda: store.embeddings.missing("t", "k", [bad]),
        lambda: store.embeddings.add_chunk("t", "k", chunk("a"), [bad]),
        lambda: store.embeddings.locate("t", "k", [bad]),
    ):
        with pytest.raises(WireError, match="bytes") as error:
            call()
        assert error.value.code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize("bad", ["", "../../x", "F" * 64, "a" * 63])
def test_what_is_no_chunk_id(store: MetadataStore, bad: str) -> None:
    for call in (
        lambda: store.rows.add_chunk("t", bad, SPACE, "float16", ids(1)),
        lambda: store.embeddings.add_chunk("t", "k", bad, ids(1)),
    ):
        with pytest.raises(WireError) as error:
            call()
        assert error.value.code is ErrorCode.INVALID_ARGUMENT
    assert store.rows.missing("t", ids(1)) == [0]


def test_a_chunk_without_rows(store: MetadataStore) -> None:
    with pytest.raises(WireError) as error:
        store.rows.add_chunk("t", chunk("a"), SPACE, "float16", [])
    assert error.value.code is ErrorCode.EMPTY_BATCH


def test_embeddings_by_key_and_tenant(store: MetadataStore) -> None:
    assert store.embeddings.missing("t", "k", ids(1)) == [0]
    assert store.embeddings.add_chunk("t", "k", chunk("e"), ids(1, 2)) == 2
    assert store.embeddings.add_chunk("t", "k", chunk("e"), ids(1, 2)) == 2
    assert store.embeddings.missing("t", "k", ids(3, 1)) == [0]
    assert store.embeddings.missing("t", "other", ids(1)) == [0]
    assert store.embeddings.missing("u", "k", ids(1)) == [0]
    assert store.rows.missing("t", ids(1)) == [0], "a cached embedding is not an uploaded row"
    (where,) = store.embeddings.locate("t", "k", ids(2))
    assert (where.chunk, where.index) == (chunk("e"), 1)
    with pytest.raises(WireError) as error:
        store.embeddings.locate("u", "k", ids(2))
    assert error.value.code is ErrorCode.NOT_FOUND


@pytest.mark.parametrize("key", ["", "a b", "a/b", "../x", "k" * 300])
def test_what_is_no_embedding_key(store: MetadataStore, key: str) -> None:
    with pytest.raises(WireError) as error:
        store.embeddings.missing("t", key, [])
    assert error.value.code is ErrorCode.INVALID_ARGUMENT


def test_rows_by_the_hundred_thousand(store: MetadataStore, database: Database) -> None:
    """Counted in queries, not only in seconds: a machine may be slow, a query per row is wrong on any."""
    many = ids(*range(100_000))
    queries: list[str] = []
    sa.event.listen(database._engine, "before_cursor_execute", lambda *args: queries.append(args[2]))
    started = time.process_time()
    for start in range(0, len(many), 4000):
        assert store.rows.add_chunk("t", chunk(str(start)), SPACE, "float16", many[start : start + 4000]) == 4000
    assert len(queries) < 25 * 8
    queries.clear()
    reading = time.process_time()
    assert store.rows.missing("t", [*many, *ids(-1)]) == [100_000]
    where = store.rows.locate("t", many)
    assert len(queries) < 40
    ended = time.process_time()
    assert where[41_234].chunk == chunk("40000")
    assert where[41_234].index == 1234
    assert ended - reading < 8, "seconds of computing to ask and to locate"
    assert reading - started < 20, "seconds of computing to add"
