"""A bottleneck's file: what is written comes back, and nothing damaged does."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trunkline_wire.bottleneck import MAX_BOTTLENECK_BYTES, Bottleneck, ChannelLinear
from trunkline_wire.bottleneck_file import from_bytes, to_bytes
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import FeatureSpace, bottleneck_fingerprint
from trunkline_wire.v1 import trunk_pb2


def linear(rows, columns, seed=0):
    draw = np.random.default_rng(seed)
    return ChannelLinear(
        draw.normal(size=(rows, columns)).astype(np.float32), draw.normal(size=rows).astype(np.float32)
    )


GOOD = Bottleneck(
    FeatureSpace("net", "blocks.2", 96, "ab" * 32), (6, 4, 4), 0, linear(2, 6), linear(6, 2, 1), "int8", 0.07
)


def test_what_is_written_comes_back_and_equal_ones_are_equal_bytes():
    back = from_bytes(to_bytes(GOOD))
    for name in ("space", "feature_shape", "channel_axis", "codec", "embedding_error", "code_shape"):
        assert getattr(back, name) == getattr(GOOD, name)
    for layer in ("encoder", "decoder"):
        for part in ("weight", "bias"):
            np.testing.assert_array_equal(getattr(getattr(back, layer), part), getattr(getattr(GOOD, layer), part))
    assert to_bytes(back) == to_bytes(GOOD)
    assert GOOD.code_shape == (2, 4, 4)
    assert GOOD.code_space("cd" * 32) == FeatureSpace(
        "net", "blocks.2", 96, bottleneck_fingerprint("ab" * 32, "cd" * 32), bottleneck="cd" * 32
    )


@pytest.mark.parametrize(("axis", "shape"), [(0, (5, 3, 4)), (2, (3, 4, 5)), (1, (7, 5)), (0, (5,))])
def test_a_layer_is_applied_along_its_axis(axis, shape):
    layer = linear(3, 5)
    rows = np.random.default_rng(2).normal(size=(4, *shape)).astype(np.float32)
    expected = np.moveaxis(np.moveaxis(rows, axis + 1, -1) @ layer.weight.T + layer.bias, -1, axis + 1)
    np.testing.assert_allclose(layer.apply(rows, axis), expected, rtol=1e-4, atol=1e-5)
    assert layer.apply(rows.astype(np.float16), axis).dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"codec": "int3"}, ErrorCode.UNSUPPORTED),
        ({"channel_axis": 3}, ErrorCode.CORRUPT_DATA),
        ({"channel_axis": 1}, ErrorCode.CORRUPT_DATA),
        ({"feature_shape": ()}, ErrorCode.CORRUPT_DATA),
        ({"feature_shape": (6, 0, 4)}, ErrorCode.CORRUPT_DATA),
        ({"feature_shape": (7, 4, 4)}, ErrorCode.CORRUPT_DATA),
        ({"encoder": linear(3, 6)}, ErrorCode.CORRUPT_DATA),
        ({"decoder": linear(6, 3)}, ErrorCode.CORRUPT_DATA),
        ({"encoder": ChannelLinear(GOOD.encoder.weight * np.nan, GOOD.encoder.bias)}, ErrorCode.CORRUPT_DATA),
        ({"encoder": ChannelLinear(GOOD.encoder.weight, GOOD.encoder.bias[:1])}, ErrorCode.CORRUPT_DATA),
        ({"embedding_error": -1.0}, ErrorCode.CORRUPT_DATA),
        ({"embedding_error": float("nan")}, ErrorCode.CORRUPT_DATA),
        ({"space": replace(GOOD.space, cut="input")}, ErrorCode.CORRUPT_DATA),
        ({"space": replace(GOOD.space, backbone="")}, ErrorCode.CORRUPT_DATA),
        ({"space": replace(GOOD.space, bottleneck="a")}, ErrorCode.CORRUPT_DATA),
        ({"space": replace(GOOD.space, local_model="a")}, ErrorCode.CORRUPT_DATA),
    ],
)
def test_what_does_not_fit_is_refused(changes, code):
    with pytest.raises(WireError) as caught:
        from_bytes(_forged(replace(GOOD, **changes)))
    assert caught.value.code is code


def _forged(bottleneck):
    """Write without the checks of the codec: a sender that means harm has none."""
    message = trunk_pb2.Bottleneck.FromString(to_bytes(GOOD))
    message.space.backbone, message.space.cut = bottleneck.space.backbone, bottleneck.space.cut
    message.space.bottleneck, message.space.local_model = bottleneck.space.bottleneck, bottleneck.space.local_model
    del message.feature_shape[:]
    message.feature_shape.extend(bottleneck.feature_shape)
    message.channel_axis = bottleneck.channel_axis
    for layer in ("encoder", "decoder"):
        for part in ("weight", "bias"):
            tensor, array = getattr(getattr(message, layer), part), getattr(getattr(bottleneck, layer), part)
            tensor.data = array.astype("<f4").tobytes()
            del tensor.shape[:]
            tensor.shape.extend(array.shape)
    message.codec, message.embedding_error = bottleneck.codec, bottleneck.embedding_error
    return message.SerializeToString()


def test_another_format_and_a_bomb_are_refused():
    message = trunk_pb2.Bottleneck.FromString(to_bytes(GOOD))
    message.format = 2
    with pytest.raises(WireError, match="format 2") as caught:
        from_bytes(message.SerializeToString())
    assert caught.value.code is ErrorCode.UNSUPPORTED
    with pytest.raises(WireError) as caught:
        from_bytes(b"x" * (MAX_BOTTLENECK_BYTES + 1))
    assert caught.value.code is ErrorCode.PAYLOAD_TOO_LARGE


@settings(max_examples=150)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_flipped_byte_is_a_typed_error_or_other_numbers(position, flip):
    data = bytearray(to_bytes(GOOD))
    data[position % len(data)] ^= flip
    try:
        back = from_bytes(bytes(data))
    except WireError as error:
        assert error.code in (ErrorCode.CORRUPT_DATA, ErrorCode.UNSUPPORTED)
    else:
        assert back.code_shape[back.channel_axis] == len(back.encoder.bias)
