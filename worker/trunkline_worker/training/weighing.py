"""How much each row counts, from how much its class does."""

from __future__ import annotations

import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import LossConfig

# Shape suffix legend: N = rows, K = classes


def class_weights(loss: LossConfig, classes_N: Tensor, num_classes: int) -> Tensor | None:
    """Return the weight of each class, (K,), float64, or None where all count alike.

    Balanced weights are N / (K times the rows of the class), as scikit-learn's.

    Raises:
        WireError: BAD_LABELS where no row would count.
    """
    if loss.balanced:
        counts_K = torch.bincount(classes_N, minlength=num_classes).double()
        return len(classes_N) / (num_classes * counts_K.clamp(min=1.0))
    if not loss.class_weights:
        return None
    weights_K = torch.tensor(loss.class_weights, dtype=torch.float64, device=classes_N.device)
    if not bool(weights_K[classes_N].any()):
        raise WireError(
            ErrorCode.BAD_LABELS, "every row is of a class of weight 0: nothing would be learnt; raise a weight"
        )
    return weights_K


def row_weights(loss: LossConfig, classes_N: Tensor, num_classes: int) -> Tensor | None:
    """Return the weight of each row, (N,), float64, or None where all count alike."""
    weights_K = class_weights(loss, classes_N, num_classes)
    return None if weights_K is None else weights_K[classes_N]


def label_weights(loss: LossConfig, truth_NK: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return how much a label's presence counts, (K,), and its absence; None where all count alike.

    Balanced, both sides of a label count the same in all, and as much as its rows did.
    """
    num_rows = truth_NK.shape[0]
    if loss.balanced:
        positive_K = truth_NK.double().sum(dim=0)
        sides = (positive_K.clamp(min=1.0), (num_rows - positive_K).clamp(min=1.0))
        return num_rows / (2 * sides[0]), num_rows / (2 * sides[1])
    if not loss.class_weights:
        return None
    weights_K = torch.tensor(loss.class_weights, dtype=torch.float64, device=truth_NK.device)
    return weights_K, torch.ones_like(weights_K)
