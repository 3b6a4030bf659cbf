"""How good outputs are, as scikit-learn has it. Every number returned is finite; what is not defined is left out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from trunkline_wire.fits import goodness
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, ORDINAL

from trunkline_worker.heads.model import class_probabilities
from trunkline_worker.training.ranking import ranked

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
    probabilities_BK = probabilities(task, outputs_BK)
    truth, said = truth_B.numpy(), probabilities_BK.argmax(dim=1).numpy()
    num_classes = probabilities_BK.shape[1]

    def cross_entropy() -> float:
        if task == CLASSIFICATION:  # from the logits: a probability of 0 still has a logarithm there
            return float(functional.cross_entropy(outputs_BK, truth_B))
        tiny = torch.finfo(torch.float64).tiny
        return float(-probabilities_BK.gather(1, truth_B[:, None]).clamp(min=tiny).log().mean())

    # Counted here: scikit-learn's checks of its arguments take longer than a small head's fit.
    given_K, said_K = (np.bincount(one, minlength=num_classes) for one in (truth, said))
    right_K = np.bincount(truth[truth == said], minlength=num_classes)
    either_K = given_K + said_K
    found: dict[str, Metric] = {
        "accuracy": lambda: float(right_K.sum() / len(truth)),
        "balanced_accuracy": lambda: float((right_K[given_K > 0] / given_K[given_K > 0]).mean()),
        "f1_macro": lambda: float((2 * right_K[either_K > 0] / either_K[either_K > 0]).mean()),
        "cross_entropy": cross_entropy,
    }
    if task == ORDINAL:
        from sklearn import metrics

        found["mae_steps"] = lambda: float(metrics.mean_absolute_error(truth, said))
        found["kappa"] = lambda: float(
            metrics.cohen_kappa_score(truth, said, labels=np.arange(num_classes), weights="quadratic")
        )
        return found
    if probabilities_BK.numel() <= _MOST_RANKED_CELLS:
        found |= _ranked(truth[:, None] == np.arange(num_classes), probabilities_BK.numpy())
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
        found |= _ranked(truth > 0, outputs_BK.numpy())
    return found


def _ranked(member_BK: npt.NDArray[np.bool_], scores_BK: Values) -> dict[str, Metric]:
    """Return what goes by the order of the scores: the mean over the columns that have rows of both kinds."""
    both_K = np.flatnonzero(member_BK.any(axis=0) & ~member_BK.all(axis=0))
    if not len(both_K):
        return {}
    values = cache(lambda: ranked(member_BK[:, both_K], scores_BK[:, both_K]))
    return {"roc_auc": lambda: values()[0], "average_precision": lambda: values()[1]}


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


def _quiet(metric: Metric) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes without rows, which the job's log need not tell
        return metric()
