"""Matrices in answers."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from trunkline_wire.codecs import DTYPES
from trunkline_wire.v1 import tensor_pb2

from trunkline.errors import InternalError


def decode_matrix(tensor: tensor_pb2.Tensor, apart: memoryview | None = None) -> npt.NDArray[np.float32]:
    """Decode an answer's matrix. Not ``codecs.decode``: rows that failed are NaN here, and rightly so."""
    shape = tuple(tensor.shape)
    data = memoryview(tensor.data) if apart is None else apart
    whole = (
        len(shape) == 2
        and tensor.data_type == tensor_pb2.DATA_TYPE_FLOAT32
        and tensor.codec == tensor_pb2.CODEC_RAW
        and tensor.compression in (tensor_pb2.COMPRESSION_UNSPECIFIED, tensor_pb2.COMPRESSION_NONE)
        and min(shape) >= 0
        and data.nbytes == 4 * math.prod(shape)
    )
    if not whole:
        raise InternalError(f"the cluster answered with something else than a float32 matrix (shape {shape})")
    matrix: npt.NDArray[np.float32] = (
        np.frombuffer(data, dtype=DTYPES[tensor_pb2.DATA_TYPE_FLOAT32]).reshape(shape).astype(np.float32)
    )
    return matrix
