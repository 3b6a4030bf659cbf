"""How good outputs are. Every number returned is finite; one that is not defined is left out."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from trunkline_worker.heads.model import CLASSIFICATION

# Shape suffix legend: B = rows, K = outputs


def measure(task: str, outputs_BK: Tensor, truth: Tensor) -> dict[str, float]:
    """Return the metrics of a task.

    Args:
        task: ``classification`` or ``regression``.
        outputs_BK: Logits, or values.
        truth: Class indices, (B,), or values, (B, K).

    Returns:
        ``accuracy`` and ``cross_entropy`` (nats per row); or ``mse``, ``mae`` and, where the truth varies, ``r2``,
        each the plain mean over the outputs. Empty without rows.
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
    error_BK = outputs_BK - truth_BK
    metrics = {"mse": float(error_BK.square().mean()), "mae": float(error_BK.abs().mean())}
    spread_K = (truth_BK - truth_BK.mean(dim=0)).square().sum(dim=0)
    if bool((spread_K > 0).all()):
        metrics["r2"] = float((1 - error_BK.square().sum(dim=0) / spread_K).mean())
    return metrics
