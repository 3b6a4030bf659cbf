"""What is counted and measured for a report, of answers on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Shape suffix legend: N = rows, K = classes or outputs, S = statements that are true or not

Indices = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

NUM_BINS = 15
"""Bins of a reliability diagram."""

_SURE = 1.959964
"""Standard deviations to either side of the middle that hold 95 %."""


@dataclass(frozen=True)
class ClassFigures:
    """How well one class is told.

    Attributes:
        index: Its place among the classes.
        num_rows: Rows that are of it.
        num_said: Rows that were said to be.
        num_right: Rows that are and were said to be.
        confused_with: The class that its rows were most often taken for; None if for no other.
        num_confused: How often.
        average_precision: Of its probability; None where it is not defined or not asked for.
    """

    index: int
    num_rows: int
    num_said: int
    num_right: int
    confused_with: int | None = None
    num_confused: int = 0
    average_precision: float | None = None

    @property
    def precision(self) -> float:
        """Share of the rows said to be of it that are; 0 where there are none."""
        return self.num_right / self.num_said if self.num_said else 0.0

    @property
    def recall(self) -> float:
        """Share of its rows that were found; 0 where there are none."""
        return self.num_right / self.num_rows if self.num_rows else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of the two."""
        total = self.num_rows + self.num_said
        return 2 * self.num_right / total if total else 0.0


@dataclass(frozen=True)
class Confusion:
    """How often rows of one class were taken for another one."""

    true: int
    said: int
    count: int


@dataclass(frozen=True)
class Bin:
    """Statements of about the same confidence.

    Attributes:
        confidence: Mean probability that was said.
        accuracy: Fraction that came true.
        count: How many they are.
        low: Where the 95 % interval of the accuracy begins.
        high: Where it ends.
    """

    confidence: float
    accuracy: float
    count: int
    low: float
    high: float


def confusions(classes_N: Indices, said_N: Indices, num_classes: int) -> list[Confusion]:
    """Return the pairs of different classes that were confused, the most frequent first."""
    wrong = classes_N != said_N
    pairs, counts = np.unique(classes_N[wrong] * num_classes + said_N[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [Confusion(*divmod(int(pairs[at]), num_classes), int(counts[at])) for at in order]


def confusion_matrix(classes_N: Indices, said_N: Indices, num_classes: int) -> Indices:
    """Return the counts of rows, (K, K), by true class (down) and the one said (across)."""
    counts_KK = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts_KK, (classes_N, said_N), 1)
    return counts_KK


def class_figures(classes_N: Indices, said_N: Indices, num_classes: int) -> list[ClassFigures]:
    """Return the figures of each class, where each row is of one."""
    rows_K = np.bincount(classes_N, minlength=num_classes)
    said_K = np.bincount(said_N, minlength=num_classes)
    right_K = np.bincount(classes_N[classes_N == said_N], minlength=num_classes)
    worst: dict[int, Confusion] = {}
    for one in confusions(classes_N, said_N, num_classes):
        worst.setdefault(one.true, one)
    found = []
    for index in range(num_classes):
        other = worst.get(index)
        confused_with, num_confused = (None, 0) if other is None else (other.said, other.count)
        counts = (int(rows_K[index]), int(said_K[index]), int(right_K[index]))
        found.append(ClassFigures(index, *counts, confused_with, num_confused))
    return found


def label_figures(truth_NK: Flags, answers_NK: Values) -> list[ClassFigures]:
    """Return the figures of each class, where a row may be of several."""
    said_NK = answers_NK > 0.5
    rows_K, said_K, right_K = truth_NK.sum(axis=0), said_NK.sum(axis=0), (truth_NK & said_NK).sum(axis=0)
    return [
        ClassFigures(
            index,
            int(rows_K[index]),
            int(said_K[index]),
            int(right_K[index]),
            average_precision=average_precision(truth_NK[:, index], answers_NK[:, index]),
        )
        for index in range(truth_NK.shape[1])
    ]


def average_precision(truth_N: Flags, scores_N: Values) -> float | None:
    """Return the precision at each threshold, weighted by how much more is found there; None without rows to find."""
    num_true = int(truth_N.sum())
    if not num_true:
        return None
    order = np.argsort(-scores_N, kind="stable")
    found_N = np.cumsum(truth_N[order])
    last_of_level = np.append(np.flatnonzero(np.diff(scores_N[order])), len(order) - 1)
    found = found_N[last_of_level]
    gained = np.diff(found, prepend=0)
    return float((gained * found / (last_of_level + 1)).sum() / num_true)


def reliability(confidence_S: Values, true_S: Flags, num_bins: int = NUM_BINS) -> list[Bin]:
    """Return confidence and accuracy in bins of equal mass, the least confident first; as the worker's own.

    Statements of one confidence share what came of them: otherwise the order of the rows would decide who is in which
    bin.
    """
    if not len(confidence_S):
        return []
    _, level_S, counts = np.unique(confidence_S, return_inverse=True, return_counts=True)
    share_S = (np.bincount(level_S, weights=true_S.astype(np.float64)) / counts)[level_S]
    parts = np.array_split(np.argsort(confidence_S, kind="stable"), min(num_bins, len(confidence_S)))
    return [_bin(confidence_S[part], share_S[part]) for part in parts]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the mean distance of confidence and accuracy over the statements."""
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.confidence - one.accuracy) for one in bins) / total


def evenly(count: int, most: int) -> list[int]:
    """Return places among ``count``, of many ``most`` that are evenly spread."""
    if count <= most:
        return list(range(count))
    return [int(one) for one in np.unique(np.linspace(0, count - 1, most).round())]


def _bin(confidence_S: Values, share_S: Values) -> Bin:
    count, accuracy = len(confidence_S), float(share_S.mean())
    return Bin(float(confidence_S.mean()), accuracy, count, *_share_interval(accuracy, count))


def _share_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share. Source: Wilson 1927, as in Brown, Cai and DasGupta 2001, equation 4."""
    squared = _SURE**2
    middle = (share + squared / (2 * count)) / (1 + squared / count)
    reach = _SURE / (1 + squared / count) * math.sqrt(share * (1 - share) / count + squared / (4 * count**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)
