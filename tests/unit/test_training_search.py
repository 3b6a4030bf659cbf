"""A job that searches: what it tries, what wins, and what is trained then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import LossConfig, OptimiserConfig, SweepConfig
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import SliceSpec
from trunkline_worker.heads.artefact import head_to_bytes
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.store.records import BackboneChoice, Event, JobSpec
from trunkline_worker.training.fit import Rows, fit_head
from trunkline_worker.training.loop import Labels, Source, TrainingCancelled, TrainingResult, train_head
from trunkline_worker.training.minibatch import run_head
from trunkline_worker.training.progress import Progress
from trunkline_worker.training.spec import check_spec
from trunkline_worker.training.split import FOLDS, HOLD_OUT, folds, hold_out, random_stream
from trunkline_worker.training.sweep import alone

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
    assert (kinds.count(False), kinds.count(True)) == (9, 2)


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
        ({"head": HeadConfig("conv", channels=(4,)), "solver": "adamw"}, ErrorCode.INVALID_ARGUMENT, "reads a map"),
        ({"loss": LossConfig("focal")}, ErrorCode.INVALID_ARGUMENT, "'lbfgs' can solve"),
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
    ("sweep", "changes", "what"),
    [
        (SweepConfig(hidden=((8,),)), {"head": HeadConfig("prototype")}, "a prototype head has no hidden layers"),
        (SweepConfig(dropout=(0.1,)), {"head": HeadConfig("prototype")}, "a prototype head has no hidden layers"),
        (SweepConfig(hidden=((), (8,))), {"loss": LossConfig(class_order=("a", "b", "c"))}, "learnt by linear heads"),
    ],
    ids=str,
)
def test_axes_that_mean_nothing_to_the_head_or_the_loss(sweep: SweepConfig, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(WireError, match=what) as caught:
        check_spec(replace(SPEC, sweep=sweep, **changes))
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def maps(num_rows: int = 60) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return maps of 2 channels, 3 by 3, whose class is whether an edge stands upright."""
    draw = np.random.default_rng(1)
    x = draw.normal(scale=0.3, size=(num_rows, 2, 3, 3)).astype(np.float32)
    truth = np.arange(num_rows) % 2
    x[truth == 0, 0, :, 0] += 2.0
    x[truth == 1, 0, 0, :] += 2.0
    return x.reshape(num_rows, 18), truth


CONV = {"head": HeadConfig("conv", channels=(6,)), "solver": "adamw", "embedding": "auto"}


def train_maps(sweep: SweepConfig, **more: Any) -> TrainingResult:
    x, truth = maps()
    source = Source("b", x, (SliceSpec("blocks.1", 0, 18),), map_shape=(2, 3, 3))
    settings: dict[str, Any] = {"on_event": lambda event: None, "should_stop": lambda: False}
    spec = replace(SPEC, sweep=sweep, **{**CONV, "epochs": 15, **more.pop("changes", {})})
    return train_head([source], Labels(NAMES, truth), spec, **{**settings, **more})


def test_convolutional_heads_are_tried_one_by_one_as_jobs_train_them() -> None:
    sweep = SweepConfig(learning_rate=(0.02, 0.0001), hidden=((), (4,)), folds=2, l2=(0.01,))
    result = train_maps(sweep)
    assert result.found is not None
    assert result.head.config.channels == (6,)
    trials = result.found.trials
    assert [(one.configuration.hidden, one.configuration.learning_rate) for one in trials] == [
        *(((), 0.02), ((), 0.0001), ((4,), 0.02), ((4,), 0.0001))
    ]
    assert all(len(one.scores) == 2 and not one.error for one in trials)
    assert result.found.won.configuration.learning_rate == 0.02
    assert result.metrics["accuracy"] > 0.8
    # A fold's score is what the same head, trained as a job on the fold's rows, has on the others.
    x, truth = maps()
    training, _ = hold_out(truth, len(x), SPEC.validation_fraction, random_stream(SPEC.seed, HOLD_OUT))
    of_rows = torch.from_numpy(folds(truth[training], len(training), 2, random_stream(SPEC.seed, FOLDS)))
    rows = Rows(torch.from_numpy(x[training]), torch.from_numpy(truth[training]))
    spec = trials[0].configuration.spec(replace(SPEC, epochs=15, **CONV))
    inputs = [HeadInput(("blocks.1",), (18,), (2, 3, 3))]
    progress = Progress(lambda event: None, lambda: False)
    for fold, score in enumerate(trials[0].scores):
        inside, outside = rows.take(of_rows != fold), rows.take(of_rows == fold)
        fit = fit_head(spec, "classification", 2, inputs, inside, None, 0.01, progress, span=(0.0, 1.0))
        outputs = run_head(fit.head, outside.x_ND)
        assert score == pytest.approx(-float(torch.nn.functional.cross_entropy(outputs, outside.truth)), rel=1e-5)


def test_trials_go_where_the_job_says_and_failures_are_theirs_alone() -> None:
    sent: list[alone.TrialSet] = []

    def elsewhere(trials: alone.TrialSet, on_done: Any, check: Any) -> None:
        sent.append(trials)
        for number in reversed(range(len(trials.work))):
            done = alone.run_trial(trials, number, check)
            on_done(done if number else alone.TrialDone(0, "its process died", 0.0))

    result = train_maps(SweepConfig(learning_rate=(0.02, 0.01), folds=2), run_trials=elsewhere)
    assert result.found is not None
    assert [one.error for one in result.found.trials] == ["its process died", ""]
    assert [len(one.work) for one in sent] == [2]
    # All that fail are an error that names each.
    with pytest.raises(WireError, match=r"all configurations of the sweep failed.*0\.02.*epoch.*0\.01.*epoch"):
        train_maps(SweepConfig(learning_rate=(0.02, 0.01), l2=(1e9,), folds=2), changes={"optimiser": WILD})


WILD = OptimiserConfig(clip_norm=0.0)


def test_trials_can_be_stopped_in_the_middle() -> None:
    ended: list[int] = []
    stopped = False

    def one_by_one(trials: alone.TrialSet, on_done: Any, check: Any) -> None:
        def count(done: alone.TrialDone) -> None:
            nonlocal stopped
            ended.append(done.number)
            stopped = True
            on_done(done)

        alone.run_in_process(trials, count, check)

    with pytest.raises(TrainingCancelled):
        train_maps(
            SweepConfig(learning_rate=(0.02, 0.01, 0.005), folds=2),
            run_trials=one_by_one,
            should_stop=lambda: stopped,
        )
    assert ended == [0]


@pytest.mark.parametrize(
    ("changes", "task"),
    [
        ({"head": HeadConfig("mlp", (8,), batch_norm=True), "solver": "adamw"}, "classes"),
        ({"head": HeadConfig("mlp", (8,)), "solver": "adamw", "optimiser": OptimiserConfig(ema=0.9)}, "numbers"),
        ({"head": HeadConfig("prototype")}, "classes"),
        ({"head": HeadConfig("prototype")}, "numbers"),
        ({"loss": LossConfig("quantile", quantile=0.9), "solver": "adamw"}, "numbers"),
        ({"loss": LossConfig("huber")}, "numbers"),
        ({"loss": LossConfig(balanced=True, label_smoothing=0.1)}, "classes"),
        ({"loss": LossConfig("focal"), "solver": "adamw"}, "labels"),
        ({"loss": LossConfig(class_weights=(1.0, 3.0))}, "labels"),
    ],
    ids=str,
)
def test_heads_losses_and_settings_of_every_kind_are_searched(changes: dict[str, Any], task: str) -> None:
    x, truth = ring(120)
    labels = {
        "classes": Labels(NAMES, truth),
        "labels": Labels(NAMES, None, np.stack([truth, x[:, 8] > 0], axis=1).astype(np.float32)),
        "numbers": Labels((), None, (x[:, 8:10] * 3 + 1).astype(np.float32)),
    }[task]
    events: list[Event] = []
    spec = replace(SPEC, sweep=SweepConfig(l2=(0.01, 1.0), folds=2), **changes)
    result = train_head([Source("b", x, SLICES)], labels, spec, on_event=events.append, should_stop=lambda: False)
    assert result.found is not None
    assert [one.error for one in result.found.trials] == [""] * 2
    assert result.head.config == spec.head
    assert result.found.spec == replace(spec, sweep=None, l2=result.found.won.configuration.l2)
    said = next(one.message for one in events if one.phase == "sweep" and one.progress == 1.0)
    won_by = {"quantile": "pinball", "huber": "mae"}.get(spec.loss.kind, "")
    assert won_by in said
    assert ("weighted" in said) == spec.loss.is_weighted


def test_classes_in_order_are_searched() -> None:
    x, _ = ring(120)
    truth = np.digitize(x[:, 8], [-0.5, 0.5])
    loss = LossConfig(class_order=("low", "mid", "high"))
    result = train_head(
        [Source("b", x, SLICES)],
        Labels(("mid", "low", "high"), np.array([1, 0, 2])[truth]),
        replace(SPEC, loss=loss, sweep=SweepConfig(l2=(0.1, 1000.0), folds=3)),
        on_event=lambda event: None,
        should_stop=lambda: False,
    )
    assert result.found is not None
    assert result.found.won.configuration.l2 == 0.1
    assert result.head.task == "ordinal"
    assert result.metrics["accuracy"] > 0.8


def test_inputs_that_are_added_are_tried_one_by_one() -> None:
    x, truth = ring(120)
    local = Source("edge", np.ascontiguousarray(x[:, 4:6]), (SliceSpec("edge", 0, 2),), is_local=True)
    head = HeadConfig("mlp", (8,), fuse="add", fuse_width=6)
    result = train_head(
        [Source("b", x, SLICES), local],
        Labels(NAMES, truth),
        replace(SPEC, head=head, solver="adamw", sweep=SweepConfig(hidden=((), (8,)), l2=(0.05,), folds=2)),
        on_event=lambda event: None,
        should_stop=lambda: False,
    )
    assert result.found is not None
    assert [len(one.scores) for one in result.found.trials] == [2, 2]
    assert result.head.config.fuse == "add"
    assert result.head.more_width == 2


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
