"""Probabilities that mean what they say: one temperature for a head, and how far off its probabilities are.

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", for both; Nixon et al. 2019, "Measuring Calibration
in Deep Learning", for bins of equal mass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import CLASSIFICATION, REGRESSION, invalid

from trunkline_worker.training.trust.checks import check_outputs, check_probabilities

# Shape suffix legend: N = rows, K = outputs, S = statements that are true or not

MIN_ROWS = 10
"""With fewer rows the temperature is left at 1."""

LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures are kept between these."""

_DOUBT = 1.0
"""Rows' worth of doubt that the temperature is anything but 1. Without it, rows that are all right would ask for
endless confidence, however few they are; beside a hundred rows that are not all right, it is hardly felt."""

_MAX_STEPS = 100

_CHUNK_CELLS = 2**20

Slopes = Callable[[float], tuple[float, float]]
"""From what outputs are multiplied by to the loss's slope and curvature in it."""


def fit_temperature(task: str, outputs_NK: Tensor, truth: Tensor) -> float:
    """Return what to divide logits by, so that their probabilities have the least cross-entropy.

    The sharpness ``s``, one over the temperature, has the penalty ``s - log(s)`` on the sum of the rows' losses. That
    is least at 1, and convex as the losses are, so there is a single optimum.

    Args:
        task: ``classification`` or ``multi_label``; for ``regression`` the answer is 1.
        outputs_NK: Logits of rows that the head was not trained on.
        truth: Class indices, (N,), or 0 and 1, (N, K).

    Raises:
        WireError: INVALID_ARGUMENT, SHAPE_MISMATCH, NOT_FINITE or BAD_LABELS.
    """
    check_outputs(task, outputs_NK, truth)
    if task == REGRESSION or outputs_NK.shape[0] < MIN_ROWS:
        return 1.0
    slopes_of = _softmax_slopes if task == CLASSIFICATION else _sigmoid_slopes
    size = max(1, _CHUNK_CELLS // outputs_NK.shape[1])
    parts = list(zip(outputs_NK.split(size), truth.split(size), strict=True))

    def slopes(sharpness: float) -> tuple[float, float]:
        found = [slopes_of(part_NK.double(), part_truth, sharpness) for part_NK, part_truth in parts]
        return sum(slope for slope, _ in found), sum(curvature for _, curvature in found)

    return min(max(1.0 / _best_sharpness(slopes), LOWEST), HIGHEST)


def _best_sharpness(slopes: Slopes) -> float:
    """Newton's steps. Where one would leave the bracket its end is tried, then it is halved on a log scale."""
    low, high, sharpness = 1.0 / HIGHEST, 1.0 / LOWEST, 1.0
    untried = {low, high}
    for _ in range(_MAX_STEPS):
        slope, curvature = slopes(sharpness)
        slope += _DOUBT * (1.0 - 1.0 / sharpness)
        curvature += _DOUBT / sharpness**2
        low, high = (low, sharpness) if slope > 0 else (sharpness, high)
        before, sharpness = sharpness, sharpness - slope / curvature
        if not low <= sharpness <= high:
            end = low if sharpness < low else high
            sharpness = end if end in untried else math.sqrt(low * high)
            untried.discard(end)
        if abs(sharpness - before) <= 1e-9 * before:
            break
    return sharpness


def _softmax_slopes(outputs_NK: Tensor, truth_N: Tensor, sharpness: float) -> tuple[float, float]:
    above_NK = outputs_NK - outputs_NK.gather(1, truth_N[:, None].long())
    probability_NK = (sharpness * above_NK).softmax(dim=1)
    mean_N1 = (probability_NK * above_NK).sum(dim=1, keepdim=True)
    return float(mean_N1.sum()), float((probability_NK * (above_NK - mean_N1).square()).sum())


def _sigmoid_slopes(outputs_NK: Tensor, truth_NK: Tensor, sharpness: float) -> tuple[float, float]:
    probability_NK = (sharpness * outputs_NK).sigmoid()
    slope = (outputs_NK * (probability_NK - truth_NK.double())).sum()
    return float(slope), float((outputs_NK.square() * probability_NK * (1 - probability_NK)).sum())


@dataclass(frozen=True)
class Bin:
    """Statements of about the same confidence.

    Attributes:
        confidence: Mean probability that was said.
        accuracy: Fraction that came true.
        count: How many they are.
    """

    confidence: float
    accuracy: float
    count: int


def reliability(probabilities_NK: Tensor, truth: Tensor, num_bins: int = 15) -> list[Bin]:
    """Return confidence and accuracy in bins of equal mass, least confident first: what a reliability diagram shows.

    With classes, a statement is that the likeliest one is right, one a row. With labels, it is that a row has a label,
    so there are K a row, and the accuracy is the fraction that have it.

    Args:
        probabilities_NK: Of rows that the head was not trained on.
        truth: Class indices, (N,), or 0 and 1, (N, K).
        num_bins: At most so many; fewer where there are fewer statements.

    Raises:
        WireError: INVALID_ARGUMENT, SHAPE_MISMATCH, NOT_FINITE or BAD_LABELS.
    """
    if num_bins < 1:
        raise invalid(f"a diagram has at least one bin; got {num_bins}")
    check_probabilities(probabilities_NK, truth)
    confidence_S, true_S = _statements(probabilities_NK.double(), truth)
    if not len(confidence_S):
        return []
    # Statements of one confidence share what came of them: otherwise the order of the rows would decide who is in which
    # bin, and saturated probabilities are often equal.
    _, level_S, counts = np.unique(confidence_S, return_inverse=True, return_counts=True)
    share_S = (np.bincount(level_S, weights=true_S) / counts)[level_S]
    parts = np.array_split(np.argsort(confidence_S, kind="stable"), min(num_bins, len(confidence_S)))
    return [Bin(float(confidence_S[part].mean()), float(share_S[part].mean()), len(part)) for part in parts]


def expected_calibration_error(probabilities_NK: Tensor, truth: Tensor, num_bins: int = 15) -> float:
    """Return how far confidence and accuracy are apart, the mean over the statements: see ``reliability``.

    With few rows it is above 0 even where the probabilities are right, since each bin's accuracy is an estimate.

    Raises:
        WireError: As ``reliability``; EMPTY_BATCH where there are no rows.
    """
    bins = reliability(probabilities_NK, truth, num_bins)
    if not bins:
        raise WireError(ErrorCode.EMPTY_BATCH, "calibration needs rows that the head was not trained on; hold some out")
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.confidence - one.accuracy) for one in bins) / total


def _statements(probabilities_NK: Tensor, truth: Tensor) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return each statement's probability and whether it came true."""
    if truth.ndim == 1:
        confidence_S, said_S = probabilities_NK.max(dim=1)
        true_S = said_S == truth
    else:
        confidence_S, true_S = probabilities_NK.flatten(), truth.flatten()
    return confidence_S.cpu().numpy(), true_S.to(torch.float64).cpu().numpy()
