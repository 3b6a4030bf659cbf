"""numpy <-> Tensor message. Never pickle: what arrives is bounded and checked before anything is allocated.

What codecs do to features is in ``trunkline_wire.quantise``; here is how they lie in a message.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trunkline_wire.compress import compress as zstd_frame
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.finite import check_finite
from trunkline_wire.limits import MAX_BATCH_ROWS, MAX_IMAGE_BYTES, MAX_PAYLOAD_BYTES, MAX_RANK
from trunkline_wire.quantise import BFLOAT16, INT4, INT8, PackedRows, check_packed, num_channels, row_bytes
from trunkline_wire.v1 import tensor_pb2 as pb

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Array = npt.NDArray[np.generic]

DTYPES: dict[int, np.dtype[np.generic]] = {
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    pb.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    pb.DATA_TYPE_UINT8: np.dtype("u1"),
}
"""Data type on the wire to numpy's, little-endian."""

_MIN_WINDOW_LOG = 23
"""Every zstd encoder may use a window of 8 MiB (RFC 8878)."""

_SCALE = np.dtype("<f4")

_CODE_BY_DTYPE = {dtype: code for code, dtype in DTYPES.items()}
_AFFINE_CODECS = {pb.DATA_TYPE_UINT8: INT8, pb.DATA_TYPE_UINT4: INT4}
_CODE_BY_CODEC = {BFLOAT16: pb.DATA_TYPE_BFLOAT16, INT8: pb.DATA_TYPE_UINT8, INT4: pb.DATA_TYPE_UINT4}


def encode_rows(rows: Array | PackedRows, *, compress: bool = False) -> pb.Tensor:
    """Put rows into a message.

    Args:
        rows: An array as ``encode_array`` takes it, or packed rows.
        compress: Whether to apply zstd. Kept only where it makes the data smaller; scales and offsets stay as they are.

    Raises:
        WireError: As ``encode_array``; and as ``quantise.check_packed``.
    """
    return whole(*encode_rows_apart(rows, compress=compress))


def encode_rows_apart(rows: Array | PackedRows, *, compress: bool = False) -> tuple[pb.Tensor, memoryview]:
    """Return a message without its data, and the data: for ``bulk.Apart``. See ``encode_rows``."""
    if not isinstance(rows, PackedRows):
        return encode_array_apart(rows, compress=compress)
    _check_bytes(rows.nbytes)
    check_packed(rows)
    data, compression = _compressed(_bytes_of(rows.data_BZ), compress)
    affine = None
    if rows.codec != BFLOAT16:
        affine = pb.Affine(
            channel_axis=rows.channel_axis,
            scale=rows.scale_BC.astype(_SCALE, copy=False).tobytes(),
            offset=rows.offset_BC.astype(_SCALE, copy=False).tobytes(),
        )
    tensor = pb.Tensor(
        data_type=_CODE_BY_CODEC[rows.codec],
        codec=pb.CODEC_RAW if affine is None else pb.CODEC_AFFINE,
        compression=compression,
        shape=rows.shape,
        affine=affine,
    )
    return tensor, data


def encode_array(array: Array, *, compress: bool = False) -> pb.Tensor:
    """Put an array into a message.

    Args:
        array: (rows, ...), float32, float16 or uint8. Any memory layout.
        compress: Whether to apply zstd. Kept only where it makes the data smaller.

    Raises:
        WireError: DTYPE_MISMATCH, SHAPE_MISMATCH or PAYLOAD_TOO_LARGE.
    """
    return whole(*encode_array_apart(array, compress=compress))


def encode_array_apart(array: Array, *, compress: bool = False) -> tuple[pb.Tensor, memoryview]:
    """Return a message without its data, and the data: for ``bulk.Apart``. See ``encode_array``."""
    little_endian = array.dtype.newbyteorder("<") if array.dtype.byteorder not in "|=<" else array.dtype
    code = _CODE_BY_DTYPE.get(np.dtype(little_endian))
    if code is None:
        names = ", ".join(str(dtype) for dtype in DTYPES.values())
        raise WireError(ErrorCode.DTYPE_MISMATCH, f"cannot send {array.dtype}; one of {names} is needed")
    if not 1 <= array.ndim <= MAX_RANK:
        raise WireError(ErrorCode.SHAPE_MISMATCH, f"a tensor has 1 to {MAX_RANK} dimensions; got shape {array.shape}")
    _check_bytes(array.nbytes)
    data, compression = _compressed(_bytes_of(np.ascontiguousarray(array, dtype=little_endian)), compress)
    tensor = pb.Tensor(
        data_type=code,  # type: ignore[arg-type]
        codec=pb.CODEC_RAW,
        compression=compression,
        shape=array.shape,
    )
    return tensor, data


def whole(tensor: pb.Tensor, data: memoryview) -> pb.Tensor:
    """Put the data back into its message."""
    tensor.data = data.tobytes()
    return tensor


def _bytes_of(array: Array) -> memoryview:
    """Return the memory of a contiguous array as bytes."""
    return array.reshape(-1).view(np.uint8).data


def encode_images(images: Sequence[bytes]) -> pb.Tensor:
    """Put encoded images, one per row, into a message.

    Raises:
        WireError: PAYLOAD_TOO_LARGE.
    """
    _check_bytes(sum(len(image) for image in images))
    return pb.Tensor(
        data_type=pb.DATA_TYPE_UINT8,
        codec=pb.CODEC_ENCODED_IMAGES,
        compression=pb.COMPRESSION_NONE,
        shape=[len(images)],
        encoded=images,
    )


def num_rows(tensor: pb.Tensor) -> int:
    """Return the size of the first dimension as the message claims it, 0 for no dimension."""
    return tensor.shape[0] if tensor.shape else 0


def encoded_size(tensor: pb.Tensor) -> int:
    """Return how many bytes the rows take in the message, framing left out."""
    affine = len(tensor.affine.scale) + len(tensor.affine.offset)
    return len(tensor.data) + affine + sum(len(image) for image in tensor.encoded)


def decode(
    tensor: pb.Tensor, data: memoryview | None = None, *, max_rows: int = MAX_BATCH_ROWS
) -> Array | PackedRows | list[bytes]:
    """Take a message apart: an array, packed rows, or a list of encoded images.

    What was not compressed shares the message's memory and cannot be written to. Floating-point values are checked for
    NaN and infinity, and packed rows as ``quantise.check_packed`` says; they stay packed.

    Args:
        tensor: The message.
        data: What belongs into its ``data``, where ``bulk.reader`` left it outside.
        max_rows: Most rows.

    Raises:
        WireError: EMPTY_BATCH, SHAPE_MISMATCH, DTYPE_MISMATCH, PAYLOAD_TOO_LARGE, NOT_FINITE, CORRUPT_DATA,
            INVALID_ARGUMENT or UNSUPPORTED. Raised before memory is allocated for the result.
    """
    shape = tuple(tensor.shape)
    if not 1 <= len(shape) <= MAX_RANK:
        raise WireError(ErrorCode.SHAPE_MISMATCH, f"a tensor has 1 to {MAX_RANK} dimensions; got {len(shape)}")
    if any(size < 0 for size in shape):
        raise WireError(ErrorCode.SHAPE_MISMATCH, "a dimension is negative")
    if math.prod(shape) == 0:
        raise WireError(ErrorCode.EMPTY_BATCH, f"shape {shape} holds no values")
    if shape[0] > max_rows:
        raise WireError(ErrorCode.PAYLOAD_TOO_LARGE, f"{shape[0]} rows in one message; at most {max_rows}")
    if tensor.HasField("affine") != (tensor.codec == pb.CODEC_AFFINE):
        raise WireError(ErrorCode.INVALID_ARGUMENT, "`affine` goes with CODEC_AFFINE, and with no other codec")
    if data is None:
        data = memoryview(tensor.data)
    if tensor.codec == pb.CODEC_ENCODED_IMAGES:
        return _decode_images(tensor, data, shape)
    if tensor.codec not in (pb.CODEC_RAW, pb.CODEC_AFFINE):
        raise WireError(ErrorCode.UNSUPPORTED, f"codec {tensor.codec} is not known here")
    if tensor.encoded:
        raise WireError(ErrorCode.INVALID_ARGUMENT, "only CODEC_ENCODED_IMAGES carries `encoded`")
    if tensor.codec == pb.CODEC_AFFINE:
        return _decode_affine(tensor, data, shape)
    if tensor.data_type == pb.DATA_TYPE_BFLOAT16:
        return _decode_bfloat16(tensor, data, shape)
    return _decode_raw(tensor, data, shape)


def _decode_images(tensor: pb.Tensor, data: memoryview, shape: tuple[int, ...]) -> list[bytes]:
    if len(shape) != 1 or shape[0] != len(tensor.encoded):
        raise WireError(ErrorCode.SHAPE_MISMATCH, f"{len(tensor.encoded)} encoded images do not fit shape {shape}")
    if data.nbytes or tensor.compression not in (pb.COMPRESSION_UNSPECIFIED, pb.COMPRESSION_NONE):
        raise WireError(ErrorCode.INVALID_ARGUMENT, "encoded images carry no `data` and no compression")
    if tensor.data_type != pb.DATA_TYPE_UINT8:
        raise WireError(ErrorCode.DTYPE_MISMATCH, "encoded images are of data type UINT8")
    for row, image in enumerate(tensor.encoded):
        if len(image) > MAX_IMAGE_BYTES:
            raise WireError(ErrorCode.PAYLOAD_TOO_LARGE, f"row {row}: {len(image)} bytes; at most {MAX_IMAGE_BYTES}")
    return list(tensor.encoded)


def _decode_raw(tensor: pb.Tensor, data: memoryview, shape: tuple[int, ...]) -> Array:
    dtype = DTYPES.get(tensor.data_type)
    if dtype is None:
        raise WireError(ErrorCode.DTYPE_MISMATCH, f"data type {tensor.data_type} is not known here under CODEC_RAW")
    content = _content(tensor, data, math.prod(shape) * dtype.itemsize)
    array: Array = np.frombuffer(content, dtype=dtype).reshape(shape)
    if dtype.kind == "f":
        check_finite(array)
    return array


def _decode_bfloat16(tensor: pb.Tensor, data: memoryview, shape: tuple[int, ...]) -> PackedRows:
    num_rows, *row_shape = _packed_shape(shape)
    content = _content(tensor, data, num_rows * row_bytes(row_shape, BFLOAT16))
    data_BZ = np.frombuffer(content, np.uint8).reshape(num_rows, -1)
    none_BC = np.empty((num_rows, 0), np.float32)
    rows = PackedRows(BFLOAT16, tuple(row_shape), 0, data_BZ, none_BC, none_BC)
    check_packed(rows)
    return rows


def _decode_affine(tensor: pb.Tensor, data: memoryview, shape: tuple[int, ...]) -> PackedRows:
    codec = _AFFINE_CODECS.get(tensor.data_type)
    if codec is None:
        raise WireError(
            ErrorCode.DTYPE_MISMATCH, f"data type {tensor.data_type} under CODEC_AFFINE; UINT8 or UINT4 is needed"
        )
    num_rows, *row_shape = _packed_shape(shape)
    axis = tensor.affine.channel_axis
    if axis >= len(row_shape):
        raise WireError(
            ErrorCode.INVALID_ARGUMENT,
            f"channel axis {axis} of rows of shape {tuple(row_shape)}; their axes are 0 to {len(row_shape) - 1}",
        )
    channels = num_channels(row_shape, axis)
    _check_bytes(num_rows * row_bytes(row_shape, codec, axis))
    for name, given in (("scale", tensor.affine.scale), ("offset", tensor.affine.offset)):
        expected = num_rows * channels * _SCALE.itemsize
        if len(given) != expected:
            raise WireError(
                ErrorCode.SHAPE_MISMATCH,
                f"{len(given)} bytes of {name}; {num_rows} rows of {channels} channels need {expected}",
            )
    content = _content(tensor, data, num_rows * (row_bytes(row_shape, codec, axis) - 2 * _SCALE.itemsize * channels))
    rows = PackedRows(
        codec,
        tuple(row_shape),
        axis,
        np.frombuffer(content, np.uint8).reshape(num_rows, -1),
        np.frombuffer(tensor.affine.scale, _SCALE).reshape(num_rows, channels),
        np.frombuffer(tensor.affine.offset, _SCALE).reshape(num_rows, channels),
    )
    check_packed(rows)
    return rows


def _packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) < 2:
        raise WireError(ErrorCode.SHAPE_MISMATCH, f"shape {shape} of packed rows; a row has one dimension or more")
    return shape


def _content(tensor: pb.Tensor, data: memoryview, expected: int) -> memoryview:
    """Return the data as it was before compression: ``expected`` bytes, or an error."""
    _check_bytes(expected)
    if tensor.compression == pb.COMPRESSION_ZSTD:
        data = memoryview(_decompress(data, expected))
    elif tensor.compression not in (pb.COMPRESSION_UNSPECIFIED, pb.COMPRESSION_NONE):
        raise WireError(ErrorCode.UNSUPPORTED, f"compression {tensor.compression} is not known here")
    if data.nbytes != expected:
        raise WireError(
            ErrorCode.SHAPE_MISMATCH,
            f"{data.nbytes} bytes of data; shape {tuple(tensor.shape)} of {pb.DataType.Name(tensor.data_type)} needs "
            f"{expected}",
        )
    return data


def _compressed(data: memoryview, compress: bool) -> tuple[memoryview, pb.Compression]:
    if compress:
        frame = zstd_frame(data)
        if len(frame) < data.nbytes:
            return memoryview(frame), pb.COMPRESSION_ZSTD
    return data, pb.COMPRESSION_NONE


def _decompress(data: memoryview, expected: int) -> bytes:
    # Never past the size that the shape allows, whatever the frame's header claims; and with a window no larger than
    # the data can need, since the window is allocated before the first byte comes out.
    window_log = max(_MIN_WINDOW_LOG, expected.bit_length())
    try:
        with zstd.ZstdFile(
            io.BytesIO(data), options={zstd.DecompressionParameter.window_log_max: window_log}
        ) as stream:
            return stream.read(expected + 1)
    except (zstd.ZstdError, EOFError) as error:
        raise WireError(ErrorCode.CORRUPT_DATA, "compressed data is damaged") from error


def _check_bytes(num_bytes: int) -> None:
    if num_bytes > MAX_PAYLOAD_BYTES:
        raise WireError(
            ErrorCode.PAYLOAD_TOO_LARGE,
            f"{num_bytes} bytes in one message; at most {MAX_PAYLOAD_BYTES}. Send fewer rows at a time",
        )
