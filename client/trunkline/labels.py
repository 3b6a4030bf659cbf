"""Labels in whatever form the user has them: one class for each row, several, or numbers to be predicted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from trunkline_wire.limits import MAX_CLASSES, MAX_PAYLOAD_BYTES

from trunkline.errors import BadLabelsError, PayloadTooLargeError

# Shape suffix legend: N = rows, M = outputs, K = classes

MAX_CLASS_NAME = 512
"""Longest name of a class, in characters."""

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


@dataclass(frozen=True)
class MultiLabels:
    """Classes of which a row may have any number. ``values_NK`` is 1 where a row is of a class, else 0; uint8."""

    names: tuple[str, ...]
    values_NK: npt.NDArray[np.uint8]


Labels = ClassLabels | Targets | MultiLabels


def repeated(labels: Labels, times: int) -> Labels:
    """Return labels with each row's several times, one after another.

    Raises:
        PayloadTooLargeError: They do not fit a message then.
    """
    if times == 1:
        return labels
    if isinstance(labels, ClassLabels):
        return ClassLabels(labels.names, labels.indices_N.repeat(times))
    if isinstance(labels, Targets):
        return Targets(labels.values_NM.repeat(times, axis=0))
    _check_size(labels.values_NK.size * times)
    return MultiLabels(labels.names, labels.values_NK.repeat(times, axis=0))


def encode_labels(labels: Any, num_rows: int) -> Labels:
    """Check labels and bring them into the form that is sent.

    Integers, booleans and strings are classes; their names are the labels' text, in the order of the labels. A list,
    tuple or set of them for each row, or booleans of (N, K), says that a row may be of several classes; the columns of
    a table name them, else their numbers. Floats are numbers to be predicted: (N,) or (N, M).

    Raises:
        BadLabelsError: Labels are missing, of another number than the rows, of one class only, mixed, or not finite.
        PayloadTooLargeError: They do not fit a message.
    """
    if isinstance(labels, Iterator):
        labels = list(labels)
    found = _multi(labels, num_rows)
    if found is not None:
        return found
    array = as_array(labels)
    _check_number(1 if array.ndim == 0 else array.shape[0], num_rows)
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
    return [_name(one) for one in _of_one_kind(_checked(array.tolist()))]


def encode_memberships(labels: Any, num_rows: int, class_names: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Return for each row and class that a model knows whether the row is of it: 1 or 0.

    Args:
        labels: As in ``encode_labels``. Booleans without names are of the classes in their order.
        num_rows: How many there must be.
        class_names: The classes that the model knows.

    Raises:
        BadLabelsError: They are not labels of several classes a row, of another number, or of unknown classes.
    """
    matrix = _flags(labels)
    if matrix is not None and not _is_named(labels):
        if matrix.shape != (num_rows, len(class_names)):
            raise BadLabelsError(
                f"booleans of shape {matrix.shape}; ({num_rows}, {len(class_names)}) is needed",
                hint=f"Give one column for each of {', '.join(class_names[:10])}",
            )
        return matrix.astype(np.uint8)
    found = _multi(labels, num_rows, empty=True)
    if found is None:
        raise BadLabelsError(
            "the model tells for each class whether a row is of it; one label a row does not say that",
            hint="Give a list of classes for each row, or booleans of (rows, classes)",
        )
    known = {name: index for index, name in enumerate(class_names)}
    unknown = [name for name in found.names if name not in known]
    if unknown:
        raise BadLabelsError(
            f"the model knows no class {', '.join(map(repr, unknown[:5]))}",
            hint=f"It knows {', '.join(class_names[:10])}",
        )
    values_NK = np.zeros((num_rows, len(class_names)), np.uint8)
    values_NK[:, [known[name] for name in found.names]] = found.values_NK
    return values_NK


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


def _multi(labels: Any, num_rows: int, *, empty: bool = False) -> MultiLabels | None:
    """Return labels of several classes a row, None if they are of another kind. ``empty``: no row needs a class."""
    matrix_NK = _flags(labels)
    if matrix_NK is not None:
        names = [str(one) for one in labels.columns] if _is_named(labels) else list(map(str, range(matrix_NK.shape[1])))
        _check_number(len(matrix_NK), num_rows)
        _check_names(names)
    else:
        rows = _collections(labels)
        if rows is None:
            return None
        _check_number(len(rows), num_rows)
        values = [_checked(row, f"row {number}") for number, row in enumerate(rows)]
        distinct = sorted(_of_one_kind({one for row in values for one in row}))
        names = [_name(one) for one in distinct]
        _check_names(names)
        _check_size(num_rows * len(names))
        index = {value: number for number, value in enumerate(distinct)}
        matrix_NK = np.zeros((num_rows, len(names)), bool)
        for number, row in enumerate(values):
            matrix_NK[number, [index[one] for one in row]] = True
    if not empty and not matrix_NK.any():
        raise BadLabelsError("no row is of any class: there is nothing to learn", hint="Give at least one row a class")
    _check_size(matrix_NK.size)
    return MultiLabels(tuple(names), matrix_NK.astype(np.uint8))


def _flags(labels: Any) -> npt.NDArray[np.bool_] | None:
    """Return booleans of (N, K): an array, a table or lists of them; None if it is something else."""
    if isinstance(labels, (list, tuple)):
        rows = _collections(labels)
        if not rows or not all(len(row) and all(isinstance(one, (bool, np.bool_)) for one in row) for row in rows):
            return None
    array = as_array(labels)
    return array.astype(bool) if array.ndim == 2 and array.dtype == bool and array.shape[1] else None


def _is_named(labels: Any) -> bool:
    return hasattr(labels, "columns")


def _collections(labels: Any) -> list[list[Any]] | None:
    """Return what stands in each row, None unless it is a list, tuple, set or array of classes in every one."""
    if isinstance(labels, np.ndarray) and labels.dtype != object:
        return None
    if hasattr(labels, "columns") or not isinstance(labels, Iterable):
        return None
    rows = list(labels)
    if not rows or not all(isinstance(row, (list, tuple, set, frozenset, np.ndarray)) for row in rows):
        return None
    plain = [row.tolist() if isinstance(row, np.ndarray) else list(row) for row in rows]
    numbers = any(isinstance(one, (float, np.floating, list)) for row in plain for one in row)
    return None if numbers else plain


def _check_number(count: int, num_rows: int) -> None:
    if count != num_rows:
        raise BadLabelsError(f"{count} labels for {num_rows} images", hint=_HINT)


def _check_names(names: Sequence[str]) -> None:
    if len(names) > MAX_CLASSES:
        raise BadLabelsError(f"{len(names)} classes; at most {MAX_CLASSES} are accepted")
    if len(set(names)) != len(names) or not all(names):
        raise BadLabelsError("two classes have the same name, or one has none", hint="Name the columns")
    longest = max(names, key=len, default="")
    if len(longest) > MAX_CLASS_NAME:
        raise BadLabelsError(
            f"the name of a class has {len(longest)} characters; at most {MAX_CLASS_NAME} are accepted"
        )


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_PAYLOAD_BYTES:
        raise PayloadTooLargeError(
            f"the labels have {num_bytes} bytes, one for each row and class; at most {MAX_PAYLOAD_BYTES} fit a message",
            hint="Make several datasets, or leave rare classes out",
        )


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
    if array.dtype.kind in "iu":  # before there is an object for each: whole numbers may be meant as numbers
        _check_count(len(np.unique(array)))
    values = _of_one_kind(_checked(array.tolist()))
    found = set(values)
    _check_count(len(found))
    distinct = sorted(found)
    names = tuple(_name(one) for one in distinct)
    if len(distinct) < 2:
        raise BadLabelsError(
            f"all {len(values)} labels are {names[0]!r}: there is nothing to tell apart",
            hint="Give labels of at least two classes",
        )
    index = {value: number for number, value in enumerate(distinct)}
    return ClassLabels(names, np.array([index[one] for one in values], dtype=np.uint32))


def _check_count(num_classes: int) -> None:
    if num_classes > MAX_CLASSES:
        raise BadLabelsError(
            f"{num_classes} classes; at most {MAX_CLASSES} are accepted",
            hint="Numbers to be predicted must be floats: labels.astype('float32')",
        )


def _checked(values: Sequence[Any], where: str = "") -> list[Any]:
    """Return plain Python labels, none missing: each of a row, or all of one row."""
    plain = [one.item() if isinstance(one, np.generic) else one for one in values]
    for row, value in enumerate(plain):
        at = where or f"row {row}"
        if value is None or value == "" or value != value or type(value).__name__ in ("NAType", "NaTType"):
            raise BadLabelsError(f"the label of {at} is missing", hint="Leave this row out or give it a label")
        if not isinstance(value, (int, str)):
            raise BadLabelsError(
                f"the label of {at} is a {type(value).__name__}; expected an integer or a string",
                hint="Numbers to be predicted must be a float array: np.asarray(labels, dtype='float32')",
            )
    return plain


_Values = TypeVar("_Values", list[Any], set[Any])


def _of_one_kind(values: _Values) -> _Values:
    if len({isinstance(one, str) for one in values}) > 1:
        raise BadLabelsError("some labels are text and some are numbers", hint="Make them all text")
    return values


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
