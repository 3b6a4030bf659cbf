"""How far a number measured on some rows may be off: intervals by drawing the rows again, with replacement.

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentile intervals).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.finite import NAN_OR_INFINITY, not_finite
from trunkline_wire.heads import invalid

from trunkline_worker.training.split import Indices

# Shape suffix legend: N = rows, B = rows drawn, U = distinct values, R = resamples

Interval = tuple[float, float]
"""Lowest and highest."""

_CHUNK_CELLS = 2**21
"""Counts or rows that are drawn at once."""

_COST_OF_COUNT = 6
"""In rows, to draw."""


def interval(
    metric: Callable[[Indices], float | None],
    num_rows: int,
    generator: np.random.Generator,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> Interval | None:
    """Return the percentile interval of any metric.

    Args:
        metric: From the numbers of some rows, repeats included, to its value on them; None or NaN where it has none, as
            r2 where the truth does not vary. Such resamples are skipped.
        num_rows: N.
        generator: Where the rows are drawn from.
        num_resamples: How often.
        level: Share of such intervals that hold the truth.

    Returns:
        None with fewer than two rows, or where the metric has a value on fewer than half of the resamples.

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    _check(num_resamples, level)
    if num_rows < 2:
        return None
    drawn = (metric(generator.integers(num_rows, size=num_rows)) for _ in range(num_resamples))
    values = [one for one in drawn if one is not None and math.isfinite(one)]
    return None if 2 * len(values) < num_resamples else percentiles(np.array(values), level)


def mean_interval(
    per_row_N: npt.NDArray[np.generic], generator: np.random.Generator, num_resamples: int = 1000, level: float = 0.95
) -> Interval | None:
    """Return the percentile interval of a mean over rows, as accuracy or a loss is: as ``interval``, but fast.

    How often each distinct value is drawn is all that counts, so where a row is right or wrong that is two numbers.

    Args:
        per_row_N: Numbers or booleans.
        generator: Where the rows are drawn from.
        num_resamples: How often.
        level: Share of such intervals that hold the truth.

    Returns:
        None with fewer than two rows.

    Raises:
        WireError: INVALID_ARGUMENT, SHAPE_MISMATCH or NOT_FINITE.
    """
    _check(num_resamples, level)
    value_N = np.asarray(per_row_N, dtype=np.float64)
    if value_N.ndim != 1:
        raise WireError(ErrorCode.SHAPE_MISMATCH, f"one value per row is needed; got an array of {value_N.shape}")
    if not np.isfinite(value_N).all():
        raise not_finite(~np.isfinite(value_N), NAN_OR_INFINITY, "Leave those rows out")
    num_rows = len(value_N)
    if num_rows < 2:
        return None
    value_U, count_U = np.unique(value_N, return_counts=True)
    # Around one of the values, the mean of equal values is that value to the bit.
    origin, share_U = value_U[0], count_U / num_rows
    means = []
    counted = len(value_U) * _COST_OF_COUNT < num_rows
    chunk = max(1, _CHUNK_CELLS // (len(value_U) if counted else num_rows))
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        if counted:
            above_R = generator.multinomial(num_rows, share_U, size=size) @ (value_U - origin) / num_rows
        else:
            above_R = (value_N - origin)[generator.integers(num_rows, size=(size, num_rows))].mean(axis=1)
        means.append(origin + above_R)
    return percentiles(np.concatenate(means), level)


def difference(
    per_row_a_N: npt.NDArray[np.generic],
    per_row_b_N: npt.NDArray[np.generic],
    generator: np.random.Generator,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> Interval | None:
    """Return the interval of the mean of ``a - b`` over the same rows. If 0 is outside, one is better beyond noise.

    Args:
        per_row_a_N: Numbers or booleans, one per row.
        per_row_b_N: Of the same rows in the same order: that makes the interval as narrow as it can be.
        generator: Where the rows are drawn from.
        num_resamples: How often.
        level: Share of such intervals that hold the truth.

    Returns:
        None with fewer than two rows.

    Raises:
        WireError: INVALID_ARGUMENT, SHAPE_MISMATCH or NOT_FINITE.
    """
    if np.shape(per_row_a_N) != np.shape(per_row_b_N):
        raise WireError(
            ErrorCode.SHAPE_MISMATCH,
            f"{np.shape(per_row_a_N)} and {np.shape(per_row_b_N)} values; compare two models on the same rows",
        )
    a_N, b_N = np.asarray(per_row_a_N, dtype=np.float64), np.asarray(per_row_b_N, dtype=np.float64)
    return mean_interval(a_N - b_N, generator, num_resamples, level)


def share_interval(num_right: int, num_rows: int, level: float = 0.95) -> Interval:
    """Return the interval of a share that was counted.

    Drawing rows again says nothing where all are right, or none: every resample is like that too. This does.

    Args:
        num_right: Rows that count.
        num_rows: All rows; with none, anything is possible.
        level: Share of such intervals that hold the truth.

    Raises:
        WireError: INVALID_ARGUMENT.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    _check(1, level)
    if not 0 <= num_right <= num_rows:
        raise invalid(f"{num_right} of {num_rows} rows is not a share; count between none and all of them")
    if num_rows == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = num_right / num_rows
    centre = share + z * z / (2 * num_rows)
    half = z * math.sqrt(share * (1 - share) / num_rows + (z / (2 * num_rows)) ** 2)
    scale = 1 + z * z / num_rows
    # The ends are exact by formula, but not in floating point.
    low = 0.0 if num_right == 0 else (centre - half) / scale
    return low, 1.0 if num_right == num_rows else (centre + half) / scale


def percentiles(values: npt.NDArray[np.float64], level: float) -> Interval:
    """Return the interval that holds the share ``level`` in the middle of what resamples gave."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check(num_resamples: int, level: float) -> None:
    if num_resamples < 1:
        raise invalid(f"at least one resample is needed; got {num_resamples}")
    if not 0.0 < level < 1.0:
        raise invalid(f"the level is above 0 and below 1, for example 0.95; got {level}")
