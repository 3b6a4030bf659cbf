"""Local models: the client's own small models, whose output goes along as local features."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from trunkline_wire.limits import MAX_LOCAL_WIDTH
from trunkline_wire.quantise import FLOAT32
from trunkline_wire.specs import FeatureSpace, local_fingerprint, local_space

from trunkline._codecs import check_local_codec, packed
from trunkline._local_rows import ARRAYS, ArrayRows, LocalRows, PictureInput, PictureRows, blank, picture_input
from trunkline._names import check_user_name, check_version
from trunkline.errors import (
    DtypeMismatchError,
    InvalidArgumentError,
    NotFiniteError,
    ShapeMismatchError,
    TrunklineError,
)

# Shape suffix legend: N, B = rows, W = width of the local features


class Runner(Protocol):
    """One kind of local model.

    Attributes:
        sha256: Hex SHA-256 of the model.
        inputs: What goes in, in words that say all that the numbers depend on.
    """

    sha256: str
    inputs: str

    def __call__(self, rows: npt.NDArray[Any]) -> Any:
        """Return the output for a batch of rows, (B, ...)."""


class CallableRunner:
    """Runs a function. See ``Runner``."""

    def __init__(self, function: Callable[[npt.NDArray[Any]], Any], name: str, picture: PictureInput | None) -> None:
        """Keep the function. What identifies it is its name and its version."""
        self._function = function
        self.sha256 = hashlib.sha256(f"callable-v1\0{name}".encode()).hexdigest()
        self.inputs = ARRAYS if picture is None else picture.describe("pixels")

    def __call__(self, rows: npt.NDArray[Any]) -> Any:
        """Return what the function returns."""
        return self._function(rows)


class LocalModel:
    """A model of the client's own, as a function from rows to vectors. Made by ``local_model``.

    Attributes:
        name: By which datasets and models know it.
        sha256: Hex SHA-256 over the model and its version.
        inputs: What goes in, in words.
        preprocessing: How a picture becomes the pixels that enter. None: rows go in as they are.
        codec: How its features travel.
        batch_rows: Most rows that go through at once.
        width: Numbers a row. None until it has run.
    """

    def __init__(
        self, runner: Runner, *, name: str, picture: PictureInput | None, codec: str, version: str, batch_rows: int
    ) -> None:
        """Keep checked parts."""
        self.name = name
        self.sha256 = hashlib.sha256(f"{runner.sha256}\0{version}".encode()).hexdigest()
        self.inputs = runner.inputs
        self.preprocessing = None if picture is None else picture.preprocessing
        self.codec = codec
        self.batch_rows = batch_rows
        self.width: int | None = None
        self._runner = runner

    @property
    def input_size(self) -> int | None:
        """Side of the square that pictures are brought to, in pixels. None: rows go in as they are."""
        return None if self.preprocessing is None else self.preprocessing.input_size

    @property
    def space(self) -> FeatureSpace:
        """Where its features live. A blank picture goes through if the width is not known yet.

        Raises:
            InvalidArgumentError: It takes rows as they are and has not run yet, so that its width is not known.
        """
        if self.width is None and self.input_size is not None:
            self.compute_contents([blank(self.input_size)])
        if self.width is None:
            raise InvalidArgumentError(
                f"the width of the local model {self.name!r} is not known before it has run",
                hint="Run it on a row: local.run(rows[:1])",
            )
        return local_space(self.name, local_fingerprint(self.sha256, self.inputs, self.width))

    def run(self, rows: Any) -> npt.NDArray[np.float32]:
        """Return the local features of rows.

        Args:
            rows: With ``input_size`` pictures, as in ``Client.upload``; else an array of (N, ...), a table, or a list
                of arrays of one shape.

        Shape:
            returns (N, W), float32.

        Raises:
            NotFiniteError: A value is NaN or infinite; names the row.
            ShapeMismatchError: The model gives another number of rows than went in, or another width than before.
            DtypeMismatchError: It gives something else than numbers.
            CorruptImageError: A picture cannot be decoded.
        """
        found = self.rows(rows)
        return self.compute(found, range(len(found)))

    def rows(self, rows: Any) -> LocalRows:
        """Return checked rows that can go in. See ``run``."""
        if self.preprocessing is None:
            return ArrayRows(rows, self.name)
        from trunkline.images import pictures

        return PictureRows(pictures(rows), self.preprocessing)

    def compute(self, rows: LocalRows, numbers: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the features of some rows, (B, W), a few of them in memory at a time. Raises as ``run``."""
        parts = []
        for start in range(0, len(numbers), self.batch_rows):
            some = numbers[start : start + self.batch_rows]
            features_BW = self.compute_contents([rows.content(number) for number in some])
            finite_B = np.isfinite(features_BW).all(axis=1)
            if not finite_B.all():
                raise not_finite(self.name, rows.name(some[int((~finite_B).argmax())]))
            parts.append(features_BW)
        return np.concatenate(parts)

    def compute_contents(self, contents: Sequence[npt.NDArray[np.generic]]) -> npt.NDArray[np.float32]:
        """Return the features of what enters the model, (B, W), NaN and infinity among them."""
        parts = []
        for outputs in self.outputs(contents):
            features_BW = outputs.reshape(len(outputs), -1)
            self._check_width(features_BW.shape[1])
            parts.append(features_BW)
        return np.concatenate(parts)

    def outputs(self, contents: Sequence[npt.NDArray[np.generic]]) -> Iterator[npt.NDArray[np.float32]]:
        """Yield what the model gives for what enters it, a batch at a time: (B, ...) of any shape and finite or not.

        Raises:
            ShapeMismatchError, DtypeMismatchError: As ``run``.
        """
        for start in range(0, len(contents), self.batch_rows):
            some = contents[start : start + self.batch_rows]
            yield self._checked(self._runner(np.stack(some)), len(some))

    def find_width(self, rows: LocalRows) -> int:
        """Return the width, found with the first row that can be read if the model has not run yet.

        Raises:
            TrunklineError: No row can be read: the first one's error.
        """
        failure: TrunklineError | None = None
        for number in range(len(rows)):
            if self.width is not None:
                break
            try:
                content = rows.content(number)
            except TrunklineError as error:
                failure = failure or error
                continue
            self.compute_contents([content])
        if self.width is None:
            assert failure is not None
            raise failure
        return self.width

    def pack(self, features_BW: npt.NDArray[np.float32]) -> Any:
        """Return features in the codec, as they travel."""
        return packed(features_BW, self.codec, 0)

    def _checked(self, outputs: Any, num_rows: int) -> npt.NDArray[np.float32]:
        """Return what the model gave for that many rows as an array of floats."""
        try:
            array = np.asarray(outputs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DtypeMismatchError(
                f"the local model {self.name!r} gave a {type(outputs).__name__} that is no array: {error}",
                hint="Return a numpy array of (rows, ...)",
            ) from error
        if array.dtype.kind not in "fiub":
            raise DtypeMismatchError(
                f"the local model {self.name!r} gave {array.dtype}; numbers are needed",
                hint="Return a numpy array of floats, (rows, ...)",
            )
        if array.ndim == 0 or len(array) != num_rows:
            raise ShapeMismatchError(
                f"the local model {self.name!r} gave shape {array.shape} for {num_rows} rows; ({num_rows}, ...) is "
                "needed",
                hint="Return one vector for each row",
            )
        with np.errstate(over="ignore"):
            # A copy: the model may use its output's memory again.
            return np.array(array, dtype=np.float32)

    def _check_width(self, width: int) -> None:
        if self.width is not None and width != self.width:
            raise ShapeMismatchError(
                f"the local model {self.name!r} gave {width} numbers a row, and {self.width} before",
                hint="Its output must have the same size for all rows",
            )
        if not 1 <= width <= MAX_LOCAL_WIDTH:
            raise ShapeMismatchError(
                f"the local model {self.name!r} gave {width} numbers a row; 1 to {MAX_LOCAL_WIDTH} are accepted",
                hint="Pool its output",
            )
        self.width = width

    def __repr__(self) -> str:
        """Return name, what goes in and comes out."""
        return f"LocalModel({self.name!r}, {self.inputs}, width={self.width}, codec={self.codec!r})"


def local_model(
    model: Any,
    *,
    name: str,
    input_size: int | None = None,
    mean: Any = None,
    std: Any = None,
    codec: str = FLOAT32,
    version: str | None = None,
    threads: int | None = None,
    batch_rows: int = 32,
) -> LocalModel:
    """Make a local model: whatever it gives for a row, flattened, goes along as that row's local features.

    The cluster keeps its name and a fingerprint over the model, its version, what goes in, and the width. Features of
    another fingerprint are refused. The weights of a module count as they are now: make it anew if they change.

    Args:
        model: The path of an ONNX file, a ``torch.nn.Module``, or any function from an array of rows to an array.
        name: By which datasets and models know it.
        input_size: Rows are pictures, brought to a square of this many pixels (centre crop, bicubic). A function gets
            (B, s, s, 3), uint8; so does an ONNX file whose input is uint8. A module, or an ONNX file of another input,
            gets (B, 3, s, s), float32, 0 to 1. None: rows go in as they are, stacked.
        mean: Taken off where pictures go in as floats: a number, or one for each channel.
        std: Divided by, likewise.
        codec: How the features travel: ``float32``, ``float16``, ``bfloat16``, ``int8`` or ``int4``. What the cluster
            trains on and what it predicts must be sent in the same one.
        version: Identifies the model, together with what is said above. A function needs one, since it cannot be
            hashed; change it whenever the function gives other numbers.
        threads: Threads of ONNX Runtime. Default: its choice.
        batch_rows: Most rows that go through at once.

    Raises:
        InvalidArgumentError: Something is out of range; a function has no version; a file does not fit.
        UnsupportedError: An ONNX file has several inputs or outputs, a fixed batch dimension, no floats as its output,
            or is not self-contained.
        MissingExtraError: An ONNX file is given and ONNX Runtime is not installed.
    """
    check_user_name(name, "local model")
    picture = picture_input(input_size, mean, std)
    own_codec = check_local_codec(codec)
    if isinstance(batch_rows, bool) or not isinstance(batch_rows, int) or batch_rows < 1:
        raise InvalidArgumentError(f"batch_rows is {batch_rows!r}; expected a whole number, 1 or more")
    if version is not None:
        check_version(version)
    return LocalModel(
        _runner(model, name, picture, version, threads),
        name=name,
        picture=picture,
        codec=own_codec,
        version=version or "",
        batch_rows=batch_rows,
    )


def not_finite(model: str, row: str) -> NotFiniteError:
    """Return the error of a row for which a local model gave NaN or infinity."""
    return NotFiniteError(f"{row}: the local model {model!r} gave NaN or infinity", hint="Leave the row out")


def _runner(model: Any, name: str, picture: PictureInput | None, version: str | None, threads: int | None) -> Runner:
    if isinstance(model, (str, os.PathLike)):
        from trunkline._local_onnx import OnnxRunner

        return OnnxRunner(model, picture, threads)
    if threads is not None:
        raise InvalidArgumentError("threads is for ONNX files; the model runs as it is", hint="Leave threads= out")
    torch = sys.modules.get("torch")  # nobody has a module of it who has not loaded it
    if torch is not None and isinstance(model, torch.nn.Module):
        from trunkline.torch.local import TorchRunner

        return TorchRunner(model, picture)
    if not callable(model):
        raise InvalidArgumentError(
            f"a {type(model).__name__} is no local model; the path of an ONNX file, a torch.nn.Module or a function is "
            "needed"
        )
    if version is None:
        raise InvalidArgumentError(
            f"the local model {name!r} is a function, which cannot be hashed: without a version nobody could tell that "
            "it changed",
            hint="Give version='1', and another one whenever it gives other numbers",
        )
    if picture is not None and picture.is_normalised:
        raise InvalidArgumentError(
            "a function gets pixels of uint8, which it normalises itself; mean and std change nothing",
            hint="Leave mean= and std= out",
        )
    return CallableRunner(model, name, picture)
