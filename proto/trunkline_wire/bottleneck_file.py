"""A bottleneck as the bytes of a file and back: one protobuf message. Read on both sides, so everything is checked."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from trunkline_wire import codecs, messages
from trunkline_wire.bottleneck import MAX_BOTTLENECK_BYTES, Bottleneck, ChannelLinear
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_RANK
from trunkline_wire.quantise import CODECS
from trunkline_wire.specs import FeatureSpace
from trunkline_wire.v1 import tensor_pb2, trunk_pb2

FORMAT = 1


def to_bytes(bottleneck: Bottleneck) -> bytes:
    """Return the bytes of a bottleneck's file. Equal bottlenecks give equal bytes."""
    return trunk_pb2.Bottleneck(
        format=FORMAT,
        space=messages.space_to_proto(bottleneck.space),
        feature_shape=bottleneck.feature_shape,
        channel_axis=bottleneck.channel_axis,
        encoder=linear_to_proto(bottleneck.encoder),
        decoder=linear_to_proto(bottleneck.decoder),
        codec=bottleneck.codec,
        embedding_error=bottleneck.embedding_error,
    ).SerializeToString(deterministic=True)


def from_bytes(data: bytes) -> Bottleneck:
    """Read a bottleneck's file.

    Raises:
        WireError: PAYLOAD_TOO_LARGE; UNSUPPORTED for another format or codec; CORRUPT_DATA for anything else.
    """
    if len(data) > MAX_BOTTLENECK_BYTES:
        raise WireError(
            ErrorCode.PAYLOAD_TOO_LARGE, f"a bottleneck of {len(data)} bytes; at most {MAX_BOTTLENECK_BYTES}"
        )
    try:
        message = trunk_pb2.Bottleneck.FromString(data)
    except DecodeError as error:
        raise _corrupt("it cannot be parsed") from error
    if message.format != FORMAT:
        raise WireError(ErrorCode.UNSUPPORTED, f"a bottleneck of format {message.format}; {FORMAT} is known here")
    if message.codec not in CODECS:
        raise WireError(
            ErrorCode.UNSUPPORTED, f"a bottleneck for codec {message.codec[:40]!r}; there are {', '.join(CODECS)}"
        )
    shape, axis = tuple(message.feature_shape), message.channel_axis
    if not 1 <= len(shape) < MAX_RANK or min(shape) < 1 or axis >= len(shape):
        raise _corrupt(f"features of shape {shape[:MAX_RANK]} have no channels on axis {axis}")
    encoder, decoder = _layer(message.encoder, "encoder"), _layer(message.decoder, "decoder")
    width = len(encoder.bias)
    if encoder.weight.shape != (width, shape[axis]) or decoder.weight.shape != (shape[axis], width):
        raise _corrupt(
            f"an encoder of {encoder.weight.shape} and a decoder of {decoder.weight.shape} do not fit {shape[axis]} "
            "channels"
        )
    if not 0.0 <= message.embedding_error < math.inf:
        raise _corrupt("its embedding error is no number of at least 0")
    space = _space(message)
    return Bottleneck(space, shape, axis, encoder, decoder, message.codec, message.embedding_error)


def linear_to_proto(layer: ChannelLinear) -> trunk_pb2.ChannelLinear:
    """Return the message of a linear layer over channels."""
    return trunk_pb2.ChannelLinear(
        weight=codecs.encode_array(layer.weight.astype(np.float32, copy=False)),
        bias=codecs.encode_array(layer.bias.astype(np.float32, copy=False)),
    )


def linear_from_proto(message: trunk_pb2.ChannelLinear) -> ChannelLinear:
    """Return the linear layer of a message.

    Raises:
        WireError: SHAPE_MISMATCH, DTYPE_MISMATCH, NOT_FINITE, or as ``codecs.decode``.
    """
    weight, bias = _floats(message.weight, "weight"), _floats(message.bias, "bias")
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise WireError(
            ErrorCode.SHAPE_MISMATCH,
            f"a weight is (channels out, channels in) and a bias (channels out); got {weight.shape} and {bias.shape}",
        )
    return ChannelLinear(weight, bias)


def _floats(message: tensor_pb2.Tensor, what: str) -> npt.NDArray[np.float32]:
    if message.data_type != tensor_pb2.DATA_TYPE_FLOAT32 or message.codec != tensor_pb2.CODEC_RAW:
        raise WireError(ErrorCode.DTYPE_MISMATCH, f"the {what} of a linear layer is a plain float32 tensor")
    array = codecs.decode(message)
    assert isinstance(array, np.ndarray)
    return array.astype(np.float32, copy=False)


def _space(message: trunk_pb2.Bottleneck) -> FeatureSpace:
    space = messages.space_from_proto(message.space)
    if not (space.backbone and space.cut and space.input_size and space.fingerprint):
        raise _corrupt("it does not say which features it is for")
    if space.is_input or space.is_own:
        raise _corrupt("it is for features that no stem of the backbone makes")
    return space


def _layer(message: trunk_pb2.ChannelLinear, what: str) -> ChannelLinear:
    for tensor in (message.weight, message.bias):
        # So no layer can be larger than the file.
        if tensor.compression not in (tensor_pb2.COMPRESSION_UNSPECIFIED, tensor_pb2.COMPRESSION_NONE):
            raise _corrupt(f"its {what} is compressed")
    try:
        return linear_from_proto(message)
    except WireError as error:
        raise _corrupt(f"its {what} is no layer: {error.message}") from error


def _corrupt(why: str) -> WireError:
    return WireError(ErrorCode.CORRUPT_DATA, f"this bottleneck is damaged: {why}. Train it again, or restore it")
