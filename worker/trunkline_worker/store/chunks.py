"""Rows packed into chunks: safetensors, so nothing stored can run code when it is read.

A chunk holds features of equal shape, or encoded images one after another with offsets. Its blob's path is made of its
own SHA-256, checked before it is taken apart.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_IMAGE_BYTES, MAX_RANK

from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.records import RowLocation

Payload = npt.NDArray[np.generic] | Sequence[bytes]
"""Features, (rows, ...); or encoded images, one per row."""

MAX_CHUNK_BYTES = 256 * 2**20
"""Largest chunk."""

IMAGES_CODEC = "images"
"""Codec of rows that are encoded images."""

_MAX_HEADER_BYTES = 4096
_DTYPES = (np.dtype("<f4"), np.dtype("<f2"), np.dtype("u1"))


def chunk_path(sha256_hex: str) -> str:
    """Return where a chunk lies in a ``BlobStore``."""
    return f"chunks/{sha256_hex[:2]}/{sha256_hex}"


def codec_of(rows: Payload) -> str:
    """Return the codec as row ids name it: ``images``, or the features' type."""
    return rows.dtype.name if isinstance(rows, np.ndarray) else IMAGES_CODEC


def pack_rows(rows: Payload) -> bytes:
    """Return rows as the bytes of a chunk. Equal rows give equal bytes.

    Args:
        rows: float32, float16 or uint8 in any memory layout; or encoded images.

    Raises:
        WireError: EMPTY_BATCH, DTYPE_MISMATCH, SHAPE_MISMATCH or PAYLOAD_TOO_LARGE.
    """
    tensors = {"rows": _checked_features(rows)} if isinstance(rows, np.ndarray) else _joined_images(rows)
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > MAX_CHUNK_BYTES - _MAX_HEADER_BYTES:
        raise WireError(ErrorCode.PAYLOAD_TOO_LARGE, f"a chunk of {size} bytes; at most {MAX_CHUNK_BYTES}: split it")
    return safetensors.numpy.save(tensors)


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
        tensors: Mapping[str, npt.NDArray[np.generic]] = safetensors.numpy.load(data)
    except Exception as error:  # the parser, and numpy behind it, raise many kinds on damaged data
        raise _corrupt("it cannot be parsed") from error
    if tensors.keys() == {"rows"}:
        rows = tensors["rows"]
        if rows.dtype not in _DTYPES or not 1 <= rows.ndim <= MAX_RANK or rows.size == 0:
            raise _corrupt(f"it holds {rows.dtype} of shape {rows.shape}")
        return rows
    if tensors.keys() == {"encoded", "offsets"}:
        return _split_images(tensors["encoded"], tensors["offsets"])
    raise _corrupt("it holds neither features nor images")


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
        WireError: EMPTY_BATCH, NOT_FOUND, CORRUPT_DATA; INCOMPATIBLE where the rows do not have one shape and kind.
    """
    if not locations:
        raise WireError(ErrorCode.EMPTY_BATCH, "no rows were asked for")
    by_chunk: dict[str, list[int]] = defaultdict(list)
    for position, location in enumerate(locations):
        by_chunk[location.chunk].append(position)
    images: dict[int, bytes] = {}
    features: npt.NDArray[np.generic] | None = None
    for chunk, positions in by_chunk.items():
        part = take(read_chunk(blobs, chunk), [locations[position].index for position in positions])
        if not isinstance(part, np.ndarray):
            images.update(zip(positions, part, strict=True))
            continue
        if features is None:
            features = np.empty((len(locations), *part.shape[1:]), dtype=part.dtype)
        if features.shape[1:] != part.shape[1:] or features.dtype != part.dtype:
            raise WireError(
                ErrorCode.INCOMPATIBLE,
                f"rows of {part.dtype} {part.shape[1:]} among rows of {features.dtype} {features.shape[1:]}",
            )
        features[positions] = part
    if features is None:
        return [images[position] for position in range(len(locations))]
    if images:
        raise WireError(ErrorCode.INCOMPATIBLE, f"{len(images)} encoded images among rows of {features.dtype}")
    return features
