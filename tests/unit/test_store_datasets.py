"""Datasets: named once every row is there, versioned by content, idempotent."""

import hashlib
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.rows import dataset_digest
from trunkline_wire.specs import IMAGES, FeatureSpace, local_space
from trunkline_worker.store import inputs as inputs_module
from trunkline_worker.store import labels as labels_module
from trunkline_worker.store.clock import ManualClock
from trunkline_worker.store.database import Database
from trunkline_worker.store.failpoints import Failpoints, SimulatedKill
from trunkline_worker.store.metadata import MetadataStore
from trunkline_worker.store.records import DatasetRecord, DatasetSource, JobSpec

SPACE = FeatureSpace("net", "blocks.2", 96, "f" * 64)
OTHER_SPACE = FeatureSpace("net", "blocks.3", 96, "e" * 64)
ROWS = [hashlib.sha256(bytes([number])).digest() for number in range(6)]
NEW_ROW = hashlib.sha256(b"new").digest()


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
        ({"targets": np.zeros((4, 3), np.float32)}, ErrorCode.BAD_LABELS),
        ({"class_indices": [], "targets": np.zeros((4, 1), np.float32)}, ErrorCode.BAD_LABELS),
        ({"class_indices": [], "targets": np.zeros((3, 3), np.float32)}, ErrorCode.BAD_LABELS),
        ({"class_indices": [], "targets": np.full((4, 3), 0.5, np.float32)}, ErrorCode.BAD_LABELS),
        ({"class_indices": [], "targets": np.full((4, 3), -1, np.float32)}, ErrorCode.BAD_LABELS),
        ({"class_indices": [], "targets": np.full((4, 3), np.nan, np.float32)}, ErrorCode.NOT_FINITE),
        (
            {"class_names": ["a", "a"], "class_indices": [], "targets": np.ones((4, 2), np.float32)},
            ErrorCode.BAD_LABELS,
        ),
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
    monkeypatch.setattr(inputs_module, "MAX_DATASET_ROWS", 3)
    assert code_of(lambda: commit(store)) is ErrorCode.PAYLOAD_TOO_LARGE
    monkeypatch.undo()
    monkeypatch.setattr(labels_module, "MAX_CLASSES", 2)
    assert code_of(lambda: commit(store)) is ErrorCode.BAD_LABELS


SECOND = FeatureSpace("second", "mid", 32, "2" * 64)
LOCAL = local_space("sensor", "5" * 64)
SECOND_ROWS, LOCAL_ROWS = ([hashlib.sha256(bytes([kind, number])).digest() for number in range(6)] for kind in (2, 5))
MORE = ((SECOND, SECOND_ROWS[:4]), (LOCAL, LOCAL_ROWS[:4]))


@pytest.fixture
def several(store: MetadataStore) -> MetadataStore:
    """A store with rows of two more inputs."""
    store.rows.add_chunk("t", "2" * 64, SECOND, "int8", SECOND_ROWS)
    store.rows.add_chunk("t", "5" * 64, LOCAL, "float32", LOCAL_ROWS)
    return store


def test_several_inputs_are_read_back_in_their_order(several: MetadataStore) -> None:
    record = commit(several, more_inputs=MORE)
    assert record.more_inputs == (DatasetSource(SECOND, "int8"), DatasetSource(LOCAL, "float32"))
    assert (record.space, record.codec) == (SPACE, "float16")
    assert several.datasets.get("t", "digits") == several.datasets.list("t")[0] == record
    content = several.datasets.rows("t", "digits")
    assert content.record == record
    assert content.row_ids == ROWS[:4]
    assert content.more_row_ids == (SECOND_ROWS[:4], LOCAL_ROWS[:4])
    assert record.digest == dataset_digest(
        ROWS[:4], ["zero", "eins\0", "☃"], [0, 1, 2, 0], None, [SECOND_ROWS[:4], LOCAL_ROWS[:4]]
    )


def test_a_dataset_of_local_features_alone_and_of_images_beside_them(several: MetadataStore) -> None:
    other = local_space("other", "6" * 64)
    pictures, other_rows = (
        [hashlib.sha256(f"{what} {number}".encode()).digest() for number in range(4)] for what in ("picture", "other")
    )
    several.rows.add_chunk("t", "6" * 64, other, "float16", other_rows)
    several.rows.add_chunk("t", "7" * 64, IMAGES, "images", pictures)
    alone = commit(several, name="alone", space=LOCAL, row_ids=LOCAL_ROWS[:4])
    assert (alone.space, alone.codec, alone.more_inputs) == (LOCAL, "float32", ())
    two = commit(several, name="two", space=LOCAL, row_ids=LOCAL_ROWS[:4], more_inputs=[(other, other_rows)])
    assert two.more_inputs == (DatasetSource(other, "float16"),)
    mixed = commit(several, name="mixed", space=IMAGES, row_ids=pictures, more_inputs=[(LOCAL, LOCAL_ROWS[:4])])
    assert (mixed.space, mixed.codec, mixed.more_inputs) == (IMAGES, "images", (DatasetSource(LOCAL, "float32"),))
    assert several.datasets.rows("t", "alone").more_row_ids == ()


def test_versions_of_a_dataset_with_several_inputs(several: MetadataStore) -> None:
    first = commit(several, "key", more_inputs=MORE)
    assert commit(several, "key", more_inputs=MORE) == commit(several, more_inputs=MORE) == first
    assert commit(several, more_inputs=MORE[::-1]).version == 2, "the order of inputs is part of it"
    assert commit(several).version == 3
    assert commit(several, more_inputs=[MORE[0], (LOCAL, LOCAL_ROWS[1:5])]).version == 4
    renamed = local_space("renamed", LOCAL.fingerprint)
    last = commit(several, more_inputs=[MORE[0], (renamed, LOCAL_ROWS[1:5])])
    assert last.version == 5, "equal rows under another name"
    assert last.digest == several.datasets.get("t", "digits@4").digest
    assert several.datasets.rows("t", "digits@4").record.more_inputs[1].space == LOCAL
    for changes in ({}, {"more_inputs": MORE[:1]}, {"more_inputs": [MORE[0], (renamed, LOCAL_ROWS[:4])]}):
        with pytest.raises(WireError, match="different content"):
            commit(several, "key", **changes)


@pytest.mark.parametrize(
    ("changes", "code", "what"),
    [
        ({"more_inputs": [(LOCAL, LOCAL_ROWS[:3])]}, ErrorCode.SHAPE_MISMATCH, "3 rows of 'sensor' beside 4"),
        ({"more_inputs": [(LOCAL, [*LOCAL_ROWS[:3], b"x"])]}, ErrorCode.INVALID_ARGUMENT, "row id 3 has 1 bytes"),
        ({"more_inputs": [(LOCAL, [*LOCAL_ROWS[:3], NEW_ROW])]}, ErrorCode.NOT_FOUND, r"1 of 4 rows .*\(sensor\)"),
        ({"more_inputs": [(LOCAL, SECOND_ROWS[:4])]}, ErrorCode.INCOMPATIBLE, r"another feature space .*\(sensor\)"),
        ({"more_inputs": [(SECOND, [*SECOND_ROWS[:3], NEW_ROW])]}, ErrorCode.NOT_FOUND, r"\(second, cut mid\)"),
        ({"more_inputs": [MORE[1], MORE[1]]}, ErrorCode.INVALID_ARGUMENT, "two inputs of 'sensor'"),
        ({"more_inputs": [(SPACE, ROWS[:4])]}, ErrorCode.INVALID_ARGUMENT, "two inputs of 'net'"),
        (
            {"more_inputs": [(local_space("net", "5" * 64), LOCAL_ROWS[:4])]},
            ErrorCode.INVALID_ARGUMENT,
            "two inputs of 'net'",
        ),
        ({"more_inputs": [(IMAGES, ROWS[:4])]}, ErrorCode.INVALID_ARGUMENT, "can be images"),
        (
            {"more_inputs": [(FeatureSpace("second", "input", 32, "2" * 64), SECOND_ROWS[:4])]},
            ErrorCode.INVALID_ARGUMENT,
            "can be images",
        ),
        ({"more_inputs": [(FeatureSpace("", "", 0, "5" * 64), LOCAL_ROWS[:4])]}, ErrorCode.INVALID_ARGUMENT, "images"),
        (
            {"space": LOCAL, "row_ids": LOCAL_ROWS[:4], "more_inputs": MORE[:1]},
            ErrorCode.INVALID_ARGUMENT,
            "put the backbone's input first",
        ),
        (
            {"more_inputs": [(local_space(f"m{number}", "5" * 64), LOCAL_ROWS[:4]) for number in range(8)]},
            ErrorCode.INVALID_ARGUMENT,
            "9 inputs; a dataset has at most 8",
        ),
        ({"more_inputs": [(local_space("a/b", "5" * 64), LOCAL_ROWS[:4])]}, ErrorCode.INVALID_ARGUMENT, "local model"),
        ({"more_inputs": [(local_space("m", ""), LOCAL_ROWS[:4])]}, ErrorCode.INVALID_ARGUMENT, "64 hexadecimal"),
        ({"space": local_space("m", "F" * 64)}, ErrorCode.INVALID_ARGUMENT, "64 hexadecimal"),
        (
            {"more_inputs": [(FeatureSpace("", "mid", 0, "5" * 64, local_model="m"), LOCAL_ROWS[:4])]},
            ErrorCode.INVALID_ARGUMENT,
            "leave these empty",
        ),
    ],
)
def test_inputs_that_do_not_fit_together(
    several: MetadataStore, changes: dict[str, Any], code: ErrorCode, what: str
) -> None:
    with pytest.raises(WireError, match=what) as error:
        commit(several, **changes)
    assert error.value.code is code
    assert several.datasets.list("t") == []


def test_rows_of_one_more_input_have_one_codec(several: MetadataStore) -> None:
    several.rows.add_chunk("t", "8" * 64, LOCAL, "float16", [NEW_ROW])
    with pytest.raises(WireError, match=r"float16, float32 \(sensor\)") as error:
        commit(several, more_inputs=[(LOCAL, [*LOCAL_ROWS[:3], NEW_ROW])])
    assert error.value.code is ErrorCode.INCOMPATIBLE


def test_another_tenants_rows_are_no_input(several: MetadataStore) -> None:
    several.rows.add_chunk("u", "a" * 64, SPACE, "float16", ROWS)
    assert code_of(lambda: commit(several, tenant="u", more_inputs=MORE)) is ErrorCode.NOT_FOUND


def test_a_row_may_be_of_several_classes(store: MetadataStore) -> None:
    targets = np.array([[0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1]], np.float32)
    record = commit(store, "key", class_indices=[], targets=targets)
    assert (record.class_names, record.num_targets) == (("zero", "eins\0", "☃"), 3)
    content = store.datasets.rows("t", "digits")
    np.testing.assert_array_equal(content.targets, targets)
    assert content.class_indices.size == 0
    assert commit(store, "key", class_indices=[], targets=targets) == record
    assert commit(store, class_indices=[], class_names=[], targets=targets).version == 2, "the same as numbers"


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


def test_groups_are_kept_whatever_their_numbers_and_are_part_of_the_digest(store: MetadataStore) -> None:
    plain = commit(store)
    record = commit(store, groups=[7, 4, 7, 9])
    assert (record.version, record.num_groups, plain.num_groups) == (2, 3, 0)
    assert record.digest != plain.digest
    content = store.datasets.rows("t", "digits")
    assert content.groups is not None
    assert content.groups.tolist() == [0, 1, 0, 2]
    assert store.datasets.rows("t", "digits@1").groups is None
    assert commit(store, groups=np.array([1, 0, 1, 5])) == record, "the same rows belong together"
    assert commit(store, groups=[0, 0, 1, 2]).version == 3
    assert store.datasets.get("t", "digits@2") == record


def test_views_are_kept_and_are_part_of_the_digest(store: MetadataStore) -> None:
    plain = commit(store, class_indices=[0, 0, 1, 1])
    record = commit(store, class_indices=[0, 0, 1, 1], views=2)
    assert (record.version, record.views, record.num_rows, plain.views) == (2, 2, 4, 1)
    assert record.digest != plain.digest
    assert commit(store, class_indices=[0, 0, 1, 1], views=0) == commit(store, class_indices=[0, 0, 1, 1], views=1)
    targets = np.float32([[1, 2], [1, 2], [3, 4], [3, 4]])
    assert (
        commit(store, class_names=[], class_indices=[], targets=targets, views=2, groups=[5, 5, 6, 6]).num_groups == 2
    )


@pytest.mark.parametrize(
    ("changes", "code", "match"),
    [
        ({"groups": [0, 1, 2]}, ErrorCode.INVALID_ARGUMENT, "3 groups for 4 rows"),
        ({"groups": [3, 3, 3, 3]}, ErrorCode.INVALID_ARGUMENT, "all rows are in one group.*leave the groups out"),
        ({"views": 65}, ErrorCode.INVALID_ARGUMENT, "65 views of a picture; 1 to 64"),
        ({"views": 1000}, ErrorCode.INVALID_ARGUMENT, "1000 views"),
        ({"views": 3}, ErrorCode.INVALID_ARGUMENT, "4 rows are no whole number of pictures with 3 views"),
        ({"views": 2}, ErrorCode.BAD_LABELS, "row 1 is a view of the picture in row 0 and has another label"),
        (
            {"views": 2, "class_indices": [0, 0, 1, 1], "groups": [0, 0, 1, 0]},
            ErrorCode.INVALID_ARGUMENT,
            "row 3 is a view of the picture in row 2 and is in another group",
        ),
        (
            {
                "views": 2,
                "class_names": [],
                "class_indices": [],
                "targets": np.float32([[1, 2], [1, 2], [3, 4], [3, 5]]),
            },
            ErrorCode.BAD_LABELS,
            "row 3 is a view of the picture in row 2 and has another label",
        ),
    ],
)
def test_groups_and_views_that_do_not_fit_the_rows(
    store: MetadataStore, changes: dict[str, Any], code: ErrorCode, match: str
) -> None:
    with pytest.raises(WireError, match=match) as caught:
        commit(store, **changes)
    assert caught.value.code is code
    assert store.datasets.list("t") == []


def test_a_class_in_one_group_is_refused_when_a_job_would_hold_groups_out(store: MetadataStore) -> None:
    record = commit(store, class_names=["a", "b"], class_indices=[0, 1, 0, 1], groups=[0, 1, 2, 1])
    spec = JobSpec("head", record.reference, "net", 96)
    with pytest.raises(WireError, match=r"all rows of class 'b' are in one group.*validation fraction to 0") as caught:
        store.jobs.submit("t", spec, "k1")
    assert caught.value.code is ErrorCode.BAD_LABELS
    assert store.jobs.submit("t", replace(spec, validation_fraction=0.0), "k2").spec.validation_fraction == 0.0
    fine = commit(store, class_names=["a", "b"], class_indices=[0, 1, 0, 1], groups=[0, 1, 2, 3])
    assert store.jobs.submit("t", replace(spec, dataset=fine.reference), "k3").spec.dataset == fine.reference
