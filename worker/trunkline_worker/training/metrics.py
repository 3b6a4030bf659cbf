"""How good outputs are, by scikit-learn. Every number returned is finite; one that is not defined is left out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from trunkline_wire.fits import goodness
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, ORDINAL

from trunkline_worker.heads.model import class_probabilities

# Shape suffix legend: B = rows, K = outputs

_MOST_RANKED_CELLS = 20_000_000
"""Curves over thresholds sort every column: beyond so many numbers they would take longer than the training."""

Values = npt.NDArray[np.float64]
Metric = Callable[[], float]


def measure(task: str, outputs_BK: Tensor, truth: Tensor, *, quantile: float = 0.0) -> dict[str, float]:
    """Return the metrics of a task.

    Args:
        task: One of ``heads.TASKS``.
        outputs_BK: Logits, or values; for classes in order the log-odds of lying above each threshold.
        truth: Class indices, (B,); 0 and 1, (B, K); or values, (B, K).
        quantile: Which quantile the values are meant to be. 0: they are means.

    Returns:
        For classes ``accuracy``, ``balanced_accuracy``, ``f1_macro``, ``cross_entropy`` (nats per row), ``roc_auc``
        (each class against the rest, the mean over the classes) and ``average_precision`` (likewise); in order
        ``mae_steps`` (mean distance in classes) and ``kappa`` (quadratic) in place of these two. For labels
        ``subset_accuracy`` (fraction of rows whose labels are all right), ``f1_micro``, ``f1_macro``,
        ``binary_cross_entropy`` (nats per label), ``roc_auc`` and ``average_precision``. For numbers ``mse``, ``rmse``,
        ``mae``, ``r2`` and, of a quantile, ``pinball``, each the plain mean over the outputs. Empty without rows.
    """
    found = {}
    for name, metric in _metrics(task, outputs_BK, truth, quantile).items():
        value = _quiet(metric)
        if math.isfinite(value):
            found[name] = value
    return found


def badness(task: str, name: str, outputs_BK: Tensor, truth: Tensor, *, quantile: float = 0.0) -> float:
    """Return one metric so that lower is better; infinite where it is not defined."""
    metric = _metrics(task, outputs_BK, truth, quantile).get(name)
    value = math.nan if metric is None else _quiet(metric)
    return -goodness(name, task, value) if math.isfinite(value) else math.inf


def probabilities(task: str, outputs_BK: Tensor) -> Tensor:
    """Return what outputs say of the classes, float64."""
    outputs_BK = outputs_BK.double()
    if task == MULTI_LABEL:
        return outputs_BK.sigmoid()
    return class_probabilities(outputs_BK) if task == ORDINAL else outputs_BK.softmax(dim=1)


def _metrics(task: str, outputs_BK: Tensor, truth: Tensor, quantile: float) -> Mapping[str, Metric]:
    """Return the metrics that there are, each still to be computed."""
    if outputs_BK.shape[0] == 0:
        return {}
    if task in (CLASSIFICATION, ORDINAL):
        return _of_classes(task, outputs_BK.double().cpu(), truth.cpu())
    if task == MULTI_LABEL:
        return _of_labels(outputs_BK.double().cpu(), truth.double().cpu())
    return _of_numbers(outputs_BK.double().cpu().numpy(), truth.double().cpu().numpy(), quantile)


def _of_classes(task: str, outputs_BK: Tensor, truth_B: Tensor) -> Mapping[str, Metric]:
    from sklearn import metrics

    probabilities_BK = probabilities(task, outputs_BK)
    truth, said = truth_B.numpy(), probabilities_BK.argmax(dim=1).numpy()
    num_classes = probabilities_BK.shape[1]

    def cross_entropy() -> float:
        if task == CLASSIFICATION:  # from the logits: a probability of 0 still has a logarithm there
            return float(functional.cross_entropy(outputs_BK, truth_B))
        tiny = torch.finfo(torch.float64).tiny
        return float(-probabilities_BK.gather(1, truth_B[:, None]).clamp(min=tiny).log().mean())

    found: dict[str, Metric] = {
        "accuracy": lambda: float(metrics.accuracy_score(truth, said)),
        "balanced_accuracy": lambda: float(metrics.balanced_accuracy_score(truth, said)),
        "f1_macro": lambda: float(metrics.f1_score(truth, said, average="macro", zero_division=0)),
        "cross_entropy": cross_entropy,
    }
    if task == ORDINAL:
        found["mae_steps"] = lambda: float(metrics.mean_absolute_error(truth, said))
        found["kappa"] = lambda: float(
            metrics.cohen_kappa_score(truth, said, labels=np.arange(num_classes), weights="quadratic")
        )
        return found
    if probabilities_BK.numel() <= _MOST_RANKED_CELLS:
        found |= _ranked(_onehot(truth, num_classes), probabilities_BK.numpy())
    return found


def _of_labels(outputs_BK: Tensor, truth_BK: Tensor) -> Mapping[str, Metric]:
    from sklearn import metrics

    said = (outputs_BK > 0).numpy().astype(np.int8)
    truth = (truth_BK > 0.5).numpy().astype(np.int8)

    def f1(average: str) -> float:
        # A label that is neither there nor said is got right.
        return float(metrics.f1_score(truth, said, average=average, zero_division=1))

    found: dict[str, Metric] = {
        "subset_accuracy": lambda: float(metrics.accuracy_score(truth, said)),
        "f1_micro": lambda: f1("micro"),
        "f1_macro": lambda: f1("macro"),
        "binary_cross_entropy": lambda: float(functional.binary_cross_entropy_with_logits(outputs_BK, truth_BK)),
    }
    if outputs_BK.numel() <= _MOST_RANKED_CELLS:
        found |= _ranked(truth, outputs_BK.numpy())
    return found


def _ranked(member_BK: npt.NDArray[np.int8], scores_BK: Values) -> dict[str, Metric]:
    """Return what goes by the order of the scores: the mean over the columns that have rows of both kinds."""
    from sklearn import metrics

    both_K = np.flatnonzero(member_BK.any(axis=0) & ~member_BK.all(axis=0))
    if not len(both_K):
        return {}
    return {
        "roc_auc": lambda: float(metrics.roc_auc_score(member_BK[:, both_K], scores_BK[:, both_K], average="macro")),
        "average_precision": lambda: float(
            metrics.average_precision_score(member_BK[:, both_K], scores_BK[:, both_K], average="macro")
        ),
    }


def _of_numbers(values_BK: Values, truth_BK: Values, quantile: float) -> Mapping[str, Metric]:
    from sklearn import metrics

    found: dict[str, Metric] = {
        "mse": lambda: float(metrics.mean_squared_error(truth_BK, values_BK)),
        "rmse": lambda: float(metrics.root_mean_squared_error(truth_BK, values_BK)),
        "mae": lambda: float(metrics.mean_absolute_error(truth_BK, values_BK)),
    }
    if bool((truth_BK != truth_BK[:1]).any(axis=0).all()):
        found["r2"] = lambda: float(metrics.r2_score(truth_BK, values_BK))
    if quantile:
        found["pinball"] = lambda: float(metrics.mean_pinball_loss(truth_BK, values_BK, alpha=quantile))
    return found


def _onehot(truth: npt.NDArray[np.int64], num_classes: int) -> npt.NDArray[np.int8]:
    member_BK = np.zeros((len(truth), num_classes), dtype=np.int8)
    member_BK[np.arange(len(truth)), truth] = 1
    return member_BK


def _quiet(metric: Metric) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes without rows, which the job's log need not tell
        return metric()
