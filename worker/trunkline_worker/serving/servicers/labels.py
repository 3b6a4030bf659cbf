"""From the labels in a message to those that the store keeps, checked as far as the message itself can tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from trunkline_wire import codecs
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_CLASSES, MAX_DATASET_ROWS
from trunkline_wire.v1 import dataset_pb2 as pb
from trunkline_wire.v1 import tensor_pb2

# Shape suffix legend: N = rows, M = outputs, or classes where a row may be of several

Labels = tuple[tuple[str, ...], list[int], npt.NDArray[np.float32] | None]
"""Class names, the class of each row, numbers; as ``Datasets.commit`` takes them."""


def labels_from_proto(request: pb.CommitDatasetRequest, num_rows: int) -> Labels:
    """Return the labels of a dataset.

    Raises:
        WireError: BAD_LABELS; and as ``codecs.decode``.
    """
    kind = request.WhichOneof("labels")
    if kind == "targets":
        targets_NM = _numbers(request.targets.values, num_rows, np.dtype(np.float32), "(rows, outputs)")
        return (), [], targets_NM.astype(np.float32, copy=False)
    if kind == "multi_labels":
        return _multi_labels(request.multi_labels, num_rows)
    if kind == "classes":
        return _classes(request.classes, num_rows)
    return (), [], None


def _classes(message: pb.ClassLabels, num_rows: int) -> Labels:
    names, indices = tuple(message.names), list(message.indices)
    if len(indices) != num_rows:
        raise _bad_labels(f"{len(indices)} labels for {num_rows} rows")
    _check_names(names)
    if max(indices) >= len(names):
        raise _bad_labels(f"label {max(indices)} does not exist: there are {len(names)} classes")
    if len(set(indices)) < 2:
        raise _bad_labels("the labels are of one class only; a classifier needs two at least")
    return names, indices, None


def _multi_labels(message: pb.MultiLabels, num_rows: int) -> Labels:
    names = tuple(message.names)
    _check_names(names)
    if not names:
        raise _bad_labels("no class is named; name those that a row may be of")
    values_NM = _numbers(message.values, num_rows, np.dtype(np.uint8), "(rows, classes)")
    if values_NM.shape[1] != len(names):
        raise _bad_labels(f"{values_NM.shape[1]} columns for {len(names)} classes; one for each is needed")
    if values_NM.max() > 1:
        raise _bad_labels(
            f"a row says {values_NM.max()} of a class; 1 where it is of the class and 0 where not are needed"
        )
    return names, [], values_NM.astype(np.float32)


def _numbers(
    tensor: tensor_pb2.Tensor, num_rows: int, dtype: np.dtype[np.generic], shape: str
) -> npt.NDArray[np.generic]:
    values_NM = codecs.decode(tensor, max_rows=MAX_DATASET_ROWS)
    if not isinstance(values_NM, np.ndarray) or values_NM.dtype != dtype or values_NM.ndim != 2:
        raise _bad_labels(f"{dtype} of shape {shape} is needed as labels")
    if len(values_NM) != num_rows:
        raise _bad_labels(f"{len(values_NM)} targets for {num_rows} rows")
    return values_NM


def _check_names(names: Sequence[str]) -> None:
    if len(names) > MAX_CLASSES or len(set(names)) != len(names) or any(not name for name in names):
        raise _bad_labels(f"class names must be distinct, not empty, {MAX_CLASSES} at most")


def _bad_labels(message: str) -> WireError:
    return WireError(ErrorCode.BAD_LABELS, message)
