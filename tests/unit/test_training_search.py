"""A job that searches: what it tries, what wins, and what is trained then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import LossConfig, SweepConfig
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import SliceSpec
from trunkline_worker.heads.artefact import head_to_bytes
from trunkline_worker.store.records import BackboneChoice, Event, JobSpec
from trunkline_worker.training.loop import Labels, Source, TrainingCancelled, TrainingResult, train_head
from trunkline_worker.training.spec import check_spec
from trunkline_worker.training.split import HOLD_OUT, hold_out, random_stream

NAMES = ("a", "b")
SLICES = (SliceSpec("noise", 0, 4), SliceSpec("signal", 4, 8), SliceSpec("pooled", 8, 12))
SPEC = JobSpec(model="m", dataset="d", backbone="b", input_size=0, embedding="pooled", seed=5, epochs=10)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def ring(num_rows: int = 240, seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return rows whose class is inside or outside a circle of the slice ``signal``: no linear head sees it."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(num_rows, 12)).astype(np.float32)
    return x, (np.hypot(x[:, 4], x[:, 5]) > 1.18).astype(np.int64)


def train(
    x: npt.NDArray[np.float32], truth: npt.NDArray[np.int64], sweep: SweepConfig, **changes: Any
) -> tuple[TrainingResult, list[Event]]:
    events: list[Event] = []
    result = train_head(
        [Source("b", x, SLICES)],
        Labels(NAMES, truth),
        replace(SPEC, sweep=sweep, **changes),
        on_event=events.append,
        should_stop=lambda: False,
    )
    return result, events


def test_the_winner_is_found_trained_and_measured_on_rows_that_took_no_part() -> None:
    x, truth = ring(400)
    sweep = SweepConfig(
        hidden=((), (32,)), learning_rate=(0.01,), embeddings=(("noise",), ("signal",)), folds=3, l2=(0.01, 1.0)
    )
    result, events = train(x, truth, sweep, epochs=40)
    assert result.found is not None
    trials = result.found.trials
    assert len(trials) == 8  # two sets, linear and hidden, two strengths; one rate
    won = result.found.won
    assert won.configuration.slices == ("signal",)
    assert won.configuration.hidden == (32,)
    assert len(won.scores) == 3
    assert result.head.config == HeadConfig("mlp", (32,))
    assert result.head.slices == ("signal",)
    assert result.metrics["accuracy"] > 0.8
    linear = [one for one in trials if not one.configuration.hidden]
    assert won.score > max(one.score for one in linear)
    phases = [one.phase for one in events]
    assert phases.index("sweep") < phases.index("fit")
    said = next(one.message for one in events if one.phase == "sweep" and one.progress == 1.0)
    assert said.startswith("8 configurations; won by cross_entropy")
    # Rows that are held out say nothing in the search.
    _, held_out = hold_out(truth, len(x), SPEC.validation_fraction, random_stream(SPEC.seed, HOLD_OUT))
    other = x.copy()
    other[held_out] = 7.0
    again, _ = train(other, truth, sweep, epochs=40)
    assert again.found is not None
    assert [one.scores for one in again.found.trials] == [one.scores for one in trials]


def test_equal_searches_give_equal_bytes() -> None:
    x, truth = ring()
    sweep = SweepConfig(hidden=((), (8,)), dropout=(0.0, 0.2), folds=3)
    (one, _), (other, _) = train(x, truth, sweep), train(x, truth, sweep)
    assert head_to_bytes(one.head) == head_to_bytes(other.head)
    assert one.found is not None
    assert other.found is not None
    assert one.found.trials == other.found.trials
    # A grid for linear heads; with hidden layers one strength, and each dropout.
    kinds = [bool(trial.configuration.hidden) for trial in one.found.trials]
    assert (kinds.count(False), kinds.count(True)) == (7, 2)


@pytest.mark.parametrize("metric", ["balanced_accuracy", "roc_auc"])
def test_the_winner_is_the_best_by_the_metric_that_was_named(metric: str) -> None:
    x, truth = ring()
    result, _ = train(x, truth, SweepConfig(l2=(0.1, 10.0, 1000.0), folds=3), select_by=metric)
    assert result.found is not None
    assert all(0.0 <= one.score <= 1.0 for one in result.found.trials)


def test_numbers_and_several_labels_are_searched_too() -> None:
    x, truth = ring()
    for labels in (
        Labels((), None, (x[:, 8:10] * 3 + 1).astype(np.float32)),
        Labels(NAMES, None, np.stack([truth, x[:, 8] > 0], axis=1).astype(np.float32)),
    ):
        result = train_head(
            [Source("b", x, SLICES)],
            labels,
            replace(SPEC, sweep=SweepConfig(l2=(0.1, 10.0), hidden=((), (8,)), folds=3)),
            on_event=lambda event: None,
            should_stop=lambda: False,
        )
        assert result.found is not None
        assert [one.error for one in result.found.trials] == [""] * 4


def test_one_that_fails_is_shown_and_all_that_fail_are_an_error() -> None:
    x, truth = ring()
    result, _ = train(x, truth, SweepConfig(embeddings=(("pooled",), ("nowhere",)), l2=(1.0,)))
    assert result.found is not None
    assert ["nowhere" in one.error for one in result.found.trials] == [False, True]
    with pytest.raises(WireError, match=r"all configurations of the sweep failed.*nowhere.*nobody"):
        train(x, truth, SweepConfig(embeddings=(("nowhere",), ("nobody",)), l2=(1.0,)))


def test_a_search_can_be_stopped() -> None:
    x, truth = ring()
    told: list[Event] = []
    with pytest.raises(TrainingCancelled):
        train_head(
            [Source("b", x, SLICES)],
            Labels(NAMES, truth),
            replace(SPEC, sweep=SweepConfig(l2=(0.1, 1.0))),
            on_event=told.append,
            should_stop=lambda: any(one.phase == "sweep" for one in told),
        )
    assert told[-1].phase == "sweep"


@pytest.mark.parametrize(
    ("changes", "code", "what"),
    [
        ({"head": HeadConfig("mlp", (8,)), "solver": "adamw"}, ErrorCode.INVALID_ARGUMENT, "a sweep chooses the head"),
        ({"loss": LossConfig(balanced=True)}, ErrorCode.UNSUPPORTED, "all rows alike"),
        ({"more_backbones": (BackboneChoice("c"),)}, ErrorCode.INVALID_ARGUMENT, "of a single backbone"),
        ({"embedding": "slices", "slices": ("pooled",)}, ErrorCode.INVALID_ARGUMENT, "slices to try as well"),
    ],
    ids=str,
)
def test_searches_that_cannot_be(changes: dict[str, Any], code: ErrorCode, what: str) -> None:
    with pytest.raises(WireError, match=what) as caught:
        check_spec(replace(SPEC, sweep=SweepConfig(embeddings=(("pooled",),)), **changes))
    assert caught.value.code is code


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({}, "needs values to try"),
        ({"l2": (1.0, 1.0)}, "a value of l2 twice"),
        ({"hidden": ((8,), (8,))}, "a value of hidden twice"),
        ({"l2": (1.0,), "folds": 1}, "2 to 50 folds"),
        ({"l2": tuple(range(40)), "dropout": tuple(range(40))}, "1600 configurations"),
    ],
    ids=str,
)
def test_sweeps_that_cannot_be(values: dict[str, Any], what: str) -> None:
    with pytest.raises(WireError, match=what):
        SweepConfig(**values)
