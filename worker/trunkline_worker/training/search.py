"""The search of a job: from values to try to the one configuration that is trained."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from trunkline_wire.fits import SweepConfig
from trunkline_wire.heads import CONV, MLP, PROTOTYPE, REGRESSION, invalid
from trunkline_wire.specs import SliceSpec

from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.choose import L2_PER_COLUMN, WEIGHT_DECAY
from trunkline_worker.training.fit import Rows
from trunkline_worker.training.pictures import Pictures
from trunkline_worker.training.progress import Progress
from trunkline_worker.training.sources import Source
from trunkline_worker.training.sweep.alone import RunTrials
from trunkline_worker.training.sweep.judge import Judge
from trunkline_worker.training.sweep.plan import Configuration, Trial, kind_of, solver_of, winner
from trunkline_worker.training.sweep.run import run_sweep

# Shape suffix legend: N = rows

_NEARLY = 0.99


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        spec: The job that is left to do, with nothing to try any more.
        slices: Those that the head reads of the first source; None where that was settled before.
        trials: All configurations, as they were tried.
        won: The one that is trained.
    """

    spec: JobSpec
    slices: list[SliceSpec] | None
    trials: list[Trial]
    won: Trial


def search(
    spec: JobSpec,
    sweep: SweepConfig,
    sources: Sequence[Source],
    chosen: Sequence[Sequence[SliceSpec]] | None,
    task: str,
    training: Rows,
    classes_N: npt.NDArray[np.int64] | None,
    num_classes: int,
    progress: Progress,
    run_trials: RunTrials,
    pictures: Pictures | None = None,
) -> Found:
    """Try every value with every other, and settle on one.

    Args:
        spec: The job.
        sweep: What it tries.
        sources: Where the columns come from.
        chosen: The slices that enter the head, of each source; None where slices are tried.
        task: One of ``heads.TASKS``.
        training: The training rows: the columns of ``chosen`` side by side, or all of the only source.
        classes_N: Class of each picture, or None.
        num_classes: How many there are.
        progress: Told how far it is; may raise to stop.
        run_trials: Runs what cannot be computed many at once.
        pictures: What the training rows are views of, and their groups. None: each row is one, and its own group.

    Raises:
        WireError: INVALID_ARGUMENT where there is more than one input whose slices could be tried, or where all
            configurations fail: with the reasons.
    """
    progress.tell("sweep", 0.0)
    if chosen is None:
        if len(sources) > 1:
            raise invalid("a sweep tries slices of a single input; leave the embeddings out")
        slices, sets = list(sources[0].slices), list(sweep.embeddings)
        inputs: list[HeadInput] = []
    else:
        inputs = [source.head_input(some) for source, some in zip(sources, chosen, strict=True)]
        slices = _side_by_side([one for some in chosen for one in some])
        sets = [tuple(one.name for one in slices)]
    judge = Judge.of(spec, task, training.truth, num_classes)
    trials = run_sweep(
        training.x_ND,
        slices,
        task,
        training.truth,
        classes_N,
        _configurations(spec, sweep, task, slices, sets),
        num_folds=sweep.folds,
        seed=spec.seed,
        score=judge,
        check=progress.check,
        # That it is done is told below, with what came of it.
        on_done=lambda done: progress.tell("sweep", min(done, _NEARLY)),
        around=spec,
        inputs=inputs,
        run_trials=run_trials,
        pictures=pictures,
    )
    won = winner(trials)
    message = f"{len(trials)} configurations; won by {judge.name} {won.score:.4g}: {won.configuration}"
    for count, what in ((sum(one.dropped for one in trials), "dropped early"), (_num_failed(trials), "failed")):
        if count:
            message += f"; {count} {what}"
    progress.tell("sweep", 1.0, {"score": won.score, "num_trials": float(len(trials))}, message, always=True)
    slices_won = sources[0].take(won.configuration.slices) if chosen is None else None
    return Found(won.configuration.spec(spec), slices_won, trials, won)


def _num_failed(trials: Sequence[Trial]) -> int:
    return sum(bool(one.error) for one in trials)


def _side_by_side(slices: Sequence[SliceSpec]) -> list[SliceSpec]:
    """Return slices as they lie once all that is chosen stands side by side. Names of several sources may be alike."""
    placed: list[SliceSpec] = []
    start = 0
    for number, one in enumerate(slices):
        width = one.stop - one.start
        name = one.name if all(one.name != other.name for other in placed) else f"{one.name}#{number}"
        placed.append(SliceSpec(name, start, start + width))
        start += width
    return placed


def _configurations(
    spec: JobSpec, sweep: SweepConfig, task: str, slices: Sequence[SliceSpec], sets: Sequence[tuple[str, ...]]
) -> list[Configuration]:
    widths = {one.name: one.stop - one.start for one in slices}
    found: dict[Configuration, None] = {}
    for names, hidden in itertools.product(sets, sweep.hidden or (spec.head.hidden,)):
        kind = kind_of(spec, hidden)
        strengths: Sequence[float] = sweep.l2 or ((spec.l2,) if spec.l2 >= 0 else ())
        if not strengths:
            strengths = _strengths(kind, task, sum(widths.get(name, 0) for name in names))
        in_steps = solver_of(spec, hidden) == "adamw"
        rates = (sweep.learning_rate or (spec.learning_rate,)) if in_steps else (0.0,)
        dropouts = (sweep.dropout or (spec.head.dropout,)) if kind in (MLP, CONV) else (0.0,)
        for l2, rate, dropout in itertools.product(strengths, rates, dropouts):
            found[Configuration(tuple(names), l2, hidden, rate, dropout)] = None
    return list(found)


def _strengths(kind: str, task: str, num_columns: int) -> Sequence[float]:
    """Return those that a job without a sweep would be cross-validated over, or would take."""
    if kind in (MLP, CONV):
        return (WEIGHT_DECAY,)
    if kind == PROTOTYPE:
        return L2_PER_COLUMN if task == REGRESSION else (0.0,)
    return [num_columns * one for one in L2_PER_COLUMN]
