"""Runs a sweep: sorts configurations into groups that can be computed together, computes and scores them.

Where many configurations learn in steps, most are left behind early: all are trained on the first fold for a fraction
of the epochs, and the best of them cross-validated. Source: Jamieson and Talwalkar 2016, "Non-stochastic Best Arm
Identification and Hyperparameter Optimization" (successive halving), here with two rungs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import FLOAT32, HUBER
from trunkline_wire.heads import CLASSIFICATION, LINEAR, MLP, ORDINAL, REGRESSION, invalid
from trunkline_wire.specs import SliceSpec

from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import is_fused
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.pictures import Pictures
from trunkline_worker.training.sources import Source
from trunkline_worker.training.split import FOLDS, Indices, folds, random_stream
from trunkline_worker.training.sweep.alone import (
    Outcome,
    RunTrials,
    Score,
    TrialDone,
    TrialSet,
    Work,
    checked_scores,
    failure,
    run_in_process,
)
from trunkline_worker.training.sweep.closed_form import ridge_outputs
from trunkline_worker.training.sweep.ensemble import ensemble_outputs
from trunkline_worker.training.sweep.linear import linear_outputs
from trunkline_worker.training.sweep.ordinal import ordinal_outputs
from trunkline_worker.training.sweep.plan import PLAIN, Configuration, Trial, check_configuration
from trunkline_worker.training.sweep.rows import FoldedRows, Folds, HeldOut, Result, standardised_columns

# Shape suffix legend: N = rows, D = columns

_NAMED = 10
"""Failures that a message names."""

ALL_IN_FULL = 16
"""Configurations that learn in steps, up to which none is left behind early."""

_FIRST_FOLDS = 1
_FIRST_SHARE = 0.2
"""Of the epochs: how long every configuration is trained, where some are to be left behind."""

_KEPT = 6
_KEPT_SHARE = 1 / 12
"""How many, and which share of them, are cross-validated then; the larger number counts."""


def run_sweep(
    x_ND: Tensor,
    slices: Sequence[SliceSpec],
    task: str,
    truth: Tensor,
    classes_N: Indices | None,
    configurations: Sequence[Configuration],
    *,
    num_folds: int,
    seed: int,
    score: Score,
    check: Callable[[], None],
    on_done: Callable[[float], None],
    around: JobSpec = PLAIN,
    inputs: Sequence[HeadInput] = (),
    run_trials: RunTrials = run_in_process,
    pictures: Pictures | None = None,
) -> list[Trial]:
    """Cross-validate configurations of a head on the training rows. All see the same folds.

    What is solved runs to convergence; what learns in steps for as many epochs as a training job would run, the last
    one's weights counting. Where more than ``ALL_IN_FULL`` learn in steps, most are dropped after a fraction of them. A
    configuration that fails says why in its trial, and disturbs no other.

    Args:
        x_ND: Raw columns of the training rows. The work is done where they lie.
        slices: Which columns are which.
        task: One of ``heads.TASKS``.
        truth: Class indices, (N,), counted from 0; 0 and 1, (N, M); or values, (N, M). On the same device.
        classes_N: Class of each picture, which the folds are even in; None unless there are classes.
        configurations: What to try.
        num_folds: Folds, at least 2.
        seed: Of the folds, the first weights, the order of the rows and the dropout.
        score: How good outputs are.
        check: Called between steps; what it raises to stop is let through.
        on_done: Called with the fraction done, which never falls.
        around: The job that the configurations vary: its head, loss, optimiser and the like.
        inputs: What the columns are where all of them enter every head. Empty: those of a configuration's slices are
            one input.
        run_trials: Runs those that learn in steps and that cannot be stacked.
        pictures: What the rows are views of, and their groups. None: each row is one, and its own group.

    Returns:
        A trial for each configuration, in the order given. Equal arguments give equal trials, to the bit, on one
        machine with one number of threads.

    Raises:
        WireError: INVALID_ARGUMENT if there is nothing to try, or if all configurations fail: with the reasons.
            BAD_LABELS if there are fewer rows, or groups of them, than folds.
    """
    pictures = pictures or Pictures(len(x_ND))
    _check_sizes(configurations, num_folds, pictures)
    fold_P = folds(classes_N, pictures.count, num_folds, random_stream(seed, FOLDS), pictures.groups_P)
    fold_N = pictures.spread(torch.from_numpy(fold_P)).to(x_ND.device)
    of_rows = Folds.of(fold_N, num_folds, pictures.scored(x_ND.device))
    num_outputs = int(truth.max()) + 1 if task in (CLASSIFICATION, ORDINAL) else truth.shape[1]
    sweep = _Sweep(
        Source("", x_ND, tuple(slices)),
        task,
        truth,
        num_outputs,
        configurations,
        seed,
        score,
        check,
        on_done,
        around,
        tuple(inputs),
        run_trials,
    )
    ordered = sweep.run(of_rows)
    _check_any(ordered)
    return ordered


class _Sweep:
    """One call of ``run_sweep``, whose arguments these are."""

    def __init__(
        self,
        source: Source,
        task: str,
        truth: Tensor,
        num_outputs: int,
        configurations: Sequence[Configuration],
        seed: int,
        score: Score,
        check: Callable[[], None],
        on_done: Callable[[float], None],
        around: JobSpec,
        inputs: tuple[HeadInput, ...],
        run_trials: RunTrials,
    ) -> None:
        """Check each configuration: those that cannot be have failed."""
        self._source, self._task, self._truth, self._num_outputs = source, task, truth, num_outputs
        self._configurations, self._seed, self._score, self._check = configurations, seed, score, check
        self._on_done, self._around, self._inputs, self._run_trials = on_done, around, inputs, run_trials
        self._trials: dict[int, Trial] = {}
        self._plans: dict[int, _Plan] = {}
        self._planned, self._done = 1.0, 0.0
        for number, one in enumerate(configurations):
            try:
                chosen = tuple(check_configuration(one, source, around))
                spec = one.spec(around)
            except WireError as error:
                self._trials[number] = _failed(one, error.message)
                continue
            self._plans[number] = _Plan(chosen, spec, _is_stacked(spec, inputs))

    def run(self, of_rows: Folds) -> list[Trial]:
        """Return all trials, in order."""
        in_steps = [number for number, one in self._plans.items() if one.spec.solver == "adamw"]
        kept = max(_KEPT, math.ceil(_KEPT_SHARE * len(in_steps)))
        if len(in_steps) > ALL_IN_FULL:
            first = _FIRST_SHARE * _FIRST_FOLDS / len(of_rows)
            self._planned = first * len(in_steps) + len(self._plans) - len(in_steps) + kept
            self._assess(in_steps, of_rows.first(_FIRST_FOLDS), _FIRST_SHARE, first)
            self._drop(in_steps, kept)
        else:
            self._planned = max(1.0, float(len(self._plans)))
        left = [number for number in self._plans if number not in self._trials]
        self._assess(left, of_rows, 1.0, 1.0)
        self._on_done(1.0)
        return [self._trials[number] for number in range(len(self._configurations))]

    def _drop(self, numbers: Sequence[int], kept: int) -> None:
        """Keep the trials of those that are left behind, and forget those of the others, which go on."""
        fine = [number for number in numbers if not self._trials[number].error]
        order = sorted(fine, key=lambda number: -self._trials[number].score)
        for place, number in enumerate(order):
            one = self._trials.pop(number)
            if place >= kept:
                self._trials[number] = Trial(
                    *(one.configuration, one.scores, one.score, "", one.num_columns, one.seconds), dropped=True
                )

    def _assess(self, numbers: Sequence[int], of_rows: Folds, share: float, effort: float) -> None:
        """Train and score configurations.

        Args:
            numbers: Which.
            of_rows: Folds.
            share: Of the epochs.
            effort: Of each, beside that of a whole cross-validation.
        """
        groups: dict[tuple[SliceSpec, ...], list[int]] = {}
        alone: dict[bool, list[int]] = {}
        for number in numbers:
            plan = self._plans[number]
            if plan.is_stacked:
                groups.setdefault(plan.slices, []).append(number)
            else:
                alone.setdefault(plan.spec.solver == "adamw", []).append(number)
        for chosen, ours in groups.items():
            columns_ND = standardised_columns(self._source, chosen)
            rows = FoldedRows(columns_ND, self._task, self._truth, self._num_outputs, of_rows, self._around)
            for some in self._alike(ours):
                self._assess_stacked(rows, some, share, effort)
        for in_steps, ours in alone.items():
            # What is solved is done sooner than it could be sent.
            run = self._run_trials if in_steps else run_in_process
            self._assess_alone(run, ours, of_rows, share, effort)

    def _assess_stacked(self, rows: FoldedRows, some: Sequence[int], share: float, effort: float) -> None:
        def tell(done: float) -> None:
            self._on_done(min(1.0, (self._done + effort * len(some) * done) / self._planned))

        started = time.perf_counter()
        ours = [self._configurations[one] for one in some]
        found = _run_group(rows, ours, self._seed, share, self._score, self._check, tell)
        seconds = (time.perf_counter() - started) / len(some)
        for number, outcome in zip(some, found, strict=True):
            self._trials[number] = _trial(self._configurations[number], outcome, rows.x_ND.shape[1], seconds)
        self._advance(effort * len(some))

    def _assess_alone(
        self, run: RunTrials, numbers: Sequence[int], of_rows: Folds, share: float, effort: float
    ) -> None:
        plans = [self._plans[number] for number in numbers]
        trials = TrialSet(
            tuple(one.work(self._inputs) for one in plans),
            self._source.tensor,
            self._truth,
            self._task,
            self._num_outputs,
            of_rows,
            share,
            self._score,
        )

        def take(done: TrialDone) -> None:
            number = numbers[done.number]
            width = plans[done.number].num_columns
            self._trials[number] = _trial(self._configurations[number], done.outcome, width, done.seconds)
            self._advance(effort)

        run(trials, take, self._check)

    def _advance(self, effort: float) -> None:
        self._done += effort
        self._on_done(min(1.0, self._done / self._planned))

    def _alike(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return the configurations of one set of slices by what is computed together.

        Heads without dropout draw no random numbers for it: beside others they would see their rows in another order.
        """
        found: dict[tuple[object, ...], list[int]] = {}
        for number in numbers:
            one = self._configurations[number]
            found.setdefault((self._plans[number].spec.solver, one.hidden, one.dropout > 0), []).append(number)
        return list(found.values())


@dataclass(frozen=True)
class _Plan:
    """How a configuration is trained."""

    slices: tuple[SliceSpec, ...]
    spec: JobSpec
    is_stacked: bool

    @property
    def num_columns(self) -> int:
        """Columns that it reads."""
        return sum(one.width for one in self.slices)

    def work(self, inputs: tuple[HeadInput, ...]) -> Work:
        """Return it as work for a trial of its own."""
        if not inputs:
            names, widths = zip(*((one.name, one.width) for one in self.slices), strict=True)
            inputs = (HeadInput(names, widths),)
        columns: list[tuple[int, int]] = []
        for one in self.slices:
            if columns and columns[-1][1] == one.start:  # side by side: no copy is needed
                columns[-1] = (columns[-1][0], one.stop)
            else:
                columns.append((one.start, one.stop))
        return Work(self.spec, inputs, tuple(columns))


def _is_stacked(spec: JobSpec, inputs: Sequence[HeadInput]) -> bool:
    """Whether heads of this kind are computed many at once."""
    head = spec.head
    if head.kind not in (LINEAR, MLP) or is_fused(head, inputs) or head.batch_norm:
        return False
    return spec.solver == "lbfgs" or (spec.optimiser.precision == FLOAT32 and not spec.optimiser.ema)


def _check_sizes(configurations: Sequence[Configuration], num_folds: int, pictures: Pictures) -> None:
    if not configurations:
        raise invalid("a sweep needs at least one configuration")
    if num_folds < 2:
        raise invalid(f"a sweep needs at least 2 folds; got {num_folds}")
    what = "rows" if pictures.groups_P is None else "groups"
    if pictures.num_groups < num_folds:
        raise WireError(
            ErrorCode.BAD_LABELS,
            f"{pictures.num_groups} {what} to train on cannot make {num_folds} folds; add {what}, or ask for less",
        )


def _run_group(
    rows: FoldedRows,
    configurations: Sequence[Configuration],
    seed: int,
    share: float,
    score: Score,
    check: Callable[[], None],
    tell: Callable[[float], None],
) -> list[Outcome]:
    """Return the scores of each configuration, or why it failed."""
    outcomes: list[Outcome] = [""] * len(configurations)
    try:
        for number, outputs in _outputs(rows, configurations, seed, share, check, tell):
            outcomes[number] = outputs if isinstance(outputs, str) else _scores(rows, outputs, score)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        reason = "its columns cannot be decomposed; look for values that are not finite"
        outcomes = [one or reason for one in outcomes]
    except torch.OutOfMemoryError:
        outcomes = [one or "memory ran out" for one in outcomes]
    return outcomes


def _outputs(
    rows: FoldedRows,
    configurations: Sequence[Configuration],
    seed: int,
    share: float,
    check: Callable[[], None],
    tell: Callable[[float], None],
) -> Iterator[Result]:
    if configurations[0].spec(rows.around).solver == "adamw":
        return ensemble_outputs(rows, configurations, seed, share=share, check=check, tell=tell)
    strengths = [one.l2 for one in configurations]
    if rows.task == ORDINAL:
        return ordinal_outputs(rows, strengths, check=check, tell=tell)
    if rows.task == REGRESSION and rows.around.loss.kind != HUBER:
        return ridge_outputs(rows, strengths, check=check, tell=tell)
    return linear_outputs(rows, strengths, check=check, tell=tell)


def _scores(rows: FoldedRows, outputs: HeldOut, score: Score) -> Outcome:
    if wrong := failure(outputs):
        return wrong
    return checked_scores(
        tuple(score(one, rows.truth[held]) for one, held in zip(outputs, rows.folds.held, strict=True))
    )


def _trial(configuration: Configuration, outcome: Outcome, num_columns: int, seconds: float) -> Trial:
    if isinstance(outcome, str):
        return _failed(configuration, outcome, num_columns, seconds)
    return Trial(configuration, outcome, math.fsum(outcome) / len(outcome), num_columns=num_columns, seconds=seconds)


def _failed(configuration: Configuration, error: str, num_columns: int = 0, seconds: float = 0.0) -> Trial:
    return Trial(configuration, (), -math.inf, error, num_columns, seconds)


def _check_any(trials: Sequence[Trial]) -> None:
    """Check that a configuration succeeded.

    Raises:
        WireError: INVALID_ARGUMENT, with the reasons.
    """
    if not all(one.error for one in trials):
        return
    alike: dict[str, list[Configuration]] = {}
    for one in trials:
        alike.setdefault(one.error, []).append(one.configuration)
    reasons = []
    for error, (first, *others) in list(alike.items())[:_NAMED]:
        reasons.append(f"({first}){f' and {len(others)} others' if others else ''}: {error}")
    if len(alike) > _NAMED:
        reasons.append(f"and {len(alike) - _NAMED} more")
    raise invalid(f"all configurations of the sweep failed: {'; '.join(reasons)}")
