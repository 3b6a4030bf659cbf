"""Sets of classes and intervals of numbers that hold the truth as often as was asked for. numpy alone.

A threshold comes from how badly a model did on rows it had not seen. If new rows come from where those came from, the
truth lies inside in at least the share asked for, whatever the model: that is counting, not modelling.

Source: Vovk, Gammerman and Shafer 2005, "Algorithmic Learning in a Random World"; Papadopoulos et al. 2002, "Inductive
Confidence Machines for Regression", for the split into rows to train on and rows to count with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.finite import NAN_OR_INFINITY, not_finite

# Shape suffix legend: N = rows, K = classes, M = values of a row

_SLACK = 1e-6
"""Probabilities travel in single precision: a class on the edge is in."""


def threshold(scores: Sequence[float], num_rows: int, coverage: float) -> float:
    """Return the nonconformity up to which a class or a value is in.

    Args:
        scores: Of held-out rows, ascending: of all, or of evenly spaced ones, each the worst of those it stands for.
        num_rows: How many rows they stand for.
        coverage: Share of new rows that must have the truth inside, above 0 and below 1.

    Returns:
        Infinity where there are too few rows to promise as much: fewer than ``coverage / (1 - coverage)``.

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    if not 0.0 < coverage < 1.0:
        raise WireError(ErrorCode.INVALID_ARGUMENT, f"coverage is above 0 and below 1, for example 0.9; got {coverage}")
    if not 0 <= len(scores) <= num_rows:
        raise WireError(ErrorCode.INVALID_ARGUMENT, f"{len(scores)} scores cannot stand for {num_rows} rows")
    # Without the small step back 100 rows at 0.07 would be 8 of them: the product is 7.000000000000001.
    rank = max(1, math.ceil((num_rows + 1) * coverage - 1e-9))
    if not scores or rank > num_rows:
        return math.inf
    # The first score that stands for this rank or a later one.
    found = float(scores[(rank - 1) * len(scores) // num_rows])
    if math.isnan(found):
        raise WireError(ErrorCode.INVALID_ARGUMENT, "a score is NaN; train the model again")
    return found


def sets(probabilities_NK: npt.NDArray[np.floating], threshold: float) -> npt.NDArray[np.bool_]:
    """Return which classes each row may be of. The likeliest one always is.

    Args:
        probabilities_NK: As the model says them, at the temperature that the scores were made with.
        threshold: What ``threshold`` returned.

    Raises:
        WireError: NOT_FINITE, SHAPE_MISMATCH, or INVALID_ARGUMENT for a threshold that is NaN.
    """
    _check(probabilities_NK, "probabilities", threshold)
    inside_NK: npt.NDArray[np.bool_] = 1.0 - probabilities_NK.astype(np.float64) <= threshold + _SLACK
    inside_NK[np.arange(len(inside_NK)), probabilities_NK.argmax(axis=1)] = True
    return inside_NK


def intervals(
    values_NM: npt.NDArray[np.floating], threshold: float, scale_M: npt.NDArray[np.floating]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the lowest and the highest values, (N, M) each. All values of a row lie inside at once.

    Args:
        values_NM: As the model says them.
        threshold: What ``threshold`` returned; at infinity the intervals are endless.
        scale_M: That the scores were made with: what 1 of nonconformity is in units of each value.

    Raises:
        WireError: NOT_FINITE, SHAPE_MISMATCH, or INVALID_ARGUMENT for a threshold below 0 or a scale that is not
            positive.
    """
    _check(values_NM, "values", threshold)
    if scale_M.shape != values_NM.shape[1:]:
        raise WireError(ErrorCode.SHAPE_MISMATCH, f"{values_NM.shape[1]} values a row but scales of {scale_M.shape}")
    if threshold < 0 or not (np.isfinite(scale_M) & (scale_M > 0)).all():
        raise WireError(ErrorCode.INVALID_ARGUMENT, "a threshold is at least 0 and a scale positive and finite")
    half_M = threshold * scale_M.astype(np.float64)
    return values_NM - half_M, values_NM + half_M


def _check(rows: npt.NDArray[np.floating], what: str, threshold: float) -> None:
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise WireError(ErrorCode.SHAPE_MISMATCH, f"{what} are (rows, outputs); got {rows.shape}")
    finite = np.isfinite(rows)
    if not finite.all():
        raise not_finite(~finite, f"{NAN_OR_INFINITY} in the {what}")
    if math.isnan(threshold):
        raise WireError(ErrorCode.INVALID_ARGUMENT, "the threshold is NaN; use what `threshold` returns")
