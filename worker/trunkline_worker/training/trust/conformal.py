"""How badly a head did on held-out rows, few enough scores to travel with it. ``trunkline_wire.conformal`` uses them.

Source: Sadinle, Lei and Wasserman 2019, "Least Ambiguous Set-Valued Classifiers with Bounded Error Levels", for
classes; Lei et al. 2018, "Distribution-Free Predictive Inference for Regression", for numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, invalid

from trunkline_worker.training.trust.checks import check_outputs

# Shape suffix legend: N = rows, K = outputs

MAX_SCORES = 1000
"""Scores that are kept. With more rows each stands for several, which costs at most a thousandth of coverage."""


def nonconformity(task: str, outputs_NK: Tensor, truth: Tensor, scale_K: Tensor | None = None) -> Tensor:
    """Return how badly each row was predicted, (N,), float64.

    Args:
        task: ``classification``: one minus the true class's probability. ``regression``: the largest error over the
            outputs, each in units of its scale, so that an interval holds for all outputs of a row at once.
            ``multi_label``: not offered, so there are none.
        outputs_NK: Logits, already divided by the temperature; or values. Of rows that the head was not trained on.
        truth: Class indices, (N,), or values, (N, K).
        scale_K: Positive, one per output of a regression; None: 1. What it is matters for the balance between outputs
            only, but it must not come from these rows: the targets' spread over the training rows will do.

    Raises:
        WireError: INVALID_ARGUMENT, SHAPE_MISMATCH, NOT_FINITE or BAD_LABELS.
    """
    check_outputs(task, outputs_NK, truth)
    if task == MULTI_LABEL:
        return outputs_NK.new_zeros(0, dtype=torch.float64)
    if task == CLASSIFICATION:
        log_NK = outputs_NK.double().log_softmax(dim=1)
        return 0.0 - torch.expm1(log_NK.gather(1, truth[:, None].long()).squeeze(1))
    error_NK = (outputs_NK.double() - truth.double()).abs()
    if scale_K is not None:
        if scale_K.shape != error_NK.shape[1:]:
            raise WireError(
                ErrorCode.SHAPE_MISMATCH, f"{error_NK.shape[1]} outputs but scales of shape {tuple(scale_K.shape)}"
            )
        if not bool((torch.isfinite(scale_K) & (scale_K > 0)).all()):
            raise invalid("scales are positive and finite; use 1 for an output that does not vary")
        error_NK = error_NK / scale_K.double()
    return error_NK.amax(dim=1)


def calibration_scores(
    task: str, outputs_NK: Tensor, truth: Tensor, scale_K: Tensor | None = None
) -> tuple[tuple[float, ...], int]:
    """Return scores, ascending, and the number of rows they stand for: what ``wire.conformal.threshold`` takes.

    Args:
        task: As for ``nonconformity``.
        outputs_NK: As for ``nonconformity``.
        truth: As for ``nonconformity``.
        scale_K: As for ``nonconformity``.

    Raises:
        WireError: As ``nonconformity``.
    """
    scores_N = np.sort(nonconformity(task, outputs_NK, truth, scale_K).cpu().numpy())
    num_rows = len(scores_N)
    if num_rows > MAX_SCORES:
        # Of rows that one score stands for it is the worst, so a threshold can only rise.
        scores_N = scores_N[-(-np.arange(1, MAX_SCORES + 1) * num_rows // MAX_SCORES) - 1]
    return tuple(scores_N.tolist()), num_rows
