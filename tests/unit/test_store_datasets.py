"""Datasets: named once every row is there, versioned by content, idempotent."""

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.rows import dataset_digest
from trunkline_wire.specs import IMAGES, FeatureSpace
from trunkline_worker.store import datasets as datasets_module
from trunkline_worker.store import schema
from trunkline_worker.store.clock import ManualClock
from trunkline_worker.store.database import Database
from trunkline_worker.store.failpoints import Failpoints, SimulatedKill
from trunkline_worker.store.metadata import MetadataStore
from trunkline_worker.store.records import DatasetRecord

SPACE = FeatureSpace("net", "blocks.2", 96, "f" * 64)
OTHER_SPACE = FeatureSpace("net", "blocks.3", 96, "e" * 64)
POSTGRES = os.environ.get("TRUNKLINE_TEST_POSTGRES", "")
ROWS = [hashlib.sha256(bytes([number])).digest() for number in range(6)]
NEW_ROW = hashlib.sha256(b"new").digest()


@pytest.fixture(params=["sqlite", *(["postgres"] if POSTGRES else [])])
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    database = Database("sqlite://" if request.param == "sqlite" else POSTGRES)
    if request.param == "postgres":
        with database.write() as connection:
            schema.metadata.drop_all(connection)
            schema.create(connection)
    yield database
    database.close()


@pytest.fixture
def failpoints() -> Failpoints:
    return Failpoints()


@pytest.fixture
def store(database: Database, failpoints: Failpoints) -> MetadataStore:
    store = MetadataStore(database, clock=ManualClock(1000.0), failpoints=failpoints)
    store.rows.add_chunk("t", "a" * 64, SPACE, "float16", ROWS)
    return store


def commit(store: MetadataStore, key: str = "", **changes: Any) -> DatasetRecord:
    values: dict[str, Any] = {
        "tenant": "t",
        "name": "digits",
        "space": SPACE,
        "row_ids": ROWS[:4],
        "class_names": ["zero", "eins\0", "☃"],
        "class_indices": [0, 1, 2, 0],
        "targets": None,
        "idempotency_key": key or os.urandom(8).hex(),
    }
    return store.datasets.commit(**{**values, **changes})


def code_of(call: Any) -> ErrorCode:
    with pytest.raises(WireError) as error:
        call()
    return error.value.code


def test_commit_and_read_back(store: MetadataStore) -> None:
    record = commit(store)
    assert record.reference == "digits@1"
    assert record.num_rows == 4
    assert record.class_names == ("zero", "eins\0", "☃")
    assert record.num_targets == 0
    assert record.create_time == 1000.0
    assert record.codec == "float16"
    assert record.digest == dataset_digest(ROWS[:4], ["zero", "eins\0", "☃"], [0, 1, 2, 0], None)
    assert store.datasets.get("t", "digits") == store.datasets.get("t", "digits@1") == record
    content = store.datasets.rows("t", "digits")
    assert content.record == record
    assert content.row_ids == ROWS[:4]
    assert content.class_indices.dtype == np.uint32
    assert content.class_indices.tolist() == [0, 1, 2, 0]
    assert content.targets is None


def test_targets(store: MetadataStore) -> None:
    targets = np.arange(8, dtype=np.float32).reshape(4, 2).T.copy().T  # not C-contiguous
    record = commit(store, class_names=[], class_indices=[], targets=targets)
    assert (record.class_names, record.num_targets) == ((), 2)
    content = store.datasets.rows("t", "digits@1")
    assert content.targets is not None
    assert content.targets.dtype == np.float32
    np.testing.assert_array_equal(content.targets, targets)
    assert content.class_indices.size == 0


@given(st.data())
def test_content_round_trips(data: st.DataObject) -> None:
    database = Database("sqlite://")
    store = MetadataStore(database, clock=ManualClock())
    store.rows.add_chunk("t", "a" * 64, SPACE, "float16", ROWS)
    rows = data.draw(st.lists(st.sampled_from(ROWS), min_size=1, max_size=20))
    names = data.draw(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=5, unique=True))
    indices = data.draw(st.lists(st.integers(0, len(names) - 1), min_size=len(rows), max_size=len(rows)))
    record = commit(store, row_ids=rows, class_names=names, class_indices=indices)
    content = store.datasets.rows("t", record.reference)
    assert (content.row_ids, content.class_indices.tolist()) == (rows, indices)
    assert store.datasets.get("t", "digits").class_names == tuple(names)
    database.close()


def test_equal_content_is_the_newest_version_again(store: MetadataStore) -> None:
    first = commit(store)
    assert commit(store) == first
    second = commit(store, class_indices=[0, 1, 2, 1])
    assert second.version == 2
    assert commit(store).version == 3, "equal to an older version only: going back is a change"
    assert commit(store, name="other").reference == "other@1"
    assert [one.reference for one in store.datasets.list("t")] == ["digits@1", "digits@2", "digits@3", "other@1"]
    assert store.datasets.get("t", "digits").version == 3
    assert store.datasets.get("t", "digits@2") == second


def test_rows_that_are_not_there(store: MetadataStore) -> None:
    with pytest.raises(WireError, match="1 of 4 rows are not stored") as error:
        commit(store, row_ids=[*ROWS[:3], NEW_ROW])
    assert error.value.code is ErrorCode.NOT_FOUND
    assert store.datasets.list("t") == []


def test_rows_of_another_space_or_codec(store: MetadataStore) -> None:
    store.rows.add_chunk("t", "b" * 64, OTHER_SPACE, "float16", [NEW_ROW])
    assert code_of(lambda: commit(store, row_ids=[*ROWS[:3], NEW_ROW])) is ErrorCode.INCOMPATIBLE
    assert code_of(lambda: commit(store, space=IMAGES)) is ErrorCode.INCOMPATIBLE
    single = hashlib.sha256(b"single").digest()
    store.rows.add_chunk("t", "a" * 64, SPACE, "float32", [single])
    with pytest.raises(WireError, match="float16, float32"):
        commit(store, row_ids=[*ROWS[:3], single])
    assert commit(store).version == 1


@pytest.mark.parametrize("codec", ["float32", "images", "int8@int8", "bfloat16"])
def test_a_dataset_says_how_its_rows_were_made_and_sent(store: MetadataStore, codec: str) -> None:
    row_ids = [hashlib.sha256(f"{codec} {number}".encode()).digest() for number in range(4)]
    store.rows.add_chunk("t", "b" * 64, SPACE, codec, row_ids[:2])
    store.rows.add_chunk("t", "c" * 64, SPACE, codec, row_ids[2:])
    record = commit(store, "key", row_ids=row_ids)
    assert record.codec == codec
    assert store.datasets.get("t", "digits") == store.datasets.list("t")[0] == record
    assert store.datasets.rows("t", "digits").record == record
    assert commit(store, "key", row_ids=row_ids) == record, "a retry gets the same answer"
    assert commit(store, row_ids=row_ids) == record


NAMED = ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"name": "a/b"}, ErrorCode.INVALID_ARGUMENT),
        ({"name": ""}, ErrorCode.INVALID_ARGUMENT),
        ({"row_ids": [], "class_indices": []}, ErrorCode.EMPTY_BATCH),
        ({"row_ids": [*ROWS[:3], b"short"]}, ErrorCode.INVALID_ARGUMENT),
        ({"class_names": [], "class_indices": []}, ErrorCode.BAD_LABELS),
        ({"class_names": [], "class_indices": [0, 0, 0, 0]}, ErrorCode.BAD_LABELS),
        ({"class_names": NAMED, "class_indices": [0, 1, 0]}, ErrorCode.BAD_LABELS),
        ({"class_names": NAMED, "class_indices": [0, 1, 2, 0]}, ErrorCode.BAD_LABELS),
        ({"class_names": NAMED, "class_indices": [0, 1, -1, 0]}, ErrorCode.BAD_LABELS),
        ({"class_names": NAMED, "class_indices": [[0, 1, 1, 0]]}, ErrorCode.BAD_LABELS),
        ({"class_names": ["a", "a"], "class_indices": [0, 1, 1, 0]}, ErrorCode.BAD_LABELS),
        ({"class_names": ["a", ""], "class_indices": [0, 1, 1, 0]}, ErrorCode.BAD_LABELS),
        ({"class_names": ["a", "b" * 600], "class_indices": [0, 1, 1, 0]}, ErrorCode.BAD_LABELS),
        ({"targets": np.zeros((4, 1), np.float32)}, ErrorCode.BAD_LABELS),
        ({"class_names": [], "class_indices": [], "targets": np.zeros((3, 1), np.float32)}, ErrorCode.BAD_LABELS),
        ({"class_names": [], "class_indices": [], "targets": np.zeros(4, np.float32)}, ErrorCode.BAD_LABELS),
        ({"class_names": [], "class_indices": [], "targets": np.zeros((4, 0), np.float32)}, ErrorCode.BAD_LABELS),
        ({"class_names": [], "class_indices": [], "targets": np.full((4, 1), np.nan, "f4")}, ErrorCode.NOT_FINITE),
        ({"idempotency_key": ""}, ErrorCode.INVALID_ARGUMENT),
        ({"idempotency_key": "k" * 200}, ErrorCode.INVALID_ARGUMENT),
        ({"idempotency_key": "a\nb"}, ErrorCode.INVALID_ARGUMENT),
    ],
)
def test_bad_input_changes_nothing(store: MetadataStore, changes: dict[str, Any], code: ErrorCode) -> None:
    assert code_of(lambda: commit(store, **changes)) is code
    assert store.datasets.list("t") == []


def test_bounds(store: MetadataStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets_module, "MAX_DATASET_ROWS", 3)
    assert code_of(lambda: commit(store)) is ErrorCode.PAYLOAD_TOO_LARGE
    monkeypatch.undo()
    monkeypatch.setattr(datasets_module, "MAX_CLASSES", 2)
    assert code_of(lambda: commit(store)) is ErrorCode.BAD_LABELS


@pytest.mark.parametrize("point", ["before_commit", "after_commit"])
def test_a_lost_reply_and_a_retry_are_one_commit(store: MetadataStore, failpoints: Failpoints, point: str) -> None:
    failpoints.arm(f"store.datasets.commit.{point}")
    with pytest.raises(SimulatedKill):
        commit(store, "key")
    assert len(store.datasets.list("t")) == (point == "after_commit")
    first = commit(store, "key")
    assert first.version == 1
    commit(store, class_indices=[1, 1, 1, 1])
    assert commit(store, "key") == first, "the answer of then, not of now"
    assert len(store.datasets.list("t")) == 2


def test_one_key_for_two_commits_is_refused(store: MetadataStore) -> None:
    commit(store, "key")
    for changes in ({"name": "other"}, {"class_indices": [1, 1, 1, 1]}, {"row_ids": ROWS[1:5]}):
        with pytest.raises(WireError, match="different content") as error:
            commit(store, "key", **changes)
        assert error.value.code is ErrorCode.ALREADY_EXISTS
    assert len(store.datasets.list("t")) == 1


def test_another_tenants_dataset_looks_like_none(store: MetadataStore) -> None:
    commit(store, "key")
    assert store.datasets.list("u") == []
    messages = []
    for reference in ("digits", "digits@1", "nobody"):
        with pytest.raises(WireError) as error:
            store.datasets.get("u", reference)
        assert error.value.code is ErrorCode.NOT_FOUND
        messages.append(error.value.message.replace(reference, "X"))
        assert code_of(lambda one=reference: store.datasets.rows("u", one)) is ErrorCode.NOT_FOUND
    assert len(set(messages)) == 1
    assert code_of(lambda: commit(store, "key", tenant="u")) is ErrorCode.NOT_FOUND, "rows are per tenant too"
    store.rows.add_chunk("u", "a" * 64, SPACE, "float16", ROWS)
    assert commit(store, "key", tenant="u").reference == "digits@1", "the same key of another tenant is another key"


@pytest.mark.parametrize("reference", ["", "a b", "digits@0", "digits@", "digits@x", "../x"])
def test_what_is_no_reference(store: MetadataStore, reference: str) -> None:
    assert code_of(lambda: store.datasets.get("t", reference)) is ErrorCode.INVALID_ARGUMENT


def test_a_version_that_is_not_there(store: MetadataStore) -> None:
    commit(store)
    assert code_of(lambda: store.datasets.get("t", "digits@2")) is ErrorCode.NOT_FOUND
