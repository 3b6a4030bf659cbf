"""Checks of a dataset's labels: one class per row, several, or numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_CLASSES

# Shape suffix legend: N = rows, M = outputs, or classes where a row may be of several

_MAX_CLASS_NAME_LENGTH = 512


def checked_classes(
    num_rows: int,
    class_names: Sequence[str],
    class_indices: Sequence[int] | npt.NDArray[np.integer],
    *,
    has_targets: bool,
) -> npt.NDArray[np.uint32]:
    """Return the class of each row; none where the labels are numbers, or where a row may be of several classes.

    Raises:
        WireError: BAD_LABELS.
    """
    indices = np.asarray(class_indices, dtype=np.int64)
    one_class_each = bool(class_names) and not has_targets
    if indices.shape != (num_rows if one_class_each else 0,):
        given = f"{len(class_names)} classes, {num_rows} rows{' with targets' if has_targets else ''}"
        raise bad_labels(f"{given} and {indices.size} class indices do not fit")
    _check_names(class_names)
    if one_class_each and (indices.min() < 0 or indices.max() >= len(class_names)):
        wrong = int(np.flatnonzero((indices < 0) | (indices >= len(class_names)))[0])
        raise bad_labels(f"row {wrong} is of class {int(indices[wrong])}; there are {len(class_names)}")
    return indices.astype("<u4")


def checked_targets(
    num_rows: int, class_names: Sequence[str], targets_NM: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.float32] | None:
    """Return the numbers of each row: outputs, or 0 and 1 for each class; None where every row is of one class.

    Raises:
        WireError: BAD_LABELS or NOT_FINITE.
    """
    if targets_NM is None:
        if not class_names:
            raise bad_labels("no labels: classes or targets are needed")
        return None
    if targets_NM.ndim != 2 or targets_NM.shape[0] != num_rows or targets_NM.shape[1] == 0:
        raise bad_labels(f"targets of shape {targets_NM.shape} for {num_rows} rows; (rows, outputs) is needed")
    values_NM = np.ascontiguousarray(targets_NM, dtype="<f4")
    if not np.isfinite(values_NM).all():
        row = int(np.flatnonzero(~np.isfinite(values_NM).all(axis=1))[0])
        raise WireError(ErrorCode.NOT_FINITE, f"the target of row {row} is NaN or infinite")
    if class_names:
        _check_memberships(values_NM, class_names)
    return values_NM


def _check_memberships(values_NM: npt.NDArray[np.float32], class_names: Sequence[str]) -> None:
    if values_NM.shape[1] != len(class_names):
        raise bad_labels(f"{values_NM.shape[1]} columns for {len(class_names)} classes; one for each is needed")
    wrong = (values_NM != 0) & (values_NM != 1)
    if wrong.any():
        row, column = (int(one) for one in np.argwhere(wrong)[0])
        raise bad_labels(
            f"row {row} says {values_NM[row, column]:g} of class {class_names[column][:40]!r}; 1 where it is of the "
            "class and 0 where not are needed"
        )


def _check_names(class_names: Sequence[str]) -> None:
    if len(class_names) > MAX_CLASSES:
        raise bad_labels(f"{len(class_names)} classes; at most {MAX_CLASSES}")
    if len(set(class_names)) != len(class_names):
        raise bad_labels("two classes have the same name")
    for name in class_names:
        if not name or len(name) > _MAX_CLASS_NAME_LENGTH:
            raise bad_labels(f"class name {name[:40]!r}: 1 to {_MAX_CLASS_NAME_LENGTH} characters are needed")


def bad_labels(message: str) -> WireError:
    """Return the error of labels that nothing can be trained on."""
    return WireError(ErrorCode.BAD_LABELS, message)
