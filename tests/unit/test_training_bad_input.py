"""Data that teach little or nothing, and data that no training can hold: an honest model, or an error that says why."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from trunkline.errors import BadLabelsError
from trunkline.labels import encode_labels
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import LossConfig, SweepConfig
from trunkline_wire.heads import HeadConfig
from trunkline_wire.limits import MAX_ANSWERS, MAX_CLASSES
from trunkline_wire.sizes import check_answers
from trunkline_wire.specs import SliceSpec
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.labels import Labels, check_labels
from trunkline_worker.training.loop import TrainingResult, train_head
from trunkline_worker.training.sources import Source

SLICES = (SliceSpec("a/mean", 0, 4), SliceSpec("pooled", 4, 12))
SPEC = JobSpec(model="m", dataset="d", backbone="b", input_size=8, embedding="pooled", epochs=4)
MLP = {"head": HeadConfig("mlp", (4,), batch_norm=True), "solver": "adamw"}
ORDERED = {"loss": LossConfig(class_order=("a", "b", "c"))}
SWEEP = {"sweep": SweepConfig(l2=(1.0, 2.0), hidden=((), (4,)), folds=2)}
NUM_ROWS = 30


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train for a moment, on one thread: rows are few."""
    monkeypatch.setattr("trunkline_worker.training.minibatch._DEFAULT_STEPS", 40)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def train(x: np.ndarray, labels: Labels, **changes: Any) -> TrainingResult:
    return train_head(
        [Source("b", x.astype(np.float32), SLICES)],
        labels,
        replace(SPEC, **changes),
        on_event=lambda event: None,
        should_stop=lambda: False,
    )


def three_classes(num_rows: int = NUM_ROWS) -> Labels:
    return Labels(("a", "b", "c"), np.arange(num_rows) % 3)


def numbers() -> Labels:
    return Labels((), None, np.random.default_rng(1).normal(size=(NUM_ROWS, 2)).astype(np.float32))


def several() -> Labels:
    return Labels(("a", "b"), None, (np.random.default_rng(2).random((NUM_ROWS, 2)) > 0.5).astype(np.float32))


@pytest.mark.parametrize(
    "changes", [{}, {"l2": 1.0}, MLP, {"head": HeadConfig("prototype")}, ORDERED], ids=lambda one: ", ".join(one)
)
def test_one_row_a_class_is_learnt_by_heart_where_nothing_is_held_out(changes: dict[str, Any]) -> None:
    result = train(np.random.default_rng(0).normal(size=(3, 12)), three_classes(3), validation_fraction=0.0, **changes)
    assert result.metrics["train_accuracy"] == 1.0
    assert not [name for name, value in result.metrics.items() if not np.isfinite(value)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "single row.*set the validation fraction to 0"),
        ({"validation_fraction": 0.0, "embedding": "auto"}, "too few rows to compare slices"),
        ({"validation_fraction": 0.0, **SWEEP, "sweep": SweepConfig(l2=(1.0,))}, "cannot make 5 folds"),
    ],
    ids=["held out", "auto", "sweep"],
)
def test_one_row_a_class_is_too_few_to_compare(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(WireError, match=words) as caught:
        train(np.random.default_rng(0).normal(size=(3, 12)), three_classes(3), **changes)
    assert caught.value.code is ErrorCode.BAD_LABELS


@pytest.mark.parametrize(
    ("changes", "value", "labels"),
    [
        ({"embedding": "auto"}, 1e30, three_classes()),
        ({"embedding": "auto"}, 0.3, numbers()),
        ({"embedding": "auto"}, 0.0, several()),
        ({"l2": 0.0}, 0.0, three_classes()),
        ({"l2": 0.0}, 1e30, numbers()),
        ({"l2": 0.0}, 0.3, several()),
        (MLP, 0.3, three_classes()),
        (MLP, 0.0, numbers()),
        ({"head": HeadConfig("prototype")}, 0.0, three_classes()),
        ({"head": HeadConfig("prototype")}, 1e30, several()),
        (SWEEP, 0.3, three_classes()),
    ],
    ids=lambda one: one.task if isinstance(one, Labels) else str(one) if isinstance(one, float) else ", ".join(one),
)
def test_constant_features_make_a_model_that_says_the_shares_and_warns(
    changes: dict[str, Any], value: float, labels: Labels
) -> None:
    x = np.full((NUM_ROWS, 12), value)
    result = train(x, labels, **changes)
    assert not [name for name, one in result.metrics.items() if not np.isfinite(one)]
    assert any("are constant over the training rows" in one for one in result.warnings)
    answers = result.head.predict(torch.full((5, 12), value)[:, : sum(one.num_columns for one in result.head.inputs)])
    assert bool(torch.isfinite(answers).all()) and bool((answers == answers[0]).all())
    if labels.task == "classification":
        assert answers[0].tolist() == pytest.approx([1 / 3] * 3, abs=0.35)
        assert result.metrics["accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "changes", [{}, {"loss": LossConfig("huber")}, {"loss": LossConfig("quantile"), "solver": "adamw"}], ids=str
)
def test_a_constant_target_is_predicted(changes: dict[str, Any]) -> None:
    x = np.random.default_rng(0).normal(size=(NUM_ROWS, 12))
    result = train(x, Labels((), None, np.full((NUM_ROWS, 1), 5, np.float32)), **changes)
    answers = result.head.predict(torch.from_numpy(x[:, 4:].astype(np.float32)))
    assert answers.numpy() == pytest.approx(np.full((NUM_ROWS, 1), 5.0), abs=0.2)
    assert not [name for name, one in result.metrics.items() if not np.isfinite(one)]


@pytest.mark.parametrize(
    ("counts", "is_ordinal"), [((10, 0, 10), False), ((0, 10, 10), False), ((10, 10, 0), True)], ids=str
)
def test_a_class_without_rows_is_named(counts: tuple[int, ...], is_ordinal: bool) -> None:
    labels = Labels(("a", "b", "c"), np.repeat(np.arange(3), counts))
    with pytest.raises(WireError, match=f"1 classes have no row, the first is '{'abc'[counts.index(0)]}'") as caught:
        train(np.zeros((20, 12)), labels, **(ORDERED if is_ordinal else {}))
    assert caught.value.code is ErrorCode.BAD_LABELS


def test_weight_on_one_class_alone_still_makes_a_model() -> None:
    result = train(
        np.random.default_rng(0).normal(size=(NUM_ROWS, 12)),
        three_classes(),
        l2=1.0,
        loss=LossConfig(class_weights=(0.0, 0.0, 2.0)),
    )
    assert not [name for name, value in result.metrics.items() if not np.isfinite(value)]
    assert result.metrics["accuracy"] == pytest.approx(1 / 3)


def test_each_reason_is_given_where_a_whole_sweep_fails() -> None:
    x = np.random.default_rng(0).normal(size=(NUM_ROWS, 12))
    sets = tuple((f"no{number}",) for number in range(4))
    with pytest.raises(WireError, match="all configurations of the sweep failed") as caught:
        train(x, three_classes(), sweep=SweepConfig(embeddings=sets, l2=(1.0, 2.0, 3.0)))
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    for (name,) in sets:
        assert f"(slices {name}; l2 1) and 2 others: slice '{name}' is not part" in caught.value.message


@pytest.mark.parametrize("dtype", [np.int64, np.uint32])
def test_a_million_classes_are_refused_without_an_object_for_each(dtype: type) -> None:
    labels = np.arange(1_000_000, dtype=dtype)
    tracemalloc.start()
    try:
        with pytest.raises(BadLabelsError, match="1000000 classes; at most 100000") as caught:
            encode_labels(labels, len(labels))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "astype('float32')" in caught.value.hint
    assert peak < 4 * labels.nbytes


def test_a_million_classes_of_text_are_refused() -> None:
    with pytest.raises(BadLabelsError, match="1000000 classes; at most 100000"):
        encode_labels(list(map(str, range(1_000_000))), 1_000_000)


def test_more_answers_than_memory_holds_are_refused_before_anything_is_computed() -> None:
    num_classes = MAX_CLASSES
    num_rows = MAX_ANSWERS // num_classes + 1
    check_answers(num_rows - 1, num_classes)
    labels = Labels(tuple(map(str, range(num_classes))), np.zeros(num_rows, np.int64))
    with pytest.raises(WireError, match="Leave rare classes out") as caught:
        check_labels(labels, num_rows, hold_out=True)
    assert caught.value.code is ErrorCode.BAD_LABELS
