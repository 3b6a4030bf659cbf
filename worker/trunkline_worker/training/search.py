"""The search of a job: from values to try to the one configuration that is trained."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import SweepConfig
from trunkline_wire.heads import CLASSIFICATION, LINEAR, MLP, MULTI_LABEL, ORDINAL, REGRESSION, HeadConfig, invalid
from trunkline_wire.specs import SliceSpec

from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.choose import L2_PER_COLUMN, WEIGHT_DECAY
from trunkline_worker.training.fit import Rows, selected_badness
from trunkline_worker.training.pictures import Pictures
from trunkline_worker.training.progress import Progress
from trunkline_worker.training.sources import Source
from trunkline_worker.training.sweep.plan import Configuration, Trial, winner
from trunkline_worker.training.sweep.run import run_sweep

# Shape suffix legend: N = rows

_WON_BY = {CLASSIFICATION: "cross_entropy", MULTI_LABEL: "binary_cross_entropy", REGRESSION: "r2"}
"""The metric to win by where none is named."""


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
    progress: Progress,
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
        progress: Told how far it is; may raise to stop.
        pictures: What the training rows are views of, and their groups. None: each row is one, and its own group.

    Raises:
        WireError: UNSUPPORTED for classes in order; INVALID_ARGUMENT where there is more than one input whose slices
            could be tried, or where all configurations fail: with the reasons.
    """
    if task == ORDINAL:
        raise WireError(ErrorCode.UNSUPPORTED, "a sweep cannot learn classes in order; leave the order out")
    progress.tell("sweep", 0.0)
    if chosen is None:
        if len(sources) > 1:
            raise invalid("a sweep tries slices of a single input; leave the embeddings out")
        slices, sets = list(sources[0].slices), list(sweep.embeddings)
    else:
        slices = _side_by_side([one for some in chosen for one in some])
        sets = [tuple(one.name for one in slices)]
    configurations = _configurations(spec, sweep, slices, sets)
    metric = spec.select_by or _WON_BY[task]
    named = replace(spec, select_by=metric)

    def score(outputs: Tensor, truth: Tensor) -> float:
        return -selected_badness(named, task, outputs, truth)

    trials = run_sweep(
        training.x_ND,
        slices,
        task,
        training.truth,
        classes_N,
        configurations,
        num_folds=sweep.folds,
        seed=spec.seed,
        score=score,
        check=progress.check,
        on_done=lambda done: progress.tell("sweep", done),
        pictures=pictures,
    )
    won = winner(trials)
    message = f"{len(trials)} configurations; won by {metric} {won.score:.4g}: {won.configuration}"
    failed = sum(bool(one.error) for one in trials)
    if failed:
        message += f"; {failed} failed"
    progress.tell("sweep", 1.0, {"score": won.score, "num_trials": float(len(trials))}, message, always=True)
    own = won.configuration
    settled = replace(
        spec,
        sweep=None,
        head=HeadConfig(MLP, own.hidden, dropout=own.dropout) if own.hidden else HeadConfig(LINEAR),
        solver="adamw" if own.hidden else "lbfgs",
        l2=own.l2,
        learning_rate=own.learning_rate,
    )
    return Found(settled, sources[0].take(own.slices) if chosen is None else None, trials, won)


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
    spec: JobSpec, sweep: SweepConfig, slices: Sequence[SliceSpec], sets: Sequence[tuple[str, ...]]
) -> list[Configuration]:
    widths = {one.name: one.stop - one.start for one in slices}
    found: dict[Configuration, None] = {}
    for names, hidden in itertools.product(sets, sweep.hidden or ((),)):
        strengths: Sequence[float] = sweep.l2 or ((spec.l2,) if spec.l2 >= 0 else ())
        if not strengths:
            num_columns = sum(widths.get(name, 0) for name in names)
            # The grid that a job without a sweep is cross-validated over.
            strengths = (WEIGHT_DECAY,) if hidden else [num_columns * one for one in L2_PER_COLUMN]
        rates = sweep.learning_rate or (spec.learning_rate,) if hidden else (0.0,)
        dropouts = sweep.dropout or (0.0,) if hidden else (0.0,)
        for l2, rate, dropout in itertools.product(strengths, rates, dropouts):
            found[Configuration(tuple(names), l2, hidden, rate, dropout)] = None
    return list(found)
