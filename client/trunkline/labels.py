"""Labels in whatever form the user has them: classes, or numbers to be predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from trunkline_wire.limits import MAX_CLASSES

from trunkline.errors import BadLabelsError

# Shape suffix legend: N = rows, M = outputs

_HINT = "Give one label for each image"


@dataclass(frozen=True)
class ClassLabels:
    """Classes. ``indices_N`` points into ``names``."""

    names: tuple[str, ...]
    indices_N: npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Targets:
    """Numbers to be predicted, float32."""

    values_NM: npt.NDArray[np.float32]


def encode_labels(labels: Any, num_rows: int) -> ClassLabels | Targets:
    """Check labels and bring them into the form that is sent.

    Integers, booleans and strings are classes; their names are the labels' text, in the order of the labels. Floats
    are numbers to be predicted: (N,) or (N, M).

    Raises:
        BadLabelsError: Labels are missing, of another number than the rows, of one class only, mixed, or not finite.
    """
    array = as_array(labels)
    if array.ndim == 0 or array.shape[0] != num_rows:
        count = 1 if array.ndim == 0 else array.shape[0]
        raise BadLabelsError(f"{count} labels for {num_rows} images", hint=_HINT)
    if array.dtype.kind == "f":
        return Targets(_targets(array))
    if array.ndim != 1:
        raise BadLabelsError(
            f"class labels must be (N,); got shape {array.shape}",
            hint="Numbers to be predicted must be floats: labels.astype('float32')",
        )
    return _classes(array)


def label_names(labels: Any) -> list[str]:
    """Return class labels as the text by which a model names them.

    Raises:
        BadLabelsError: A label is missing, or they are not classes.
    """
    array = as_array(labels)
    if array.ndim != 1 or array.dtype.kind == "f":
        raise BadLabelsError("class labels must be integers or strings, (N,)", hint=_HINT)
    return [_name(one) for one in _checked(array)]


def as_array(labels: Any) -> npt.NDArray[np.generic]:
    """Return labels as an array, text and mixed ones as objects."""
    if hasattr(labels, "to_numpy"):
        labels = labels.to_numpy()
    if isinstance(labels, np.ndarray):
        return labels
    rows = list(labels)
    if any(one is None or isinstance(one, (str, bytes)) for one in rows):
        array = np.empty(len(rows), dtype=object)
        array[:] = rows
        return array
    try:
        return np.asarray(rows)
    except ValueError as error:
        raise BadLabelsError("labels are lists of unequal length", hint=_HINT) from error


def _targets(array: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    if array.ndim > 2 or 0 in array.shape:
        raise BadLabelsError(f"numbers to be predicted must be (N,) or (N, M); got shape {array.shape}", hint=_HINT)
    values = np.ascontiguousarray(array, dtype=np.float32).reshape(array.shape[0], -1)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise BadLabelsError(
            f"{int((~finite).sum())} labels are missing or infinite, the first in row {int((~finite).argmax())}",
            hint="Leave these rows out",
        )
    return values


def _classes(array: npt.NDArray[np.generic]) -> ClassLabels:
    values = _checked(array)
    distinct = sorted(set(values))
    names = tuple(_name(one) for one in distinct)
    if len(distinct) < 2:
        raise BadLabelsError(
            f"all {len(values)} labels are {names[0]!r}: there is nothing to tell apart",
            hint="Give labels of at least two classes",
        )
    if len(distinct) > MAX_CLASSES:
        raise BadLabelsError(
            f"{len(distinct)} classes; at most {MAX_CLASSES} are accepted",
            hint="Numbers to be predicted must be floats: labels.astype('float32')",
        )
    index = {value: number for number, value in enumerate(distinct)}
    return ClassLabels(names, np.array([index[one] for one in values], dtype=np.uint32))


def _checked(array: npt.NDArray[np.generic]) -> list[Any]:
    """Return plain Python labels of one kind, none missing."""
    values: list[Any] = array.tolist()
    for row, value in enumerate(values):
        if value is None or value == "" or value != value or type(value).__name__ in ("NAType", "NaTType"):
            raise BadLabelsError(f"the label of row {row} is missing", hint="Leave this row out or give it a label")
        if not isinstance(value, (int, str)):
            raise BadLabelsError(
                f"the label of row {row} is a {type(value).__name__}; expected an integer or a string",
                hint="Numbers to be predicted must be a float array: np.asarray(labels, dtype='float32')",
            )
    if len({isinstance(one, str) for one in values}) > 1:
        raise BadLabelsError("some labels are text and some are numbers", hint="Make them all text")
    return values


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
