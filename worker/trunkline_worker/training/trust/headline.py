"""Intervals of the scores that people quote: functions of sums over rows, so that resampling is fast."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from trunkline_wire.heads import MULTI_LABEL, REGRESSION

from trunkline_worker.training.trust.bootstrap import Interval, percentiles

# Shape suffix legend: N = rows, R = resamples, S = sums, K = outputs

Values = npt.NDArray[np.float64]
Score = Callable[[Values], Values]
"""From sums over rows, (R, S), to a score of each resample, (R,)."""

NUM_RESAMPLES = 1000
LEVEL = 0.95

_CHUNK_CELLS = 2**23
_MAX_SUMS = 3000
"""More classes than a thousand have no interval of what is a mean over classes."""


def headline_intervals(
    task: str, answers_NK: Values, truth: npt.NDArray[np.generic], generator: np.random.Generator
) -> dict[str, Interval]:
    """Return the 95 % percentile intervals of a task's headline scores, by name.

    Args:
        task: One of ``heads.TASKS``.
        answers_NK: Probabilities or values.
        truth: Class indices, (N,); 0 and 1, (N, K); or values, (N, K).
        generator: Where the rows are drawn from.

    Returns:
        Of classes ``accuracy``, ``balanced_accuracy`` and ``f1_macro``; of labels ``subset_accuracy``, ``f1_micro`` and
        ``f1_macro``; of numbers ``rmse``, ``mae`` and ``r2``. What has no value on most resamples is left out, and
        everything with fewer than two rows.
    """
    if len(answers_NK) < 2:
        return {}
    counts_N = np.ones(len(answers_NK))
    if task == REGRESSION:
        parts = _of_numbers(answers_NK, truth.astype(np.float64))
    elif task == MULTI_LABEL:
        parts = _of_labels(answers_NK > 0.5, truth > 0.5)  # type: ignore[operator]
    else:
        # Rows of one class that are taken for one class are alike: it is enough to draw how many of each kind come.
        num_classes = answers_NK.shape[1]
        kinds, counts = np.unique(truth.astype(np.int64) * num_classes + answers_NK.argmax(axis=1), return_counts=True)
        counts_N = counts.astype(np.float64)
        parts = _of_classes(kinds % num_classes, kinds // num_classes, len(answers_NK), num_classes)
    if not parts:
        return {}
    per_row_NS = np.concatenate([one for one, _ in parts.values()], axis=1)
    sums_RS = _resampled(per_row_NS, counts_N, generator)
    found, start = {}, 0
    for name, (columns_NS, score) in parts.items():
        stop = start + columns_NS.shape[1]
        with np.errstate(divide="ignore", invalid="ignore"):
            values_R = score(sums_RS[:, start:stop])
        known_R = values_R[np.isfinite(values_R)]
        if 2 * len(known_R) >= NUM_RESAMPLES:
            found[name] = percentiles(known_R, LEVEL)
        start = stop
    return found


def _resampled(per_row_NS: Values, counts_N: Values, generator: np.random.Generator) -> Values:
    """Return the sums over the rows of each resample. Of each row there are as many as are counted."""
    num_rows = int(counts_N.sum())
    chunk = max(1, _CHUNK_CELLS // len(per_row_NS))
    sums = []
    for start in range(0, NUM_RESAMPLES, chunk):
        count_RN = generator.multinomial(num_rows, counts_N / num_rows, size=min(chunk, NUM_RESAMPLES - start))
        sums.append(count_RN.astype(np.float64) @ per_row_NS)
    return np.concatenate(sums)


def _of_classes(
    said_N: npt.NDArray[np.int64], truth_N: npt.NDArray[np.int64], num_rows: int, num_classes: int
) -> dict[str, tuple[Values, Score]]:
    right_N1 = (said_N == truth_N).astype(np.float64)[:, None]
    parts: dict[str, tuple[Values, Score]] = {"accuracy": (right_N1, lambda sums_RS: sums_RS[:, 0] / num_rows)}
    if 3 * num_classes > _MAX_SUMS:
        return parts
    given_NK, named_NK = np.eye(num_classes)[truth_N], np.eye(num_classes)[said_N]
    both_NK = given_NK * named_NK

    def recall(sums_RS: Values) -> Values:
        right_RK, given_RK = np.split(sums_RS, 2, axis=1)
        # As in scikit-learn: over the classes that have rows.
        return _mean(right_RK / given_RK, given_RK > 0)

    parts["balanced_accuracy"] = (np.concatenate([both_NK, given_NK], axis=1), recall)
    parts["f1_macro"] = (
        np.concatenate([both_NK, given_NK, named_NK], axis=1),
        lambda sums_RS: _f1(sums_RS, absent=None),
    )
    return parts


def _of_labels(said_NK: npt.NDArray[np.bool_], truth_NK: npt.NDArray[np.bool_]) -> dict[str, tuple[Values, Score]]:
    num_rows, num_labels = truth_NK.shape
    said, truth = said_NK.astype(np.float64), truth_NK.astype(np.float64)
    exact_N1 = (said_NK == truth_NK).all(axis=1).astype(np.float64)[:, None]
    totals_N3 = np.stack([(said * truth).sum(axis=1), truth.sum(axis=1), said.sum(axis=1)], axis=1)
    parts: dict[str, tuple[Values, Score]] = {
        "subset_accuracy": (exact_N1, lambda sums_RS: sums_RS[:, 0] / num_rows),
        "f1_micro": (totals_N3, lambda sums_RS: _f1(sums_RS, absent=1.0)),
    }
    if 3 * num_labels <= _MAX_SUMS:
        every_NS = np.concatenate([said * truth, truth, said], axis=1)
        parts["f1_macro"] = (every_NS, lambda sums_RS: _f1(sums_RS, absent=1.0))
    return parts


def _of_numbers(values_NK: Values, truth_NK: Values) -> dict[str, tuple[Values, Score]]:
    num_rows = len(truth_NK)
    error_NK = values_NK - truth_NK
    centred_NK = truth_NK - truth_NK.mean(axis=0)  # r2 is the same, and the sums lose no digits

    def r2(sums_RS: Values) -> Values:
        squares_RK, sum_RK, error_RK = np.split(sums_RS, 3, axis=1)
        spread_RK = squares_RK - sum_RK**2 / num_rows
        score_RK = np.where(spread_RK > 1e-12 * squares_RK, 1.0 - error_RK / spread_RK, np.nan)
        scores_R: Values = score_RK.mean(axis=1)
        return scores_R

    return {
        # As scikit-learn has it: the root of each output's mean, then the mean over the outputs.
        "rmse": (error_NK**2, lambda sums_RS: np.sqrt(sums_RS / num_rows).mean(axis=1)),
        "mae": (np.abs(error_NK), lambda sums_RS: sums_RS.mean(axis=1) / num_rows),
        "r2": (np.concatenate([centred_NK**2, centred_NK, error_NK**2], axis=1), r2),
    }


def _f1(sums_RS: Values, *, absent: float | None) -> Values:
    """Return the mean F1; a class that is neither there nor said counts as ``absent``, or not at all."""
    both_RK, given_RK, named_RK = np.split(sums_RS, 3, axis=1)
    total_RK = given_RK + named_RK
    f1_RK = 2.0 * both_RK / total_RK
    if absent is None:
        return _mean(f1_RK, total_RK > 0)
    scores_R: Values = np.where(total_RK > 0, f1_RK, absent).mean(axis=1)
    return scores_R


def _mean(values_RK: Values, is_known_RK: npt.NDArray[np.bool_]) -> Values:
    scores_R: Values = np.where(is_known_RK, values_RK, 0.0).sum(axis=1) / is_known_RK.sum(axis=1)
    return scores_R
