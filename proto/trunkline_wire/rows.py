"""Ids of rows and digests of datasets: what makes a second upload free.

A row's id says what the row was made from, not which bits came out: the picture, the preprocessing, the weights, the
cut and the codec. So a client knows what the cluster has before it computes anything, and rounding that depends on the
batch a row sat in cannot make two rows of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trunkline_wire.specs import FeatureSpace

ROW_ID_BYTES = 32
"""Length of a row id: SHA-256."""


def content_digest(content: bytes | npt.NDArray[np.generic]) -> bytes:
    """Return the SHA-256 of a source row: of a file's bytes, or of an array's dtype, shape and values."""
    if isinstance(content, bytes):
        return hashlib.sha256(b"file\0" + content).digest()
    header = f"array\0{content.dtype.str}\0{content.shape}\0".encode()
    digest = hashlib.sha256(header)
    digest.update(np.ascontiguousarray(content).reshape(-1).view(np.uint8).data)  # no copy: it may be a large picture
    return digest.digest()


def row_id(space: FeatureSpace, codec: str, content: bytes) -> bytes:
    """Return the id of one row.

    Args:
        space: Where the features live. Only its fingerprint counts.
        codec: How the row is encoded, as ``quantise.codec_of`` names it: ``float16``, ``int8``, ``images`` ... Never
            with ``+zstd``: that is undone on arrival, and leaves the same row.
        content: ``content_digest`` of what the row is made from.
    """
    return hashlib.sha256(f"row-v1\0{space.fingerprint}\0{codec}\0".encode() + content).digest()


def dataset_digest(
    row_ids: Sequence[bytes],
    class_names: Sequence[str],
    class_indices: Sequence[int] | npt.NDArray[np.integer],
    targets: npt.NDArray[np.float32] | None,
    more_row_ids: Sequence[Sequence[bytes]] = (),
    *,
    groups: npt.NDArray[np.integer] | None = None,
    views: int = 1,
) -> str:
    """Return the hex SHA-256 of a dataset: equal rows with equal labels in equal order, equal digest.

    Args:
        row_ids: Of the first input, in the dataset's order.
        class_names: In the order of the labels; empty where they are numbers.
        class_indices: One per row, into ``class_names``; empty unless every row is of one class.
        targets: float32, (rows, outputs) or (rows, classes); None where every row is of one class.
        more_row_ids: Those of each other input.
        groups: Group of each row, numbered as ``number_groups`` does. None: rows are not grouped.
        views: So many rows, one after another, are views of one picture.
    """
    digest = hashlib.sha256(b"dataset-v1\0")
    digest.update(len(row_ids).to_bytes(8, "little"))
    for one in row_ids:
        digest.update(one)
    digest.update(len(class_names).to_bytes(8, "little"))
    for name in class_names:
        encoded = name.encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    digest.update(np.asarray(class_indices, dtype="<u4").tobytes())
    if targets is not None:
        digest.update(f"targets{targets.shape}".encode() + np.ascontiguousarray(targets, dtype="<f4").tobytes())
    if more_row_ids:
        whole = hashlib.sha256(b"dataset-inputs-v1\0" + digest.digest())
        for ids in more_row_ids:
            whole.update(len(ids).to_bytes(8, "little"))
            for one in ids:
                whole.update(one)
        digest = whole
    if groups is None and views == 1:
        return digest.hexdigest()
    arranged = hashlib.sha256(b"dataset-groups-v1\0" + digest.digest() + views.to_bytes(4, "little"))
    if groups is not None:
        arranged.update(np.asarray(groups, dtype="<u4").tobytes())
    return arranged.hexdigest()


def number_groups(groups_N: npt.NDArray[np.integer]) -> npt.NDArray[np.uint32]:
    """Return groups numbered from 0 in the order in which they first come: groups alike, numbers alike."""
    _, first, inverse_N = np.unique(groups_N, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.uint32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.uint32)
    numbered_N: npt.NDArray[np.uint32] = rank[inverse_N.reshape(-1)]
    return numbered_N
