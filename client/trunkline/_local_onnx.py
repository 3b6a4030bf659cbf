"""Local models that are ONNX files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from trunkline_wire.errors import WireError
from trunkline_wire.onnx_check import check_onnx_file

from trunkline._local_rows import ARRAYS, PictureInput
from trunkline._onnx import check_threads, open_session, require_onnxruntime
from trunkline.errors import (
    DtypeMismatchError,
    InvalidArgumentError,
    ShapeMismatchError,
    UnsupportedError,
    from_wire,
)

# Shape suffix legend: B = rows

MAX_FILE_BYTES = 2**31 - 1
"""Largest ONNX file: more does not fit a protobuf message."""

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(bool)": np.dtype(np.bool_),
}
"""Types of an input that rows are brought to."""

_FLOATS = ("tensor(float)", "tensor(double)", "tensor(float16)")


class OnnxRunner:
    """Runs a checked ONNX file of one input and one output.

    Attributes:
        sha256: Of the file.
        inputs: What goes in, in words.
    """

    def __init__(self, path: str | os.PathLike[str], picture: PictureInput | None, threads: int | None) -> None:
        """Read and check the file.

        Args:
            path: Of the file.
            picture: How pictures enter; None for rows as they are.
            threads: As in ``trunkline.local_model``.

        Raises:
            MissingExtraError: ONNX Runtime is not installed.
            InvalidArgumentError: The file cannot be read, or its input does not fit.
            CorruptDataError: It is no ONNX file.
            UnsupportedError: It needs more than a self-contained file of standard operators may need.
        """
        check_threads(threads)
        require_onnxruntime("a local model from an ONNX file")
        self._name = Path(path).name
        self._data = _read(path)
        self._threads = threads
        self._picture = picture
        self._session: Any = None
        self.sha256 = hashlib.sha256(self._data).hexdigest()
        self._load()
        self._input, self._dtype, self._row_shape = self._check_input()
        self._check_output()
        self._form = "pixels" if self._dtype == np.uint8 else "planes"
        if picture is not None:
            self._check_picture(picture)
        self.inputs = ARRAYS if picture is None else picture.describe(self._form)

    def __call__(self, rows: npt.NDArray[Any]) -> Any:
        """Return the output for a batch of rows, (B, ...)."""
        if self._picture is not None and self._form == "planes":
            rows = self._picture.planes(rows)
        self._check_rows(rows)
        session = self._load()
        try:
            (outputs,) = session.run(None, {self._input: rows.astype(self._dtype, copy=False)})
        except Exception as error:  # ONNX Runtime's exceptions share no base
            raise InvalidArgumentError(
                f"ONNX Runtime cannot run {self._name} on rows of shape {rows.shape[1:]}: {error}",
                hint="Compare the rows with what the file takes",
            ) from error
        return outputs

    def __getstate__(self) -> dict[str, Any]:
        """Leave the session behind: the other process makes its own."""
        return {**self.__dict__, "_session": None}

    def _load(self) -> Any:
        if self._session is None:
            try:
                self._session = open_session(self._data, self._threads)
            except Exception as error:  # ONNX Runtime's exceptions share no base
                raise UnsupportedError(
                    f"ONNX Runtime cannot load {self._name}: {error}", hint="Update it: pip install -U onnxruntime"
                ) from error
        return self._session

    def _check_input(self) -> tuple[str, np.dtype[Any], tuple[Any, ...]]:
        entries = self._session.get_inputs()
        if len(entries) != 1:
            raise UnsupportedError(
                f"{self._name} has {len(entries)} inputs ({_names(entries)}); a local model has one",
                hint="Export it with one input, or wrap it in a function",
            )
        (entry,) = entries
        if entry.type not in _DTYPES:
            raise UnsupportedError(
                f"the input of {self._name} is {entry.type}; one of {', '.join(_DTYPES)} is needed",
                hint="Export it with another input, or wrap it in a function",
            )
        self._check_batch(entry)
        return entry.name, _DTYPES[entry.type], tuple(entry.shape[1:])

    def _check_output(self) -> None:
        entries = self._session.get_outputs()
        if len(entries) != 1:
            raise UnsupportedError(
                f"{self._name} has {len(entries)} outputs ({_names(entries)}); a local model has one",
                hint="Export it with the one that is meant",
            )
        (entry,) = entries
        if entry.type not in _FLOATS:
            raise UnsupportedError(
                f"the output of {self._name} is {entry.type}; local features are floats, one of {', '.join(_FLOATS)}",
                hint="Export the layer before, such as the one that classes are chosen from",
            )
        self._check_batch(entry)

    def _check_batch(self, entry: Any) -> None:
        if not entry.shape or isinstance(entry.shape[0], int):
            raise UnsupportedError(
                f"{entry.name!r} of {self._name} has the fixed shape {entry.shape}; its first dimension must be free, "
                "for any number of rows",
                hint="Export it with a dynamic batch dimension",
            )

    def _check_picture(self, picture: PictureInput) -> None:
        size = picture.size
        if self._dtype not in (np.uint8, np.float32):
            raise UnsupportedError(
                f"{self._name} takes pictures as {self._dtype}; uint8 or float32 is needed", hint="Export it anew"
            )
        if self._form == "pixels" and picture.is_normalised:
            raise InvalidArgumentError(
                f"{self._name} takes pixels of uint8, which it normalises itself; mean and std change nothing",
                hint="Leave mean= and std= out",
            )
        wanted = (size, size, 3) if self._form == "pixels" else (3, size, size)
        if not _fits(wanted, self._row_shape):
            raise ShapeMismatchError(
                f"a row of {self._name} is {list(self._row_shape)} of {self._dtype}; input_size={size} makes "
                f"{list(wanted)}",
                hint="Use its own size, and channels " + ("last" if self._form == "pixels" else "first"),
            )

    def _check_rows(self, rows: npt.NDArray[Any]) -> None:
        if not _fits(rows.shape[1:], self._row_shape):
            raise ShapeMismatchError(
                f"a row has shape {rows.shape[1:]}; {self._name} takes {list(self._row_shape)}", hint="Reshape the rows"
            )
        if not np.can_cast(rows.dtype, self._dtype, casting="same_kind"):
            raise DtypeMismatchError(
                f"rows are {rows.dtype}; {self._name} takes {self._dtype}", hint=f"Use rows.astype('{self._dtype}')"
            )


def _read(path: str | os.PathLike[str]) -> bytes:
    where = Path(path).expanduser()
    try:
        data = where.read_bytes()
    except OSError as error:
        raise InvalidArgumentError(
            f"{where} cannot be read: {error.strerror or error}", hint="Give the path of an ONNX file"
        ) from error
    try:
        check_onnx_file(data, MAX_FILE_BYTES)
    except WireError as error:
        raise from_wire(error, prefix=f"{where.name}: ", hint="Export the model to a single file anew") from None
    return data


def _names(entries: Sequence[Any]) -> str:
    return ", ".join(str(one.name) for one in entries)


def _fits(shape: tuple[int, ...], wanted: tuple[Any, ...]) -> bool:
    """Whether a shape is the one wanted, where a dimension that is no number may have any size."""
    return len(shape) == len(wanted) and all(
        not isinstance(two, int) or one == two for one, two in zip(shape, wanted, strict=True)
    )
