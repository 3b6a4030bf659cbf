"""Scores as a page and a card name and write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from trunkline._report import text
from trunkline.scores import held_out_scores

SCORE_NAMES = {
    "subset_accuracy": "all classes of a row right",
    "r2": "R²",
    "balanced_accuracy": "balanced accuracy",
    "f1_macro": "F1, mean over classes",
    "f1_micro": "F1, over all labels",
    "roc_auc": "area under the ROC curve",
    "average_precision": "average precision",
    "kappa": "quadratic kappa",
    "mae_steps": "mean distance in classes",
    "rmse": "root mean squared error",
    "mse": "mean squared error",
    "mae": "mean absolute error",
    "pinball": "pinball loss",
    "cross_entropy": "cross-entropy, nats a row",
    "binary_cross_entropy": "cross-entropy, nats a label",
    "ece": "calibration error",
    "ece_uncalibrated": "calibration error before calibration",
}
"""What scores are called that have other names in the metrics."""


def score_name(name: str) -> str:
    """Return what a score is called."""
    return SCORE_NAMES.get(name, name)


def in_order(names: Iterable[str]) -> list[str]:
    """Return scores, the usual ones first."""
    given = sorted(names)
    usual = list(held_out_scores(dict.fromkeys(given, 0.0)))
    return [*usual, *(one for one in given if one not in usual)]


def interval(metrics: Mapping[str, float], name: str) -> str:
    """Return the 95 % interval of a score; empty if there is none.

    One without any width comes from rows that are all alike, all right for instance, drawn again and again. It says
    nothing of other rows.
    """
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return "" if low is None or high is None or low == high else f"{text.score(low)} to {text.score(high)}"
