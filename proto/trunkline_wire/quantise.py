"""Features in fewer bytes: bfloat16, and integers of 8 or 4 bits with an offset and a scale per row and channel.

numpy alone, no loop over rows, no protobuf: both sides and the store use it. Lossless compression (zstd) is not part of
a codec here; it is applied to messages, see ``trunkline_wire.codecs``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.finite import (
    BFLOAT16_INFINITY,
    NAN_OR_INFINITY,
    are_bits_finite,
    check_finite,
    is_finite,
    not_finite,
)
from trunkline_wire.limits import MAX_RANK

# Shape suffix legend: B = rows, N = values of a row, Z = bytes of a row, C = channels,
# O and I = values of a row outside and inside of the channel axis

FLOAT32 = "float32"
FLOAT16 = "float16"
BFLOAT16 = "bfloat16"
INT8 = "int8"
INT4 = "int4"

CODECS = (FLOAT32, FLOAT16, BFLOAT16, INT8, INT4)
"""How features may travel, by falling size."""

PACKED_CODECS = (BFLOAT16, INT8, INT4)
"""Those whose rows are ``PackedRows``."""

ZSTD = "+zstd"
"""Suffix of a codec's name that asks for lossless compression on top."""

IMAGES = "images"
"""Codec name of rows that are encoded pictures. Rows that are pixels have the codec ``uint8``."""

_ALIASES = {"fp32": FLOAT32, "fp16": FLOAT16, "bf16": BFLOAT16}
_BITS = {FLOAT32: 32, FLOAT16: 16, BFLOAT16: 16, INT8: 8, INT4: 4, "uint8": 8}
_LEVELS = {INT8: 255, INT4: 15}
_NAME_BY_DTYPE = {np.dtype(name): name for name in (FLOAT32, FLOAT16, "uint8")}  # numpy makes the name each time

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal
_BFLOAT16_LARGEST = np.float32((2 - 2**-7) * 2.0**127)

_BLOCK_VALUES = 2**16


@dataclass(frozen=True)
class CodecChoice:
    """A codec and whether zstd is applied on top."""

    codec: str
    zstd: bool

    def __str__(self) -> str:
        """Return the name that ``parse_codec`` understands."""
        return self.codec + (ZSTD if self.zstd else "")


def parse_codec(name: str) -> CodecChoice:
    """Take a codec's name apart: one of ``CODECS``, or ``fp32``, ``fp16``, ``bf16``, each with or without ``+zstd``.

    Raises:
        WireError: UNSUPPORTED, naming the codecs there are.
    """
    base = name.removesuffix(ZSTD)
    codec = _ALIASES.get(base, base)
    if codec not in CODECS:
        raise WireError(
            ErrorCode.UNSUPPORTED,
            f"there is no codec {name[:40]!r}; there are {', '.join(CODECS)}, each also with {ZSTD!r}",
        )
    return CodecChoice(codec, name.endswith(ZSTD))


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of features in a codec that numpy has no type for.

    Attributes:
        codec: ``bfloat16``, ``int8`` or ``int4``.
        row_shape: Of one row, in values.
        channel_axis: Which axis of a row counts channels; 0 where a row has one dimension, and for bfloat16.
        data_BZ: uint8; little-endian bfloat16, or levels from 0, of 4 bits two in a byte, the first in the low half.
            Each row starts at a whole byte.
        scale_BC: float32, one per row and channel; (B, 0) for bfloat16. A value is offset + scale * level.
        offset_BC: Likewise.
    """

    codec: str
    row_shape: tuple[int, ...]
    channel_axis: int
    data_BZ: npt.NDArray[np.uint8]
    scale_BC: npt.NDArray[np.float32]
    offset_BC: npt.NDArray[np.float32]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.data_BZ)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the features, (rows, ...), as an array would have it."""
        return (len(self), *self.row_shape)

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and offsets."""
        return self.data_BZ.nbytes + self.scale_BC.nbytes + self.offset_BC.nbytes

    def take(self, rows: slice | Sequence[int] | npt.NDArray[np.integer]) -> PackedRows:
        """Return some of the rows, in the order asked."""
        return PackedRows(
            self.codec,
            self.row_shape,
            self.channel_axis,
            self.data_BZ[rows],
            self.scale_BC[rows],
            self.offset_BC[rows],
        )


def concatenate(parts: Sequence[PackedRows]) -> PackedRows:
    """Put rows of one codec and shape one after another.

    Raises:
        WireError: SHAPE_MISMATCH where the parts are not of one codec and shape.
    """
    first = parts[0]
    kinds = {(one.codec, one.row_shape, one.channel_axis) for one in parts}
    if len(kinds) > 1:
        raise WireError(ErrorCode.SHAPE_MISMATCH, f"rows of different codecs or shapes do not go together: {kinds}")
    return PackedRows(
        first.codec,
        first.row_shape,
        first.channel_axis,
        np.concatenate([one.data_BZ for one in parts]),
        np.concatenate([one.scale_BC for one in parts]),
        np.concatenate([one.offset_BC for one in parts]),
    )


def pack(features: npt.NDArray[np.floating], codec: str, channel_axis: int = 0) -> npt.NDArray[np.generic] | PackedRows:
    """Return features in a codec: an array for ``float32`` and ``float16``, else ``PackedRows``.

    Values become the nearest that the codec has. Under ``int8`` and ``int4`` these are 256 or 16 evenly spaced ones
    from the smallest to the largest value of a channel in a row, so none is off by more than half a scale (and the
    rounding of float32); a channel of equal values is exact. Under ``bfloat16`` finite values stay finite. What a row
    becomes does not depend on the rows beside it.

    Args:
        features: (B, ...), float32 or float16, finite, a row having 1 to 7 dimensions. Any memory layout.
        codec: One of ``CODECS``.
        channel_axis: Which axis of a row counts channels; a row of one dimension has a single channel.

    Raises:
        WireError: NOT_FINITE where a value is NaN, infinite, or beyond what the codec can hold; UNSUPPORTED for a codec
            that is not in ``CODECS``; DTYPE_MISMATCH; SHAPE_MISMATCH; EMPTY_BATCH where a row has no values;
            INVALID_ARGUMENT for a row without that axis.
    """
    if codec not in CODECS:
        raise WireError(ErrorCode.UNSUPPORTED, f"there is no codec {codec[:40]!r}; there are {', '.join(CODECS)}")
    if features.dtype.kind != "f" or features.dtype.itemsize > 4:
        raise WireError(ErrorCode.DTYPE_MISMATCH, f"features are {features.dtype}; float32 or float16 is needed")
    _check_row(features.shape[1:], channel_axis)
    if codec == FLOAT16:
        return _to_float16(features)
    if codec == FLOAT32:
        check_finite(features)
        return features.astype(np.float32, copy=False)
    return _pack_bfloat16(features) if codec == BFLOAT16 else _pack_affine(features, codec, channel_axis)


def unpack(rows: PackedRows) -> npt.NDArray[np.float32]:
    """Return packed rows as float32 features, (B, ...).

    They are finite. Rows that came from somewhere else go through ``check_packed`` first.
    """
    values = math.prod(rows.row_shape)
    features_BN = np.empty((len(rows), values), np.float32)
    if rows.codec == BFLOAT16:
        bits_BN = np.ascontiguousarray(rows.data_BZ).view("<u2")
        np.left_shift(bits_BN, 16, out=features_BN.view(np.uint32), dtype=np.uint32)
        return features_BN.reshape(rows.shape)
    _, channels, _ = layout = _layout(rows.row_shape, rows.channel_axis)
    wide_B = _wide(rows.offset_BC, rows.scale_BC, _LEVELS[rows.codec])
    for block in _blocks(len(rows), values):
        q_BN = rows.data_BZ[block] if rows.codec == INT8 else _split_halves(rows.data_BZ[block], values)
        q_BOCI = q_BN.reshape(-1, *layout)
        scale_BOCI = rows.scale_BC[block].reshape(-1, 1, channels, 1)
        offset_BOCI = rows.offset_BC[block].reshape(-1, 1, channels, 1)
        x_BOCI = features_BN[block].reshape(-1, *layout)
        with np.errstate(over="ignore"):  # of the wide rows, whose values are replaced
            np.multiply(q_BOCI, scale_BOCI, out=x_BOCI)
            np.add(x_BOCI, offset_BOCI, out=x_BOCI)
        (wide,) = np.nonzero(wide_B[block])
        if len(wide):
            x_BOCI[wide] = q_BOCI[wide] * scale_BOCI[wide].astype(np.float64) + offset_BOCI[wide]
    return features_BN.reshape(rows.shape)


def check_packed(rows: PackedRows) -> None:
    """Check packed rows that came from somewhere else: that they can be unpacked, to finite values.

    Raises:
        WireError: UNSUPPORTED for a codec that does not pack; SHAPE_MISMATCH, INVALID_ARGUMENT, EMPTY_BATCH or
            DTYPE_MISMATCH where shapes or types do not agree; NOT_FINITE, naming the first bad row, where a value, a
            scale or an offset is NaN or infinite; CORRUPT_DATA for what no packer writes: a scale below 0, or bits
            beyond the last value of a row.
    """
    if rows.codec not in PACKED_CODECS:
        raise WireError(
            ErrorCode.UNSUPPORTED, f"rows of {rows.codec[:40]!r} are not packed; {', '.join(PACKED_CODECS)} are"
        )
    _check_row(rows.row_shape, rows.channel_axis)
    channels = 0 if rows.codec == BFLOAT16 else num_channels(rows.row_shape, rows.channel_axis)
    data_bytes = row_bytes(rows.row_shape, rows.codec, rows.channel_axis) - 8 * channels
    for what, array, dtype, width in (
        ("data", rows.data_BZ, np.uint8, data_bytes),
        ("scale", rows.scale_BC, np.float32, channels),
        ("offset", rows.offset_BC, np.float32, channels),
    ):
        if array.dtype != dtype:
            raise WireError(ErrorCode.DTYPE_MISMATCH, f"{what} is {array.dtype}; {np.dtype(dtype)} is needed")
        if array.shape != (len(rows), width):
            raise WireError(
                ErrorCode.SHAPE_MISMATCH,
                f"{what} has shape {array.shape}; {rows.codec} rows of shape {rows.row_shape} with channels on axis "
                f"{rows.channel_axis} need {(len(rows), width)}",
            )
    if rows.codec == BFLOAT16:
        bits_BN = np.ascontiguousarray(rows.data_BZ).view("<u2")
        if not are_bits_finite(bits_BN, BFLOAT16_INFINITY):
            raise not_finite((bits_BN & BFLOAT16_INFINITY) == BFLOAT16_INFINITY, NAN_OR_INFINITY)
        return
    _check_scales(rows)
    if rows.codec == INT4 and math.prod(rows.row_shape) % 2 and (rows.data_BZ[:, -1] > 0x0F).any():
        raise WireError(ErrorCode.CORRUPT_DATA, "rows of an odd number of values end in half a byte that must be 0")


def num_channels(row_shape: Sequence[int], channel_axis: int) -> int:
    """Return how many scales a row has: a row of one dimension has one."""
    return row_shape[channel_axis] if len(row_shape) > 1 else 1


def row_bytes(row_shape: Sequence[int], codec: str, channel_axis: int = 0) -> int:
    """Return the size of one row in a codec, or of pixels as ``uint8``; scales and offsets included, without zstd."""
    data_bytes = -(-math.prod(row_shape) * _BITS[codec] // 8)
    return data_bytes + (8 * num_channels(row_shape, channel_axis) if codec in _LEVELS else 0)


def codec_of(rows: npt.NDArray[np.generic] | PackedRows | Sequence[bytes]) -> str:
    """Return the codec of rows as row ids name it: ``images``, ``uint8``, ``float16`` ..."""
    if isinstance(rows, PackedRows):
        return rows.codec
    if not isinstance(rows, np.ndarray):
        return IMAGES
    return _NAME_BY_DTYPE.get(rows.dtype) or rows.dtype.name


def _check_row(row_shape: Sequence[int], channel_axis: int) -> None:
    if not 1 <= len(row_shape) < MAX_RANK:
        raise WireError(
            ErrorCode.SHAPE_MISMATCH,
            f"a row has shape {tuple(row_shape)}; 1 to {MAX_RANK - 1} dimensions are needed, after that of the rows",
        )
    if not 0 <= channel_axis < len(row_shape):
        raise WireError(
            ErrorCode.INVALID_ARGUMENT,
            f"a row of shape {tuple(row_shape)} has no channel axis {channel_axis}; its axes are 0 to "
            f"{len(row_shape) - 1}",
        )
    if min(row_shape) < 1:
        raise WireError(ErrorCode.EMPTY_BATCH, f"a row of shape {tuple(row_shape)} holds no values")


def _layout(row_shape: Sequence[int], channel_axis: int) -> tuple[int, int, int]:
    """Return how many values of a row lie outside of the channel axis, along it, and inside."""
    if len(row_shape) == 1:
        return 1, 1, row_shape[0]
    return math.prod(row_shape[:channel_axis]), row_shape[channel_axis], math.prod(row_shape[channel_axis + 1 :])


def _blocks(num_rows: int, values: int) -> Iterator[slice]:
    """Yield ranges of rows: what is worked on at once stays in a processor's cache, and temporaries stay small."""
    step = max(1, _BLOCK_VALUES // values)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _to_float16(features: npt.NDArray[np.floating]) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        halves = features.astype(np.float16, copy=False)
    if not is_finite(halves):
        check_finite(features)
        raise not_finite(
            ~np.isfinite(halves),
            "values beyond 65504, the largest of float16",
            "Send float32, bfloat16 or int8 instead",
        )
    return halves


def _pack_bfloat16(features: npt.NDArray[np.floating]) -> PackedRows:
    num_rows, row_shape = len(features), features.shape[1:]
    values = math.prod(row_shape)
    bits_BN = np.empty((num_rows, values), "<u2")
    for block in _blocks(num_rows, values):
        x_BN = np.ascontiguousarray(features[block], np.float32).reshape(-1, values)
        low, high = x_BN.min(), x_BN.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            check_finite(features)
        if low < -_BFLOAT16_LARGEST or high > _BFLOAT16_LARGEST:
            x_BN = np.clip(x_BN, -_BFLOAT16_LARGEST, _BFLOAT16_LARGEST)
        # To the nearest, ties to even: half of what is dropped is added, less one bit where the kept part is even.
        wide_BN = x_BN.view(np.uint32)
        odd_BN = (wide_BN >> 16) & 1
        odd_BN += 0x7FFF
        odd_BN += wide_BN
        np.right_shift(odd_BN, 16, out=odd_BN)
        bits_BN[block] = odd_BN
    none_BC = np.empty((num_rows, 0), np.float32)
    return PackedRows(BFLOAT16, row_shape, 0, bits_BN.view(np.uint8), none_BC, none_BC)


def _pack_affine(features: npt.NDArray[np.floating], codec: str, channel_axis: int) -> PackedRows:
    num_rows, row_shape = len(features), features.shape[1:]
    _, channels, _ = layout = _layout(row_shape, channel_axis)
    values, levels = math.prod(row_shape), _LEVELS[codec]
    data_BZ = np.empty((num_rows, values if codec == INT8 else -(-values // 2)), np.uint8)
    scale_BC = np.empty((num_rows, channels), np.float32)
    offset_BC = np.empty((num_rows, channels), np.float32)
    for block in _blocks(num_rows, values):
        x_BOCI = np.ascontiguousarray(features[block], np.float32).reshape(-1, *layout)
        low_BC, high_BC = x_BOCI.min(axis=(1, 3)), x_BOCI.max(axis=(1, 3))
        if not (np.isfinite(low_BC).all() and np.isfinite(high_BC).all()):
            check_finite(features)
        low_BC += 0.0  # -0 becomes 0: which zero is the smaller depends on the order of the search
        offset_BC[block] = low_BC
        scale_BC[block] = _scales(low_BC, high_BC, levels)
        q_BN = _quantised(x_BOCI, offset_BC[block], scale_BC[block], levels).reshape(-1, values)
        data_BZ[block] = q_BN if codec == INT8 else _join_halves(q_BN)
    return PackedRows(codec, row_shape, channel_axis, data_BZ, scale_BC, offset_BC)


def _scales(low_BC: npt.NDArray[np.float32], high_BC: npt.NDArray[np.float32], levels: int) -> npt.NDArray[np.float32]:
    span_BC = high_BC.astype(np.float64) - low_BC
    scale_BC = (span_BC / levels).astype(np.float32)
    # Smaller than a normal number it would be rounded coarsely, or to 0.
    scale_BC[span_BC > 0] = np.maximum(scale_BC, _SMALLEST_NORMAL)[span_BC > 0]
    # Rounded up it may lead beyond the largest number.
    beyond_BC = low_BC + levels * scale_BC.astype(np.float64) > _LARGEST
    scale_BC[beyond_BC] = np.nextafter(scale_BC[beyond_BC], np.float32(0))
    return scale_BC


def _wide(offset_BC: npt.NDArray[np.float32], scale_BC: npt.NDArray[np.float32], levels: int) -> npt.NDArray[np.bool_]:
    """Return which rows are so large that float32 may overflow on the way to a value that it can hold."""
    top_B = np.abs(offset_BC).max(axis=1, initial=0.0)
    span_B = levels * scale_BC.max(axis=1, initial=0.0).astype(np.float64)
    wide_B: npt.NDArray[np.bool_] = np.maximum(top_B, span_B) > _LARGEST / 4
    return wide_B


def _quantised(
    x_BOCI: npt.NDArray[np.float32], offset_BC: npt.NDArray[np.float32], scale_BC: npt.NDArray[np.float32], levels: int
) -> npt.NDArray[np.uint8]:
    offset_BOCI, scale_BOCI = offset_BC[:, None, :, None], scale_BC[:, None, :, None]
    inverse_BOCI = np.divide(1.0, scale_BOCI, out=np.zeros_like(scale_BOCI), where=scale_BOCI > 0)
    with np.errstate(over="ignore", invalid="ignore"):  # of the wide rows, which are done again
        t_BOCI = x_BOCI - offset_BOCI
        t_BOCI *= inverse_BOCI
    (wide,) = np.nonzero(_wide(offset_BC, scale_BC, levels))
    if len(wide):
        t_BOCI[wide] = (x_BOCI[wide].astype(np.float64) - offset_BOCI[wide]) * inverse_BOCI[wide]
    np.rint(t_BOCI, out=t_BOCI)
    return t_BOCI.astype(np.uint8)


def _join_halves(q_BN: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Put two values of 4 bits into each byte, the first in the low half."""
    if q_BN.shape[1] % 2:
        q_BN = np.pad(q_BN, ((0, 0), (0, 1)))
    pair_BZ = q_BN.view("<u2")
    pair_BZ |= pair_BZ >> 4
    return pair_BZ.astype(np.uint8)


def _split_halves(data_BZ: npt.NDArray[np.uint8], values: int) -> npt.NDArray[np.uint8]:
    pair_BZ = data_BZ.astype("<u2")
    pair_BZ |= pair_BZ << 4
    pair_BZ &= 0x0F0F
    return pair_BZ.view(np.uint8)[:, :values]


def _check_scales(rows: PackedRows) -> None:
    """Check that every value which scales and offsets can lead to is finite."""
    top_BC = rows.offset_BC + _LEVELS[rows.codec] * rows.scale_BC.astype(np.float64)
    beyond_BC = ~(np.abs(top_BC) <= _LARGEST)  # NaN compares false
    if beyond_BC.any():
        raise not_finite(beyond_BC, "a scale or offset that is NaN or infinite, or leads beyond float32")
    if (rows.scale_BC < 0).any():
        raise WireError(
            ErrorCode.CORRUPT_DATA, f"a scale is below 0, in row {int((rows.scale_BC < 0).any(axis=1).argmax())}"
        )
