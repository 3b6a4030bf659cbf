"""What goes into a local model: pictures brought to a size, or arrays as they are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from trunkline_wire.rows import content_digest
from trunkline_wire.specs import Preprocessing

from trunkline.errors import DtypeMismatchError, EmptyBatchError, InvalidArgumentError, ShapeMismatchError

if TYPE_CHECKING:
    from trunkline.images import Picture

# Shape suffix legend: N, B = rows, C = channels, H = height, W = width

MAX_SIDE = 4096
"""Largest ``input_size`` of a local model, in pixels."""

_AS_THEY_ARE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class PictureInput:
    """How a picture becomes what enters a local model.

    Attributes:
        size: Side of the square, in pixels.
        mean: Of each channel, on the scale 0 to 1; taken off where floats are wanted.
        std: Divided by, likewise.
    """

    size: int
    mean: tuple[float, float, float] = _AS_THEY_ARE[0]
    std: tuple[float, float, float] = _AS_THEY_ARE[1]

    @property
    def preprocessing(self) -> Preprocessing:
        """The one that all pictures go through, up to the pixels."""
        return Preprocessing(self.size, 1.0, "bicubic", self.mean, self.std)

    @property
    def is_normalised(self) -> bool:
        """Whether mean or standard deviation were given."""
        return (self.mean, self.std) != _AS_THEY_ARE

    def planes(self, pixels_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return pixels as networks want them: (B, 3, size, size), float32, 0 to 1, then normalised."""
        x_BHWC = pixels_BHWC.astype(np.float32)
        x_BHWC /= 255
        if self.is_normalised:
            x_BHWC -= np.array(self.mean, np.float32)
            x_BHWC /= np.array(self.std, np.float32)
        return np.ascontiguousarray(x_BHWC.transpose(0, 3, 1, 2))

    def describe(self, form: str) -> str:
        """Return in words all that the numbers which enter depend on. ``form`` is ``pixels`` or ``planes``."""
        numbers = f"pictures, centre crop 1.0, bicubic, {self.size} x {self.size}"
        if form == "pixels":
            return f"{numbers}, uint8 (B, H, W, C)"
        return f"{numbers}, float32 (B, C, H, W), 0 to 1, mean {self.mean}, std {self.std}"


def blank(size: int) -> npt.NDArray[np.uint8]:
    """Return the pixels of a black picture, (size, size, 3)."""
    return np.zeros((size, size, 3), np.uint8)


ARRAYS = "rows as they are"
"""What goes into a local model that takes no pictures, in words."""


def picture_input(input_size: int | None, mean: Any, std: Any) -> PictureInput | None:
    """Check how pictures enter a local model; None for one that takes rows as they are.

    Raises:
        InvalidArgumentError: Something is out of range, or means nothing without ``input_size``.
    """
    if input_size is None:
        if mean is not None or std is not None:
            raise InvalidArgumentError(
                "mean and std are for pictures; without input_size rows go in as they are",
                hint="Give input_size= too, or normalise the rows yourself",
            )
        return None
    if isinstance(input_size, bool) or not isinstance(input_size, int) or not 1 <= input_size <= MAX_SIDE:
        raise InvalidArgumentError(f"input_size is {input_size!r}; expected 1 to {MAX_SIDE} pixels")
    means = _per_channel("mean", mean, 0.0)
    deviations = _per_channel("std", std, 1.0)
    if min(deviations) <= 0:
        raise InvalidArgumentError(f"std is {std!r}; expected numbers above 0")
    return PictureInput(input_size, means, deviations)


def _per_channel(what: str, value: Any, default: float) -> tuple[float, float, float]:
    try:
        numbers = [float(one) for one in np.broadcast_to(default if value is None else value, 3)]
    except (TypeError, ValueError):
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise InvalidArgumentError(f"{what} is {value!r}; expected a number, or one for each of red, green and blue")
    return numbers[0], numbers[1], numbers[2]


class LocalRows(ABC):
    """Rows that go into a local model. Every error names the row."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def name(self, number: int) -> str:
        """Return what to call a row in messages."""

    @abstractmethod
    def digest(self, number: int) -> bytes:
        """Return the digest of what a row is made from. See ``trunkline_wire.rows``."""

    @abstractmethod
    def content(self, number: int) -> npt.NDArray[np.generic]:
        """Return what enters the model for one row.

        Raises:
            CorruptImageError: It is a picture that cannot be decoded.
        """


class PictureRows(LocalRows):
    """Pictures, brought to a size when they are needed."""

    def __init__(self, pictures: Sequence[Picture], preprocessing: Preprocessing) -> None:
        """Keep the pictures and what becomes of them."""
        self._pictures = pictures
        self._preprocessing = preprocessing

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._pictures)

    def name(self, number: int) -> str:
        """Return the picture's name."""
        return self._pictures[number].name

    def digest(self, number: int) -> bytes:
        """Return the picture's digest."""
        return self._pictures[number].digest()

    def content(self, number: int) -> npt.NDArray[np.generic]:
        """Return (size, size, 3), uint8."""
        return self._pictures[number].preprocessed(self._preprocessing)


class ArrayRows(LocalRows):
    """Arrays of one shape: sensor data, the columns of a table, texts."""

    def __init__(self, rows: Any, model: str) -> None:
        """Check the rows.

        Args:
            rows: An array of (N, ...), a table, or a list of arrays.
            model: Name of the local model, for messages.

        Raises:
            EmptyBatchError, ShapeMismatchError, DtypeMismatchError: They cannot be stacked.
        """
        if hasattr(rows, "to_numpy"):
            rows = rows.to_numpy()
        if isinstance(rows, (str, bytes)) or not np.iterable(rows):
            raise ShapeMismatchError(
                f"the local model {model!r} needs rows; got a single {type(rows).__name__}", hint="Put it in a list"
            )
        rows = list(rows)
        self._arrays = [np.asarray(row) for row in rows]
        if not self._arrays:
            raise EmptyBatchError(f"there are no rows for the local model {model!r}", hint="Give at least one")
        first = self._arrays[0]
        for number, array in enumerate(self._arrays):
            if array.dtype.hasobject or _is_text(array) != _is_text(first):
                raise DtypeMismatchError(
                    f"row {number} for the local model {model!r} is a {type(rows[number]).__name__}, which is no array "
                    "of numbers, or of text as the others",
                    hint="Convert it, or give input_size= to the local model if the rows are pictures",
                )
            if array.shape != first.shape:
                raise ShapeMismatchError(
                    f"row {number} for the local model {model!r} has shape {array.shape}; row 0 has {first.shape}",
                    hint="Bring all rows to one shape",
                )

    def __len__(self) -> int:
        """Return the number of arrays."""
        return len(self._arrays)

    def name(self, number: int) -> str:
        """Return the row's number."""
        return f"row {number}"

    def digest(self, number: int) -> bytes:
        """Return the digest of the array's type, shape and values."""
        return content_digest(self._arrays[number])

    def content(self, number: int) -> npt.NDArray[np.generic]:
        """Return the array."""
        return self._arrays[number]


def _is_text(array: npt.NDArray[np.generic]) -> bool:
    return array.dtype.kind in "US"
