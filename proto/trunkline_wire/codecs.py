"""numpy <-> Tensor message. Never pickle: what arrives is bounded and checked before anything is allocated."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_BATCH_ROWS, MAX_IMAGE_BYTES, MAX_PAYLOAD_BYTES, MAX_RANK
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

_CODE_BY_DTYPE = {dtype: code for code, dtype in DTYPES.items()}


def encode_array(array: Array, *, compress: bool = False) -> pb.Tensor:
    """Put an array into a message.

    Args:
        array: (rows, ...), float32, float16 or uint8. Any memory layout.
        compress: Whether to apply zstd. Kept only where it makes the data smaller.

    Raises:
        WireError: DTYPE_MISMATCH, SHAPE_MISMATCH or PAYLOAD_TOO_LARGE.
    """
    little_endian = array.dtype.newbyteorder("<") if array.dtype.byteorder not in "|=<" else array.dtype
    code = _CODE_BY_DTYPE.get(np.dtype(little_endian))
    if code is None:
        names = ", ".join(str(dtype) for dtype in DTYPES.values())
        raise WireError(ErrorCode.DTYPE_MISMATCH, f"cannot send {array.dtype}; one of {names} is needed")
    if not 1 <= array.ndim <= MAX_RANK:
        raise WireError(ErrorCode.SHAPE_MISMATCH, f"a tensor has 1 to {MAX_RANK} dimensions; got shape {array.shape}")
    _check_bytes(array.nbytes)
    data = np.ascontiguousarray(array, dtype=little_endian).tobytes()
    compression = pb.COMPRESSION_NONE
    if compress:
        packed = zstd.compress(data, 3)
        if len(packed) < len(data):
            data, compression = packed, pb.COMPRESSION_ZSTD
    return pb.Tensor(
        data_type=code,  # type: ignore[arg-type]
        codec=pb.CODEC_RAW,
        compression=compression,
        shape=array.shape,
        data=data,
    )


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


def decode(tensor: pb.Tensor, *, max_rows: int = MAX_BATCH_ROWS) -> Array | list[bytes]:
    """Take a message apart: an array, or a list of encoded images.

    An array of uncompressed data shares the message's memory and cannot be written to. Floating-point values are
    checked for NaN and infinity.

    Raises:
        WireError: EMPTY_BATCH, SHAPE_MISMATCH, DTYPE_MISMATCH, PAYLOAD_TOO_LARGE, NOT_FINITE, CORRUPT_DATA or
            UNSUPPORTED. Raised before memory is allocated for the result.
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
    if tensor.codec == pb.CODEC_ENCODED_IMAGES:
        return _decode_images(tensor, shape)
    if tensor.codec != pb.CODEC_RAW:
        raise WireError(ErrorCode.UNSUPPORTED, f"codec {tensor.codec} is not known here")
    return _decode_raw(tensor, shape)


def _decode_images(tensor: pb.Tensor, shape: tuple[int, ...]) -> list[bytes]:
    if len(shape) != 1 or shape[0] != len(tensor.encoded):
        raise WireError(ErrorCode.SHAPE_MISMATCH, f"{len(tensor.encoded)} encoded images do not fit shape {shape}")
    if tensor.data or tensor.compression not in (pb.COMPRESSION_UNSPECIFIED, pb.COMPRESSION_NONE):
        raise WireError(ErrorCode.INVALID_ARGUMENT, "encoded images carry no `data` and no compression")
    if tensor.data_type != pb.DATA_TYPE_UINT8:
        raise WireError(ErrorCode.DTYPE_MISMATCH, "encoded images are of data type UINT8")
    for row, image in enumerate(tensor.encoded):
        if len(image) > MAX_IMAGE_BYTES:
            raise WireError(ErrorCode.PAYLOAD_TOO_LARGE, f"row {row}: {len(image)} bytes; at most {MAX_IMAGE_BYTES}")
    return list(tensor.encoded)


def _decode_raw(tensor: pb.Tensor, shape: tuple[int, ...]) -> Array:
    dtype = DTYPES.get(tensor.data_type)
    if dtype is None:
        raise WireError(ErrorCode.DTYPE_MISMATCH, f"data type {tensor.data_type} is not known here")
    if tensor.encoded:
        raise WireError(ErrorCode.INVALID_ARGUMENT, "a raw tensor carries no `encoded` images")
    expected = math.prod(shape) * dtype.itemsize
    _check_bytes(expected)
    data = tensor.data
    if tensor.compression == pb.COMPRESSION_ZSTD:
        data = _decompress(data, expected)
    elif tensor.compression not in (pb.COMPRESSION_UNSPECIFIED, pb.COMPRESSION_NONE):
        raise WireError(ErrorCode.UNSUPPORTED, f"compression {tensor.compression} is not known here")
    if len(data) != expected:
        raise WireError(
            ErrorCode.SHAPE_MISMATCH, f"{len(data)} bytes of data; shape {shape} of {dtype} needs {expected}"
        )
    array: Array = np.frombuffer(data, dtype=dtype).reshape(shape)
    if dtype.kind == "f":
        check_finite(array)
    return array


def _decompress(data: bytes, expected: int) -> bytes:
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


def check_finite(array: Array) -> None:
    """Check floating-point rows for NaN and infinity.

    Raises:
        WireError: NOT_FINITE, naming the first bad row.
    """
    if not _all_finite(array):
        bad = ~np.isfinite(array).reshape(array.shape[0], -1).all(axis=1)
        raise WireError(
            ErrorCode.NOT_FINITE,
            f"{int(bad.sum())} of {array.shape[0]} rows hold NaN or infinity, the first is row {int(bad.argmax())}",
        )


def _all_finite(array: Array) -> bool:
    if array.dtype.itemsize != 2:
        return bool(np.isfinite(array).all())
    # numpy converts each float16 in software. Its bits tell the same six times as fast: as numbers, 0x7C00 and above
    # are infinity and NaN; with the sign bit, 0xFC00 and above.
    order = array.dtype.str[0]
    highest_positive = array.view(f"{order}i2").max(initial=0)
    highest_negative = array.view(f"{order}u2").max(initial=0)
    return bool(highest_positive < 0x7C00 and highest_negative < 0xFC00)


def _check_bytes(num_bytes: int) -> None:
    if num_bytes > MAX_PAYLOAD_BYTES:
        raise WireError(
            ErrorCode.PAYLOAD_TOO_LARGE,
            f"{num_bytes} bytes in one message; at most {MAX_PAYLOAD_BYTES}. Send fewer rows at a time",
        )
