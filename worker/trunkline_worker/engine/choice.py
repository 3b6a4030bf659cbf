"""Which of the measured runtimes runs a trunk.

Of those whose embedding stays within ``MAX_RUNTIME_ERROR`` of float32 torch the fastest wins, at the number of rows a
batch at which it is fastest. One that is not exact must win by a clear margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from trunkline_wire.specs import BackboneSpec, RuntimeResult, RuntimeSpeed, SliceSpec, Tuning

from trunkline_worker.engine.runtimes import Runtime

# Shape suffix legend: B = rows, D = embedding columns

MAX_RUNTIME_ERROR = 0.02
"""Largest error of a runtime that is used: over the slices of the embedding the largest relative difference to
float32 torch, each slice taken as one vector over the sample."""

EXACT_ERROR = 1e-3
"""Up to this error a runtime counts as exact."""

INEXACT_GAIN = 1.25
"""An inexact runtime must be this many times as fast as the fastest exact one."""

TIE = 0.97
"""Speeds from this fraction of the best count as equal to it: the smaller batch wins, then the smaller error."""

BATCH_COST_S = 5e-4
"""What a batch costs beside its pass of the trunk, in seconds: two changes of thread, waking the runtime's threads, its
place in the line, its heads. It keeps batches from getting tiny where a runtime gains nothing from larger ones."""


@dataclass(frozen=True)
class Prepared:
    """A runtime, ready to run.

    Attributes:
        runtime: To be run on the thread that made it.
        error: As defined at ``MAX_RUNTIME_ERROR``.
        rows_per_s: When it was measured; 0 if it was not.
        batch_rows: Rows of a batch at which it was that fast; 0 if it was not measured.
        tuning: How it was chosen.
    """

    runtime: Runtime
    error: float
    rows_per_s: float = 0.0
    batch_rows: int = 0
    tuning: Tuning | None = None


def choose(results: Sequence[RuntimeResult]) -> RuntimeResult:
    """Return the one to use. One of them is float32 torch, measured, whose error is 0."""
    measured = [one for one in results if one.speeds and not one.refused]
    exact = _fastest([one for one in measured if one.error <= EXACT_ERROR])
    enough = INEXACT_GAIN * score(exact)
    inexact = [one for one in measured if EXACT_ERROR < one.error <= MAX_RUNTIME_ERROR and score(one) >= enough]
    return _fastest(inexact) if inexact else exact


def score(result: RuntimeResult) -> float:
    """Return the rows a second that a runtime gives in batches of the best size, the cost of batches included."""
    return max(map(_served, result.speeds), default=0.0)


def best_speed(result: RuntimeResult) -> RuntimeSpeed:
    """Return the smallest batch at which a runtime is about as fast as it gets. It has been measured."""
    enough = TIE * score(result)
    return min((one for one in result.speeds if _served(one) >= enough), key=lambda one: one.batch_rows)


def _fastest(results: Sequence[RuntimeResult]) -> RuntimeResult:
    enough = TIE * max(map(score, results))
    tied = [one for one in results if score(one) >= enough]
    return min(tied, key=lambda one: (best_speed(one).batch_rows, one.error))


def _served(speed: RuntimeSpeed) -> float:
    return speed.batch_rows / (speed.batch_rows / speed.rows_per_s + BATCH_COST_S)


def embedding_error(got_BD: Tensor, expected_BD: Tensor, slices: Sequence[SliceSpec]) -> float:
    """Return the largest relative difference over the slices. NaN and infinity count as infinite.

    Shape:
        got_BD, expected_BD: (B, D), the columns of ``slices`` side by side.
    """
    if not torch.isfinite(got_BD).all():
        return float("inf")
    first = slices[0].start
    errors = []
    for one in slices:
        columns = slice(one.start - first, one.stop - first)
        expected = expected_BD[:, columns]
        errors.append(float((got_BD[:, columns] - expected).norm() / expected.norm().clamp_min(1e-12)))
    return max(errors)


def trunk_slices(spec: BackboneSpec, cut: str, whole: str) -> list[SliceSpec]:
    """Return what comes out behind a cut, side by side: the slices of the embedding, or the map or tokens at a tap."""
    if whole:
        width = spec.slice_width(whole)
        assert width is not None
        return [SliceSpec(whole, 0, width)]
    found = spec.cut(cut)
    assert found is not None
    return [one for one in spec.slices if one.name in found.slices]
