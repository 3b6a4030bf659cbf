"""How good outputs are. Every number returned is finite; one that is not defined is left out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL

# Shape suffix legend: B = rows, K = outputs


def measure(task: str, outputs_BK: Tensor, truth: Tensor) -> dict[str, float]:
    """Return the metrics of a task.

    Args:
        task: ``classification``, ``multi_label`` or ``regression``.
        outputs_BK: Logits, or values.
        truth: Class indices, (B,); 0 and 1, (B, K); or values, (B, K).

    Returns:
        ``accuracy`` and ``cross_entropy`` (nats per row); or ``subset_accuracy`` (fraction of rows whose labels are all
        right), ``f1_micro``, ``f1_macro`` and ``binary_cross_entropy`` (nats per label); or ``mse``, ``mae`` and, where
        the truth varies, ``r2``, each the plain mean over the outputs. Empty without rows.
    """
    if outputs_BK.shape[0] == 0:
        return {}
    outputs_BK = outputs_BK.double()
    if task == CLASSIFICATION:
        return {
            "accuracy": float((outputs_BK.argmax(dim=1) == truth).double().mean()),
            "cross_entropy": float(functional.cross_entropy(outputs_BK, truth)),
        }
    truth_BK = truth.double()
    if task == MULTI_LABEL:
        return _measure_labels(outputs_BK, truth_BK)
    error_BK = outputs_BK - truth_BK
    metrics = {"mse": float(error_BK.square().mean()), "mae": float(error_BK.abs().mean())}
    spread_K = (truth_BK - truth_BK.mean(dim=0)).square().sum(dim=0)
    if bool((spread_K > 0).all()):
        metrics["r2"] = float((1 - error_BK.square().sum(dim=0) / spread_K).mean())
    return metrics


def _measure_labels(outputs_BK: Tensor, truth_BK: Tensor) -> dict[str, float]:
    said_BK = (outputs_BK > 0).double()
    both_K = (said_BK * truth_BK).sum(dim=0)
    either_K = said_BK.sum(dim=0) + truth_BK.sum(dim=0)
    return {
        "subset_accuracy": float((said_BK == truth_BK).all(dim=1).double().mean()),
        # A label that is neither there nor said is got right.
        "f1_micro": float(2 * both_K.sum() / either_K.sum()) if bool(either_K.sum() > 0) else 1.0,
        "f1_macro": float(torch.where(either_K > 0, 2 * both_K / either_K.clamp(min=1), 1.0).mean()),
        "binary_cross_entropy": float(functional.binary_cross_entropy_with_logits(outputs_BK, truth_BK)),
    }
