"""Trials of their own: configurations that no stacked computation covers, each trained as a job would train it.

Where they run is up to whoever passes a ``RunTrials``: here one after another, elsewhere many processes at once.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from trunkline_wire.errors import WireError
from trunkline_wire.heads import ORDINAL

from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.fit import Rows, fit_head
from trunkline_worker.training.minibatch import run_head, schedule
from trunkline_worker.training.progress import Progress
from trunkline_worker.training.sweep.rows import Folds

logger = logging.getLogger(__name__)

# Shape suffix legend: N = rows, D = columns

Score = Callable[[Tensor, Tensor], float]
"""Logits, or values in the targets' own units, of held-out rows, and their truth, to a number: higher is better."""

Outcome = tuple[float, ...] | str
"""The score of each fold, or why there is none."""


@dataclass(frozen=True)
class Work:
    """What one trial trains.

    Attributes:
        spec: Head, solver, loss and settings, with an L2 strength.
        inputs: What enters the head.
        columns: Where the columns of ``inputs`` lie, as starts and stops.
    """

    spec: JobSpec
    inputs: tuple[HeadInput, ...]
    columns: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TrialSet:
    """Trials and what they share.

    Attributes:
        work: Of each.
        x_ND: Raw columns of the training rows.
        truth: Class indices, (N,); 0 and 1, (N, M); or values, (N, M).
        task: One of ``heads.TASKS``.
        num_outputs: Classes, or M.
        folds: Who holds out what.
        share: Of the epochs that a job would run.
        score: How good outputs are.
    """

    work: tuple[Work, ...]
    x_ND: Tensor
    truth: Tensor
    task: str
    num_outputs: int
    folds: Folds
    share: float
    score: Score


@dataclass(frozen=True)
class TrialDone:
    """What came of a trial, by its number, and how many seconds it took."""

    number: int
    outcome: Outcome
    seconds: float


RunTrials = Callable[[TrialSet, Callable[[TrialDone], None], Callable[[], None]], None]
"""Runs all trials of a set, in any order, and hands over each as it ends. The last argument is called now and then;
what it raises to stop is let through, and no trial is left running."""


def run_in_process(trials: TrialSet, on_done: Callable[[TrialDone], None], check: Callable[[], None]) -> None:
    """Run trials one after another. See ``RunTrials``."""
    for number in range(len(trials.work)):
        on_done(run_trial(trials, number, check))


def run_trial(trials: TrialSet, number: int, check: Callable[[], None]) -> TrialDone:
    """Train a configuration on each fold, and score it on the rows held out.

    Args:
        trials: What it is one of.
        number: Which.
        check: Called between steps; what it raises to stop is let through.
    """
    started = time.perf_counter()
    stopped: list[BaseException] = []

    def checked() -> bool:
        try:
            check()
        except BaseException as error:
            stopped.append(error)
            raise
        return False

    outcome: Outcome
    try:
        outcome = _scores(trials, trials.work[number], Progress(lambda event: None, checked))
    except Exception as error:
        if stopped:
            raise
        outcome = _reason(error)
    return TrialDone(number, outcome, time.perf_counter() - started)


def failure(outputs: Sequence[Tensor]) -> str:
    """Return what is wrong with outputs; nothing if they can be scored."""
    return "" if all(bool(one.isfinite().all()) for one in outputs) else "its outputs are not finite"


def checked_scores(scores: tuple[float, ...]) -> Outcome:
    """Return scores, or what is wrong with them."""
    return scores if all(map(math.isfinite, scores)) else "its score is not finite"


def _scores(trials: TrialSet, work: Work, progress: Progress) -> Outcome:
    columns = [trials.x_ND[:, start:stop] for start, stop in work.columns]
    rows = Rows(columns[0] if len(columns) == 1 else torch.cat(columns, dim=1), trials.truth)
    num_outputs = trials.num_outputs - (trials.task == ORDINAL)
    scores = []
    for held, training in zip(trials.folds.held, trials.folds.training, strict=True):
        ours = rows.take(training)
        spec = work.spec
        if trials.share < 1.0:
            planned = schedule(spec, Head(spec.head, work.inputs, num_outputs), len(ours), spec.l2)
            spec = replace(spec, epochs=max(1, round(trials.share * planned.epochs)))
        # No rows to choose an epoch by: those held out remain a fair test.
        fit = fit_head(spec, trials.task, num_outputs, work.inputs, ours, None, spec.l2, progress, span=(0.0, 1.0))
        outputs = run_head(fit.head, rows.x_ND[held])
        if wrong := failure([outputs]):
            return wrong
        scores.append(trials.score(outputs, trials.truth[held]))
    return checked_scores(tuple(scores))


def _reason(error: Exception) -> str:
    if isinstance(error, WireError):
        return error.message
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "memory ran out"
    if isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        return "its columns cannot be decomposed; look for values that are not finite"
    logger.error("a trial failed", exc_info=error)
    return f"it failed in a way that was not foreseen ({type(error).__name__}); the lane's log says more"
