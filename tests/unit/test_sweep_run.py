"""A sweep as a whole: order, failures, progress, repeatability."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from torch.nn import functional
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, REGRESSION
from trunkline_wire.specs import SliceSpec
from trunkline_worker.training.softmax import fit_softmax, prepare
from trunkline_worker.training.split import FOLDS, folds, random_stream
from trunkline_worker.training.standardise import standardisation
from trunkline_worker.training.sweep import run
from trunkline_worker.training.sweep.plan import Configuration, Trial, winner

SLICES = (SliceSpec("a", 0, 6), SliceSpec("b", 6, 16), SliceSpec("bad", 16, 20))
NUM_ROWS, NUM_CLASSES, NUM_FOLDS = 63, 3, 3

MIXED = (
    Configuration(("a",), 10.0),
    Configuration(("b", "a"), 1.0),
    Configuration(("a",), 1.0, (8,)),
    Configuration(("a",), 100.0),
    Configuration(("a", "b"), 10.0),
    Configuration(("a",), 1.0, (8,), dropout=0.2),
    Configuration(("a",), 0.1, (8,), learning_rate=1e-2),
    Configuration(("b",), 1.0, (4, 4)),
)


def nothing(*ignored: object) -> None:
    """Take anything."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that share small work mostly wait for each other, and for ever where neighbours need the processor."""
    with threadpool_limits(1):
        yield


@pytest.fixture(autouse=True)
def _few_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trunkline_worker.training.minibatch._MIN_EPOCHS", 4)
    monkeypatch.setattr("trunkline_worker.training.minibatch._DEFAULT_STEPS", 40)


def made_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Return raw columns and classes. The columns of slice ``bad`` are not finite."""
    draw = torch.Generator().manual_seed(0)
    classes = torch.arange(NUM_ROWS) % NUM_CLASSES
    x = torch.randn(NUM_ROWS, 20, generator=draw) * 3 + torch.randn(NUM_CLASSES, 20, generator=draw)[classes] + 5
    x[:, 16:] = float("nan")
    return x, classes


def minus_cross_entropy(outputs: torch.Tensor, truth: torch.Tensor) -> float:
    return -float(functional.cross_entropy(outputs.double(), truth))


def sweep(configurations: Any, **changed: Any) -> list[Trial]:
    x, classes = made_rows()
    settings: dict[str, Any] = {
        "num_folds": NUM_FOLDS,
        "seed": 7,
        "score": minus_cross_entropy,
        "check": nothing,
        "on_done": nothing,
    }
    return run.run_sweep(x, SLICES, CLASSIFICATION, classes, classes.numpy(), configurations, **settings | changed)


def test_trials_come_in_the_order_of_their_configurations() -> None:
    trials = sweep(MIXED)
    assert [one.configuration for one in trials] == list(MIXED)
    assert [one.num_columns for one in trials] == [6, 16, 6, 6, 16, 6, 6, 10]
    for trial in trials:
        assert trial.error == ""
        assert len(trial.scores) == NUM_FOLDS
        assert trial.score == pytest.approx(np.mean(trial.scores))
        assert trial.seconds > 0
    assert winner(trials) in trials


def test_a_fold_is_scored_as_if_its_configuration_had_been_trained_alone() -> None:
    x, classes = made_rows()
    columns = x[:, :16]
    fitted = standardisation(columns, [6, 10])
    columns = (columns - fitted.mean_D) / fitted.scale_D
    fold = folds(classes.numpy(), NUM_ROWS, NUM_FOLDS, random_stream(7, FOLDS))
    trials = sweep([Configuration(("b", "a"), l2) for l2 in (300.0, 3.0)])
    for trial in trials:
        for number, score in enumerate(trial.scores):
            inside, outside = torch.from_numpy(fold != number), torch.from_numpy(fold == number)
            design = prepare(columns[inside])
            alone = fit_softmax(design, classes[inside], NUM_CLASSES, trial.configuration.l2, on_step=nothing)
            logits = columns[outside].double() @ alone.weights_DK + alone.bias_K
            assert score == pytest.approx(minus_cross_entropy(logits, classes[outside]), rel=1e-2)


@pytest.mark.parametrize("task", [MULTI_LABEL, REGRESSION])
def test_other_tasks_are_scored_in_their_own_units(task: str) -> None:
    x, _ = made_rows()
    targets = x[:, :2] * 10 if task == REGRESSION else (x[:, :2] > 5).float()
    sizes = []

    def score(outputs: torch.Tensor, truth: torch.Tensor) -> float:
        assert outputs.shape == truth.shape
        sizes.append(len(truth))
        if task == REGRESSION:
            return 1 - float((outputs - truth).square().mean() / truth.var())
        return float(((outputs > 0) == (truth > 0)).float().mean())

    configurations = [Configuration(("a",), 0.1), Configuration(("a",), 3.0), Configuration(("a",), 0.1, (8,), 0.03)]
    trials = run.run_sweep(
        x, SLICES, task, targets, None, configurations, num_folds=3, seed=0, score=score, check=nothing, on_done=nothing
    )
    assert sum(sizes) == 3 * NUM_ROWS
    assert all(one.score > 0.6 for one in trials), trials
    assert trials[0].score > 0.85


def test_a_configuration_that_fails_says_why_and_disturbs_no_other() -> None:
    wrong = [
        (Configuration(("nowhere",), 1.0), "slice 'nowhere' is not part of this embedding"),
        (Configuration((), 1.0), "slices are named"),
        (Configuration(("a", "a"), 1.0), "a slice is named twice"),
        (Configuration(("a",), -1.0), "at least 0; got -1"),
        (Configuration(("a",), float("nan")), "L2 strength"),
        (Configuration(("a",), 1.0, (0,)), "1 to 65536 wide"),
        (Configuration(("a",), 1.0, (8,), dropout=1.0), "below 1"),
        (Configuration(("a",), 1.0, dropout=0.5), "ask for kind 'mlp'"),
        (Configuration(("a",), 1.0, (8,), learning_rate=11.0), "at most 10"),
        (Configuration(("bad",), 1.0), "not finite"),
        (Configuration(("bad",), 1.0, (8,)), "no longer finite"),
    ]
    expected = sweep(MIXED)
    trials = sweep([*(one for one, _ in wrong), *MIXED])
    for trial, (configuration, reason) in zip(trials, wrong, strict=False):
        assert trial.configuration is configuration
        assert reason in trial.error
        assert trial.scores == ()
        assert trial.score == -np.inf
    assert trials[len(wrong) :] == expected


MANY = tuple(
    Configuration(("a",), 0.05, (8,), learning_rate=float(rate), dropout=dropout)
    for rate in np.logspace(-5, -1.5, 6)
    for dropout in (0.0, 0.2)
)


def test_of_many_that_learn_in_steps_the_best_are_cross_validated_and_the_others_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "_KEPT", 3)
    wrong, solved = Configuration(("a",), 1e9, (8,), 10.0), Configuration(("a",), 10.0)
    tried = [wrong, *MANY, solved]
    in_full = sweep(tried)
    monkeypatch.setattr(run, "ALL_IN_FULL", 4)
    told: list[float] = []
    trials = sweep(tried, on_done=told.append)
    assert [one.configuration for one in trials] == tried
    assert "no longer finite" in trials[0].error
    assert trials[-1] == in_full[-1]  # what is solved is no matter of epochs
    kept = [number for number, one in enumerate(trials[:-1]) if not one.dropped and not one.error]
    assert len(kept) == 3
    for number, one in enumerate(trials[1:-1], 1):
        assert one.dropped == (number not in kept)
        assert len(one.scores) == (1 if one.dropped else NUM_FOLDS)
        if not one.dropped:
            assert one.scores == pytest.approx(in_full[number].scores, rel=1e-3)
    # The best by a fifth of the epochs on the first fold went on: those that learn fast.
    assert {trials[number].configuration.learning_rate for number in kept} <= {one.learning_rate for one in MANY[6:]}
    assert not winner(trials).dropped
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_up_to_a_number_none_is_dropped() -> None:
    trials = sweep(MANY)
    assert len(MANY) <= run.ALL_IN_FULL
    assert not any(one.dropped for one in trials)


def test_a_score_that_is_no_number_is_a_failure() -> None:
    calls = 0

    def score(outputs: torch.Tensor, truth: torch.Tensor) -> float:
        nonlocal calls
        calls += 1
        return float("nan") if calls == 1 else 0.5

    first, second = sweep(MIXED[:2], score=score)
    assert first.error == "its score is not finite"
    assert second.scores == (0.5, 0.5, 0.5)


def test_if_all_fail_the_error_names_each() -> None:
    with pytest.raises(WireError) as caught:
        sweep([Configuration((f"x{number}",), 1.0) for number in range(13)])
    assert caught.value.code == ErrorCode.INVALID_ARGUMENT
    for number in range(10):
        assert f"slice 'x{number}' is not part" in caught.value.message
    assert "x10" not in caught.value.message
    assert caught.value.message.endswith("and 3 more")


@pytest.mark.parametrize(
    ("configurations", "changed", "code"),
    [
        ([], {}, ErrorCode.INVALID_ARGUMENT),
        (MIXED, {"num_folds": 1}, ErrorCode.INVALID_ARGUMENT),
        (MIXED, {"num_folds": NUM_ROWS + 1}, ErrorCode.BAD_LABELS),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(configurations: Any, changed: Any, code: ErrorCode) -> None:
    with pytest.raises(WireError) as caught:
        sweep(configurations, **changed)
    assert caught.value.code == code


def test_equal_sweeps_give_equal_trials_to_the_bit() -> None:
    first, second = sweep(MIXED), sweep(MIXED)
    assert repr([dataclasses.replace(one, seconds=0.0) for one in first]) == repr(
        [dataclasses.replace(one, seconds=0.0) for one in second]
    )
    assert sweep(MIXED, seed=8) != first


class Stop(Exception):
    """What ``check`` raises."""


@pytest.mark.parametrize("error", [Stop, WireError(ErrorCode.INVALID_ARGUMENT, "enough")])
@pytest.mark.parametrize("after", [0, 5, 60])
def test_check_stops_the_sweep(error: Any, after: int) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise error

    with pytest.raises(Stop if error is Stop else WireError, match=None if error is Stop else "enough"):
        sweep(MIXED, check=check)
    assert calls == after + 1


def test_progress_never_falls_and_ends_at_one() -> None:
    told: list[float] = []
    sweep([Configuration(("nowhere",), 1.0), *MIXED], on_done=told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len(set(told)) > len(MIXED)
