"""What every module here asks of outputs and truth before it computes anything."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.finite import NAN_OR_INFINITY, not_finite
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, REGRESSION, TASKS, invalid

from trunkline_worker.training.split import Indices

# Shape suffix legend: N = rows, K = outputs


def check_finite(values: Tensor, what: str) -> None:
    """Check values, rows first.

    Raises:
        WireError: NOT_FINITE, naming the first bad row.
    """
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        advice = "Leave those rows out, or compute them again"
        raise not_finite((~finite).cpu().numpy(), f"{NAN_OR_INFINITY} in the {what}", advice)


def check_outputs(task: str, outputs_NK: Tensor, truth: Tensor) -> None:
    """Check that outputs and truth are finite and belong to each other and to the task.

    Raises:
        WireError: INVALID_ARGUMENT, SHAPE_MISMATCH, NOT_FINITE or BAD_LABELS.
    """
    if task not in TASKS:
        raise invalid(f"task {task[:40]!r} is not known; one of {', '.join(TASKS)} is needed")
    if outputs_NK.ndim != 2 or outputs_NK.shape[1] == 0:
        raise _shapes(f"outputs are (rows, outputs); got {tuple(outputs_NK.shape)}")
    check_finite(outputs_NK, "outputs")
    if task == CLASSIFICATION:
        check_classes(truth, *outputs_NK.shape)
        return
    if truth.shape != outputs_NK.shape:
        raise _shapes(
            f"outputs are {tuple(outputs_NK.shape)} but the truth is {tuple(truth.shape)}; give one value per output"
        )
    if task == MULTI_LABEL:
        check_zero_or_one(truth)
    elif task == REGRESSION:
        check_finite(truth, "targets")


def check_probabilities(probabilities_NK: Tensor, truth: Tensor) -> None:
    """Check probabilities of classes, where the truth is (N,), or of labels, where it is (N, K).

    Raises:
        WireError: INVALID_ARGUMENT, SHAPE_MISMATCH, NOT_FINITE or BAD_LABELS.
    """
    check_outputs(CLASSIFICATION if truth.ndim == 1 else MULTI_LABEL, probabilities_NK, truth)
    if bool(((probabilities_NK < 0) | (probabilities_NK > 1 + 1e-6)).any()):
        raise invalid("probabilities lie between 0 and 1; turn logits into probabilities first")


def check_classes(truth: Tensor, num_rows: int, num_classes: int) -> None:
    """Check class indices.

    Raises:
        WireError: SHAPE_MISMATCH or BAD_LABELS.
    """
    if truth.shape != (num_rows,):
        raise _shapes(f"{num_rows} rows but classes of shape {tuple(truth.shape)}; give one class per row")
    if truth.is_floating_point() or truth.is_complex() or truth.dtype == torch.bool:
        raise WireError(ErrorCode.BAD_LABELS, f"class indices are whole numbers; got {truth.dtype}")
    outside_N = (truth < 0) | (truth >= num_classes)
    if bool(outside_N.any()):
        row = int(outside_N.int().argmax())
        raise WireError(
            ErrorCode.BAD_LABELS, f"row {row} is of class {int(truth[row])}; there are classes 0 to {num_classes - 1}"
        )


def check_zero_or_one(truth_NK: Tensor) -> None:
    """Check labels of which a row may have several.

    Raises:
        WireError: BAD_LABELS.
    """
    odd_N = ((truth_NK != 0) & (truth_NK != 1)).any(dim=1)
    if bool(odd_N.any()):
        row = int(odd_N.int().argmax())
        raise WireError(
            ErrorCode.BAD_LABELS, f"row {row} has a label that is neither 0 nor 1; use 1 where it applies, else 0"
        )


def check_columns(x_ND: Tensor, classes_N: Indices | None, num_classes: int | None = None) -> None:
    """Check rows of an embedding and their classes.

    Args:
        x_ND: Rows.
        classes_N: Their classes, if they have any.
        num_classes: How many there may be; None: any number.

    Raises:
        WireError: SHAPE_MISMATCH, EMPTY_BATCH, NOT_FINITE or BAD_LABELS.
    """
    if x_ND.ndim != 2 or x_ND.shape[1] == 0:
        raise _shapes(f"an embedding is (rows, columns); got {tuple(x_ND.shape)}")
    if x_ND.shape[0] == 0:
        raise WireError(ErrorCode.EMPTY_BATCH, "there are no rows to fit to; give at least one")
    check_finite(x_ND, "embedding")
    if classes_N is not None:
        check_classes(as_tensor(classes_N), x_ND.shape[0], 2**62 if num_classes is None else num_classes)


def _shapes(message: str) -> WireError:
    return WireError(ErrorCode.SHAPE_MISMATCH, message)


def as_tensor(index_N: Indices) -> Tensor:
    """Return a copy: torch takes no array that may only be read."""
    return torch.from_numpy(np.array(index_N))
