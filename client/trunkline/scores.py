"""The scores of a model as people read them."""

from __future__ import annotations

from collections.abc import Mapping

_FIRST = (
    *("accuracy", "subset_accuracy", "r2", "balanced_accuracy", "f1_macro", "f1_micro", "roc_auc", "average_precision"),
    *("kappa", "mae_steps", "rmse", "mae", "pinball", "cross_entropy", "binary_cross_entropy", "ece"),
)
_TRAIN = "train_"
_ENDS = ("_low", "_high")


def held_out_scores(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return the scores on held-out rows, the usual ones first, each with its 95 % interval if it has one."""
    known = [name for name in _FIRST if name in metrics]
    return {name: score_text(metrics, name) for name in known}


def score_text(metrics: Mapping[str, float], name: str) -> str:
    """Return a score, and its 95 % interval if it has one."""
    text = f"{metrics[name]:.4f}"
    low, high = (metrics.get(f"{name}{end}") for end in _ENDS)
    return text if low is None or high is None else f"{text} ({low:.4f} to {high:.4f})"


def all_scores(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return everything that was measured: held-out scores first, then how training went, then the training rows'."""
    found = held_out_scores(metrics)
    rest = [name for name in sorted(metrics) if name not in found and not _is_end(metrics, name)]
    rest.sort(key=lambda name: name.startswith(_TRAIN))
    return found | {name: score_text(metrics, name) for name in rest}


def _is_end(metrics: Mapping[str, float], name: str) -> bool:
    return any(name.endswith(end) and name.removesuffix(end) in metrics for end in _ENDS)
