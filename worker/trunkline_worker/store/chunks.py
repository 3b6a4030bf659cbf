"""Rows packed into chunks: safetensors, so nothing stored can run code when it is read.

A chunk holds features of equal shape, as they are or packed; or encoded images one after another with offsets. Its
blob's path is made of its own SHA-256, checked before it is taken apart.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_IMAGE_BYTES, MAX_RANK
from trunkline_wire.quantise import IMAGES, PackedRows, check_packed

from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.records import RowLocation

# Shape suffix legend: B = rows, C = channels, Z = bytes of a row

Payload = npt.NDArray[np.generic] | PackedRows | Sequence[bytes]
"""Features, (rows, ...), or the same in fewer bytes; or encoded images, one per row."""

MAX_CHUNK_BYTES = 256 * 2**20
"""Largest chunk."""

_MAX_HEADER_BYTES = 4096
_DTYPES = (np.dtype("<f4"), np.dtype("<f2"), np.dtype("u1"))

_PACKED: Mapping[str, np.dtype[np.generic]] = {
    "codec": np.dtype("u1"),
    "layout": np.dtype("<u8"),
    "data": np.dtype("u1"),
    "scale": np.dtype("<f4"),
    "offset": np.dtype("<f4"),
}
"""Tensors of packed rows, and their types: the codec's name in ASCII, the channel axis followed by the shape of a row,
and the arrays of ``PackedRows``. Nothing is in the file's own metadata, whose entries come in no certain order."""

_Tensors = Mapping[str, npt.NDArray[np.generic]]
_Scalar = TypeVar("_Scalar", bound=np.generic)


def chunk_path(sha256_hex: str) -> str:
    """Return where a chunk lies in a ``BlobStore``."""
    return f"chunks/{sha256_hex[:2]}/{sha256_hex}"


def pack_rows(rows: Payload) -> bytes:
    """Return rows as the bytes of a chunk. Equal rows give equal bytes.

    Args:
        rows: float32, float16 or uint8 in any memory layout; packed rows; or encoded images.

    Raises:
        WireError: EMPTY_BATCH, DTYPE_MISMATCH, SHAPE_MISMATCH or PAYLOAD_TOO_LARGE; for packed rows also as
            ``quantise.check_packed``.
    """
    tensors: _Tensors
    if isinstance(rows, np.ndarray):
        tensors = {"rows": _checked_features(rows)}
    elif isinstance(rows, PackedRows):
        tensors = _packed_tensors(rows)
    else:
        tensors = _joined_images(rows)
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > MAX_CHUNK_BYTES - _MAX_HEADER_BYTES:
        raise WireError(ErrorCode.PAYLOAD_TOO_LARGE, f"a chunk of {size} bytes; at most {MAX_CHUNK_BYTES}: split it")
    return safetensors.numpy.save(dict(tensors))


def _checked_features(rows: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    dtype = rows.dtype.newbyteorder("<")
    if dtype not in _DTYPES:
        names = ", ".join(one.name for one in _DTYPES)
        raise WireError(ErrorCode.DTYPE_MISMATCH, f"a chunk cannot hold {rows.dtype}; one of {names} is needed")
    if not 1 <= rows.ndim <= MAX_RANK:
        raise WireError(ErrorCode.SHAPE_MISMATCH, f"a chunk has 1 to {MAX_RANK} dimensions; got shape {rows.shape}")
    if rows.size == 0:
        raise WireError(ErrorCode.EMPTY_BATCH, f"a chunk of shape {rows.shape} holds no values")
    return np.ascontiguousarray(rows, dtype=dtype)


def _packed_tensors(rows: PackedRows) -> _Tensors:
    if rows.data_BZ.size == 0:
        raise WireError(ErrorCode.EMPTY_BATCH, f"a chunk of shape {rows.shape} holds no values")
    check_packed(rows)
    tensors: _Tensors = {
        "codec": np.frombuffer(rows.codec.encode("ascii"), dtype=np.uint8),
        "layout": np.array([rows.channel_axis, *rows.row_shape]),
        "data": rows.data_BZ,
        "scale": rows.scale_BC,
        "offset": rows.offset_BC,
    }
    return {name: np.ascontiguousarray(tensor, dtype=_PACKED[name]) for name, tensor in tensors.items()}


def _joined_images(rows: Sequence[bytes]) -> dict[str, npt.NDArray[np.generic]]:
    if not rows:
        raise WireError(ErrorCode.EMPTY_BATCH, "a chunk without images")
    for index, row in enumerate(rows):
        if len(row) > MAX_IMAGE_BYTES:
            raise WireError(ErrorCode.PAYLOAD_TOO_LARGE, f"row {index}: {len(row)} bytes; at most {MAX_IMAGE_BYTES}")
    offsets = np.zeros(len(rows) + 1, dtype="<u8")
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return {"encoded": np.frombuffer(b"".join(rows), dtype=np.uint8), "offsets": offsets}


def unpack_rows(data: bytes) -> Payload:
    """Take a chunk apart.

    Raises:
        WireError: CORRUPT_DATA, before anything beyond the chunk's own size is allocated.
    """
    if len(data) > MAX_CHUNK_BYTES:
        raise _corrupt(f"{len(data)} bytes; at most {MAX_CHUNK_BYTES}")
    header_bytes = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header_bytes > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise _corrupt("its header does not fit")
    try:
        tensors: _Tensors = safetensors.numpy.load(data)
    except Exception as error:  # the parser, and numpy behind it, raise many kinds on damaged data
        raise _corrupt("it cannot be parsed") from error
    if tensors.keys() == {"rows"}:
        rows = tensors["rows"]
        if rows.dtype not in _DTYPES or not 1 <= rows.ndim <= MAX_RANK or rows.size == 0:
            raise _corrupt(f"it holds {rows.dtype} of shape {rows.shape}")
        return rows
    if tensors.keys() == {"encoded", "offsets"}:
        return _split_images(tensors["encoded"], tensors["offsets"])
    if tensors.keys() == _PACKED.keys():
        return _checked_packed(tensors)
    raise _corrupt("it holds neither features nor images")


def _checked_packed(tensors: _Tensors) -> PackedRows:
    for name, dtype in _PACKED.items():
        rank = 1 if name in ("codec", "layout") else 2
        if tensors[name].dtype != dtype or tensors[name].ndim != rank:
            raise _corrupt(f"its {name} is {tensors[name].dtype} of shape {tensors[name].shape}")
    if not 2 <= len(tensors["layout"]) <= MAX_RANK or len(tensors["data"]) == 0:
        raise _corrupt(f"it holds {len(tensors['data'])} rows of {len(tensors['layout']) - 1} dimensions")
    channel_axis, *row_shape = tensors["layout"].tolist()
    rows = PackedRows(
        codec=tensors["codec"].tobytes().decode("ascii", "replace"),
        row_shape=tuple(row_shape),
        channel_axis=channel_axis,
        data_BZ=cast("npt.NDArray[np.uint8]", tensors["data"]),
        scale_BC=cast("npt.NDArray[np.float32]", tensors["scale"]),
        offset_BC=cast("npt.NDArray[np.float32]", tensors["offset"]),
    )
    try:
        check_packed(rows)
    except WireError as error:
        raise _corrupt(error.message) from error
    return rows


def _split_images(encoded: npt.NDArray[np.generic], offsets: npt.NDArray[np.generic]) -> list[bytes]:
    if encoded.dtype != np.uint8 or encoded.ndim != 1 or offsets.dtype != np.dtype("<u8") or offsets.ndim != 1:
        raise _corrupt("its images have the wrong type")
    edges = [int(edge) for edge in offsets.tolist()]
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != len(encoded):
        raise _corrupt("its images' offsets do not fit")
    if any(not 0 <= stop - start <= MAX_IMAGE_BYTES for start, stop in pairwise(edges)):
        raise _corrupt(f"an image has a size outside 0 to {MAX_IMAGE_BYTES} bytes")
    joined = encoded.tobytes()
    return [joined[start:stop] for start, stop in pairwise(edges)]


def _corrupt(why: str) -> WireError:
    return WireError(ErrorCode.CORRUPT_DATA, f"a stored chunk of rows is damaged: {why}")


def take(rows: Payload, indices: Sequence[int] | npt.NDArray[np.integer]) -> Payload:
    """Return the rows at ``indices``, in that order.

    Raises:
        WireError: CORRUPT_DATA where an index lies outside: the index and the chunk do not belong together.
    """
    positions = np.asarray(indices, dtype=np.int64)
    if positions.size and (positions.min() < 0 or positions.max() >= len(rows)):
        raise _corrupt(f"row {int(positions.max())} was asked for; it holds {len(rows)}")
    if isinstance(rows, np.ndarray):
        return rows[positions]
    if isinstance(rows, PackedRows):
        return rows.take(positions)
    return [rows[position] for position in positions.tolist()]


def write_chunk(blobs: BlobStore, rows: Payload) -> str:
    """Store rows durably and return the chunk's id, its SHA-256 in hex. Only then may an index name it.

    Raises:
        WireError: As ``pack_rows`` and ``BlobStore.put``.
    """
    data = pack_rows(rows)
    sha256_hex = hashlib.sha256(data).hexdigest()
    blobs.put(chunk_path(sha256_hex), data)
    return sha256_hex


def read_chunk(blobs: BlobStore, sha256_hex: str) -> Payload:
    """Return the rows of a chunk, its hash checked first.

    Raises:
        WireError: NOT_FOUND or CORRUPT_DATA.
    """
    return unpack_rows(blobs.get_checked(chunk_path(sha256_hex), sha256_hex))


def read_rows(blobs: BlobStore, locations: Sequence[RowLocation]) -> Payload:
    """Return rows in the order of ``locations``, reading every chunk once.

    Raises:
        WireError: EMPTY_BATCH, NOT_FOUND, CORRUPT_DATA; INCOMPATIBLE where the rows do not have one shape and codec.
    """
    if not locations:
        raise WireError(ErrorCode.EMPTY_BATCH, "no rows were asked for")
    by_chunk: dict[str, list[int]] = defaultdict(list)
    for position, location in enumerate(locations):
        by_chunk[location.chunk].append(position)
    gathered: Payload | None = None
    for chunk, positions in by_chunk.items():
        part = take(read_chunk(blobs, chunk), [locations[position].index for position in positions])
        if gathered is None:
            gathered = _room_for(part, len(locations))
        if _kind(part) != _kind(gathered):
            raise WireError(ErrorCode.INCOMPATIBLE, f"rows of {_kind(part)} among rows of {_kind(gathered)}")
        _put(gathered, positions, part)
    assert gathered is not None  # there was a location, so there was a chunk
    return gathered


def _kind(rows: Payload) -> str:
    """Return in words what rows must have in common to stand beside one another."""
    if isinstance(rows, np.ndarray):
        return f"{rows.dtype} {rows.shape[1:]}"
    if isinstance(rows, PackedRows):
        return f"{rows.codec} {rows.row_shape} with channels in axis {rows.channel_axis}"
    return IMAGES


def _room_for(part: Payload, num_rows: int) -> Payload:
    """Return room for rows of the kind of ``part``."""
    if isinstance(part, np.ndarray):
        return _rows_like(part, num_rows)
    if isinstance(part, PackedRows):
        return PackedRows(
            part.codec,
            part.row_shape,
            part.channel_axis,
            _rows_like(part.data_BZ, num_rows),
            _rows_like(part.scale_BC, num_rows),
            _rows_like(part.offset_BC, num_rows),
        )
    return [b""] * num_rows


def _rows_like(part: npt.NDArray[_Scalar], num_rows: int) -> npt.NDArray[_Scalar]:
    return np.empty((num_rows, *part.shape[1:]), dtype=part.dtype)


def _put(gathered: Payload, positions: Sequence[int], part: Payload) -> None:
    """Put rows where they belong among others of their kind."""
    if isinstance(gathered, np.ndarray) and isinstance(part, np.ndarray):
        gathered[positions] = part
    elif isinstance(gathered, PackedRows) and isinstance(part, PackedRows):
        gathered.data_BZ[positions] = part.data_BZ
        gathered.scale_BC[positions] = part.scale_BC
        gathered.offset_BC[positions] = part.offset_BC
    elif isinstance(gathered, list) and not isinstance(part, np.ndarray | PackedRows):
        for position, image in zip(positions, part, strict=True):
            gathered[position] = image
