"""Features at hand: checked before anything is sent, and brought into a codec a chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from trunkline_wire import quantise
from trunkline_wire.errors import WireError
from trunkline_wire.finite import check_finite
from trunkline_wire.limits import CHUNK_BYTES, MAX_BATCH_ROWS, MAX_PAYLOAD_BYTES
from trunkline_wire.quantise import CodecChoice, PackedRows
from trunkline_wire.rows import content_digest, row_id
from trunkline_wire.specs import CutSpec, FeatureSpace

from trunkline._codecs import packed
from trunkline.errors import (
    DtypeMismatchError,
    EmptyBatchError,
    InvalidArgumentError,
    PayloadTooLargeError,
    ShapeMismatchError,
    from_wire,
)

if TYPE_CHECKING:
    from trunkline._calls import Rows

FEATURE_DTYPES = ("float16", "float32")
"""Types of features at hand that are taken as they are."""


@lru_cache(maxsize=64)
def _name(dtype: np.dtype[np.generic]) -> str:
    return dtype.name  # numpy makes the text anew each time, which takes as long as checking a small row


class Features:
    """Checked features of a user's.

    Attributes:
        space: Where they live.
        codec: In which they travel, as row ids name it.
        compress: Whether zstd is applied on the way.
        row_bytes: Size of one row in the codec, in bytes, before zstd.
    """

    def __init__(self, features: Any, space: FeatureSpace, cut: CutSpec, choice: CodecChoice | None = None) -> None:
        """Check them.

        Args:
            features: An array, or ``PackedRows`` as ``Stem.pack`` gives them.
            space: Where they live.
            cut: The cut there.
            choice: In which codec they travel. None: as they are.

        Raises:
            EmptyBatchError, DtypeMismatchError, ShapeMismatchError, NotFiniteError, PayloadTooLargeError: They cannot
                be sent.
            InvalidArgumentError: The codec cannot be had of these features.
        """
        self.space = space
        self._axis = cut.channel_axis
        self._rows: npt.NDArray[np.generic] | PackedRows
        if isinstance(features, PackedRows):
            self._rows = check_packed(features, cut, choice)
            self.codec = features.codec
        else:
            self._rows = check_features(features, cut.feature_shape, space)
            self.codec = choice.codec if choice else _name(self._rows.dtype)
            if choice and space.is_input:
                raise InvalidArgumentError(f"pictures travel as uint8; codec is {choice}", hint="Leave codec= out")
        self.compress = choice is not None and choice.zstd
        self.row_bytes = (
            self._rows[0].nbytes
            if isinstance(self._rows, np.ndarray) and self.codec == _name(self._rows.dtype)
            else quantise.row_bytes(cut.feature_shape, self.codec, self._axis)
        )
        rows_per_chunk(self.row_bytes)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def row_ids(self) -> list[bytes]:
        """Return the id of each row: of what is at hand, and of the codec in which it travels."""
        return [row_id(self.space, self.codec, digest) for digest in self._digests()]

    def take(self, numbers: slice | Sequence[int]) -> Rows:
        """Return some of the rows, in the codec.

        Raises:
            NotFiniteError: One is beyond what the codec can hold.
        """
        if isinstance(self._rows, PackedRows):
            return self._rows.take(numbers)
        some = self._rows[numbers if isinstance(numbers, slice) else list(numbers)]
        return some if self.codec == _name(some.dtype) else packed(some, self.codec, self._axis)

    def _digests(self) -> list[bytes]:
        rows = self._rows
        if not isinstance(rows, PackedRows):
            return [content_digest(row) for row in rows]
        return [
            content_digest(data.tobytes() + scale.tobytes() + offset.tobytes())
            for data, scale, offset in zip(rows.data_BZ, rows.scale_BC, rows.offset_BC, strict=True)
        ]


def paired(features: Any, space: FeatureSpace | Sequence[FeatureSpace]) -> list[tuple[Any, FeatureSpace]]:
    """Return features with where they live: one pair, or one for each of several spaces.

    Raises:
        InvalidArgumentError: There are not as many features as spaces, or of different numbers of rows.
    """
    if isinstance(space, FeatureSpace):
        return [(features, space)]
    if not isinstance(features, (list, tuple)) or len(features) != len(space) or not space:
        count = f"{len(features)}" if isinstance(features, (list, tuple)) else f"a {type(features).__name__}"
        raise InvalidArgumentError(
            f"features is {count} for {len(space)} backbones; a list with an array for each is needed",
            hint=f"In this order: {', '.join(one.source for one in space)}",
        )
    return list(zip(features, space, strict=True))


def check_packed(rows: PackedRows, cut: CutSpec, choice: CodecChoice | None) -> PackedRows:
    """Return packed features that fit a cut.

    Raises:
        EmptyBatchError, ShapeMismatchError, InvalidArgumentError: They do not.
        NotFiniteError, DtypeMismatchError, CorruptDataError: They were not packed by ``Stem.pack``.
    """
    if len(rows) == 0:
        raise EmptyBatchError("there are no features", hint="Give at least one row")
    if choice is not None and choice.codec != rows.codec:
        raise InvalidArgumentError(
            f"the features are packed as {rows.codec}; codec is {choice}", hint="Leave codec= out, or pack them anew"
        )
    if rows.row_shape != cut.feature_shape or (len(rows.row_shape) > 1 and rows.channel_axis != cut.channel_axis):
        raise ShapeMismatchError(
            f"a row of features must be {cut.feature_shape} with channels on axis {cut.channel_axis}; "
            f"got {rows.row_shape} on axis {rows.channel_axis}",
            hint="Use the stem of that cut and input size",
        )
    try:
        quantise.check_packed(rows)
    except WireError as error:
        raise from_wire(error, hint="Pack the features with Stem.pack") from None
    return rows


def check_features(features: Any, feature_shape: tuple[int, ...], space: FeatureSpace) -> npt.NDArray[np.generic]:
    """Return features as an array that can be sent: float16 as it is, other floats as float32.

    At the cut ``input`` the features are pictures after preprocessing, uint8.

    Raises:
        EmptyBatchError, DtypeMismatchError, ShapeMismatchError, NotFiniteError: They are not.
    """
    array: npt.NDArray[np.generic] = np.asarray(features)
    if array.ndim == 0 or array.shape[0] == 0:
        raise EmptyBatchError("there are no features", hint="Give at least one row")
    if space.is_input and array.dtype != np.uint8:
        raise DtypeMismatchError(
            f"preprocessed pictures must be uint8; got {array.dtype}",
            hint="Scale and convert: (x * 255).astype('uint8')",
        )
    if not space.is_input and array.dtype.kind != "f":
        raise DtypeMismatchError(
            f"features must be {' or '.join(FEATURE_DTYPES)}; got {array.dtype}",
            hint="Use features.astype('float32'), or Stem.pack for fewer bytes",
        )
    if array.shape[1:] != feature_shape:
        raise ShapeMismatchError(
            f"a row of features must be {feature_shape}; got {array.shape[1:]}",
            hint="Use the stem of that cut and input size",
        )
    if array.dtype.kind == "f" and _name(array.dtype) not in FEATURE_DTYPES:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    if space.is_input:
        return array
    try:
        check_finite(array)
    except WireError as error:
        raise from_wire(error, hint="Leave these rows out") from None
    return array


def rows_per_chunk(num_bytes: int) -> int:
    """Return how many rows of that size travel together.

    Raises:
        PayloadTooLargeError: Not even one fits a message.
    """
    if num_bytes > MAX_PAYLOAD_BYTES:
        raise PayloadTooLargeError(
            f"one row has {num_bytes} bytes; at most {MAX_PAYLOAD_BYTES} fit a message",
            hint="Choose a later cut, a smaller input_size, or a codec of fewer bytes such as int8",
        )
    return max(1, min(MAX_BATCH_ROWS, CHUNK_BYTES // max(1, num_bytes)))
