"""Codecs of features: how far a value can move, what is refused, and that rows do not depend on each other."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from trunkline_wire import quantise
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.quantise import (
    CODECS,
    PACKED_CODECS,
    CodecChoice,
    PackedRows,
    check_packed,
    codec_of,
    concatenate,
    num_channels,
    pack,
    parse_codec,
    row_bytes,
    unpack,
)

LARGEST = np.finfo(np.float32).max
LEVELS = {"int8": 255, "int4": 15}

anything = st.floats(width=32, allow_nan=False, allow_infinity=False)
magnitudes = st.sampled_from([1e-45, 1e-40, 1.2e-38, 1e-30, 1e-3, 1.0, 6e4, 1e20, 1e38, float(LARGEST)])


@st.composite
def features(draw: st.DrawFn, dtypes: tuple[str, ...] = ("<f4", ">f4", "<f2")) -> npt.NDArray[np.floating]:
    """Return features of any shape and layout: arbitrary, or with channels that are constant, huge or tiny."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=8, max_side=5))
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    if draw(st.booleans()):
        width = {"elements": st.floats(width=dtype.itemsize * 8, allow_nan=False, allow_infinity=False)}
        x = draw(hnp.arrays(dtype, shape, **width))
    else:
        x = np.random.default_rng(draw(st.integers(0, 2**32))).uniform(-1, 1, shape)
        for axis in range(1, len(shape)):
            factors = draw(st.lists(magnitudes, min_size=shape[axis], max_size=shape[axis]))
            x = x * np.reshape(factors, (-1, *[1] * (len(shape) - axis - 1)))
        with np.errstate(over="ignore", under="ignore"):
            limit = float(np.finfo(dtype).max)
            x = np.clip(x, -limit, limit).astype(dtype)
        if draw(st.booleans()):
            x[:, draw(st.integers(0, shape[1] - 1))] = draw(st.sampled_from([0.0, -0.0, 1.5, -float(limit)]))
    layout = draw(st.sampled_from(["c", "fortran", "reversed", "strided", "broadcast"]))
    if layout == "fortran":
        return np.asfortranarray(x)
    if layout == "reversed":
        return x[..., ::-1]
    if layout == "strided":
        return np.repeat(x, 2, axis=-1)[..., ::2]
    return np.broadcast_to(x[:1], x.shape) if layout == "broadcast" else x


def axes(x: npt.NDArray[np.floating]) -> st.SearchStrategy[int]:
    return st.integers(0, x.ndim - 2)


def packed(x: npt.NDArray[np.floating], codec: str, channel_axis: int = 0) -> PackedRows:
    rows = pack(x, codec, channel_axis)
    assert isinstance(rows, PackedRows)
    check_packed(rows)
    assert (rows.codec, rows.shape, len(rows)) == (codec, x.shape, len(x))
    assert rows.nbytes == len(x) * row_bytes(x.shape[1:], codec, channel_axis)
    return rows


def same(one: PackedRows, other: PackedRows) -> bool:
    return (one.codec, one.row_shape, one.channel_axis) == (other.codec, other.row_shape, other.channel_axis) and all(
        a.tobytes() == b.tobytes() and a.shape == b.shape
        for a, b in (
            (one.data_BZ, other.data_BZ),
            (one.scale_BC, other.scale_BC),
            (one.offset_BC, other.offset_BC),
        )
    )


def per_value(x: npt.NDArray[np.floating], per_channel_BC: npt.NDArray[np.float32], channel_axis: int):
    """Return one number per row and channel as float64 that broadcasts against the rows."""
    shape = [len(x)] + [1] * (x.ndim - 1)
    if x.ndim > 2:
        shape[1 + channel_axis] = x.shape[1 + channel_axis]
    return per_channel_BC.astype(np.float64).reshape(shape)


@pytest.mark.parametrize("codec", ["int8", "int4"])
@given(x=features(), data=st.data())
def test_an_integer_is_off_by_half_a_scale_at_most(
    codec: str, x: npt.NDArray[np.floating], data: st.DataObject
) -> None:
    axis = data.draw(axes(x))
    rows = packed(x, codec, axis)
    back = unpack(rows)
    assert (back.dtype, back.shape) == (np.float32, x.shape)
    assert np.isfinite(back).all()
    scale = per_value(x, rows.scale_BC, axis)
    exact = x.astype(np.float64)
    # Half a scale and, of float32's rounding, 2^-22 of the channel's largest value and 2^-14 of the scale.
    inside = tuple(one for one in range(1, x.ndim) if x.ndim == 2 or one != axis + 1)
    largest = np.abs(exact).max(axis=inside, keepdims=True)
    assert (np.abs(back - exact) <= scale * (0.5 + 2**-14) + largest * 2**-22).all()
    # The scale is no larger than the range asks for, but for numbers that are not normal.
    span = exact.max(axis=inside, keepdims=True) - exact.min(axis=inside, keepdims=True)
    assert (scale <= np.maximum(span / LEVELS[codec] * (1 + 2**-23), np.where(span > 0, 2.0**-126, 0.0))).all()
    # A constant channel is exact, and so is the smallest value of every other.
    np.testing.assert_array_equal(np.where(span == 0, back, 0), np.where(span == 0, exact, 0))
    np.testing.assert_array_equal(back.min(axis=inside, keepdims=True), exact.min(axis=inside, keepdims=True))


@given(x=features(), data=st.data())
def test_bfloat16_is_the_nearest_and_stays_finite(x: npt.NDArray[np.floating], data: st.DataObject) -> None:
    rows = packed(x, "bfloat16", data.draw(axes(x)))
    assert rows.channel_axis == 0
    back = unpack(rows)
    theirs = torch.from_numpy(np.array(x, dtype=np.float32)).bfloat16().float().numpy()
    largest = (2 - 2**-7) * 2.0**127
    np.testing.assert_array_equal(back, np.clip(theirs, -largest, largest))
    assert (np.signbit(back) == np.signbit(x)).all()
    if np.isfinite(theirs).all():
        ours = rows.data_BZ.view("<u2").reshape(x.shape)
        np.testing.assert_array_equal(ours, torch.from_numpy(theirs).bfloat16().view(torch.uint16).numpy())


def test_every_bfloat16_survives_and_every_tie_goes_to_even() -> None:
    every = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32).reshape(1, -1)
    finite = every[:, np.isfinite(every[0])]
    rows = packed(finite, "bfloat16")
    np.testing.assert_array_equal(unpack(rows).view(np.uint32), finite.view(np.uint32))
    positive = finite[:, ~np.signbit(finite[0])]
    ties = (positive.view(np.uint32) + 0x8000).view(np.float32)[:, :-1]  # the last is beyond the largest
    even = unpack(packed(ties, "bfloat16")).view(np.uint32) >> 16
    np.testing.assert_array_equal(even % 2, 0)


@given(x=features(dtypes=("<f2",)))
def test_float16_features_fit_every_codec(x: npt.NDArray[np.floating]) -> None:
    for codec in CODECS:
        wide, narrow = pack(x.astype(np.float32), codec), pack(x, codec)
        if isinstance(wide, PackedRows):
            assert isinstance(narrow, PackedRows)
            assert same(wide, narrow)
        else:
            np.testing.assert_array_equal(wide, narrow)
            assert wide.dtype == narrow.dtype == codec


@pytest.mark.parametrize("codec", PACKED_CODECS)
@given(x=features(), data=st.data())
def test_a_row_packs_the_same_whatever_is_beside_it(
    codec: str, x: npt.NDArray[np.floating], data: st.DataObject
) -> None:
    axis = data.draw(axes(x))
    whole = packed(x, codec, axis)
    rows = [packed(x[row : row + 1], codec, axis) for row in range(len(x))]
    assert same(concatenate(rows), whole)
    order = data.draw(st.lists(st.integers(0, len(x) - 1), min_size=1, max_size=6))
    assert same(whole.take(order), packed(x[order], codec, axis))
    assert same(whole.take(np.array(order)), concatenate([rows[row] for row in order]))
    assert same(whole.take(slice(None, None, 2)), packed(x[::2], codec, axis))
    np.testing.assert_array_equal(unpack(whole.take(order)), unpack(whole)[order])
    np.testing.assert_array_equal(unpack(whole.take(slice(None, None, -1))), unpack(whole)[::-1])
    assert same(packed(np.ascontiguousarray(x), codec, axis), whole)


@pytest.mark.parametrize("codec", PACKED_CODECS)
@pytest.mark.parametrize(("shape", "axis"), [((700, 5, 41), 0), ((3, 300, 301), 1), ((2**16 + 3, 1), 0)])
def test_batches_of_many_blocks(codec: str, shape: tuple[int, ...], axis: int) -> None:
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    x[len(x) // 2] *= LARGEST / 16  # one row that needs more care than the others
    whole = packed(x, codec, axis)
    parts = [packed(part, codec, axis) for part in np.array_split(x, 3)]
    assert same(whole, concatenate(parts))
    np.testing.assert_array_equal(unpack(whole), np.concatenate([unpack(part) for part in parts]))


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_channels_from_the_smallest_to_the_largest_number(codec: str) -> None:
    tiny = np.float32(1e-45)
    channels = [
        [-LARGEST, LARGEST, 0.0],
        [LARGEST, LARGEST, np.nextafter(LARGEST, np.float32(0))],
        [-LARGEST, -LARGEST, -LARGEST],
        [0.0, tiny, 100 * tiny],
        [0.0, -0.0, -0.0],
        [1.0, np.nextafter(np.float32(1), np.float32(2)), 1.0],
    ]
    x = np.array([channels], np.float32)
    rows = packed(x, codec)
    back = unpack(rows)
    assert (np.abs(back[0] / 2 - x[0] / 2) <= rows.scale_BC[0, :, None] / 4 * (1 + 2**-13)).all()
    assert rows.scale_BC[0, 2] == rows.scale_BC[0, 4] == 0
    np.testing.assert_array_equal(back[0, [2, 4, 5]], x[0, [2, 4, 5]])
    # Whichever zero comes first, the row packs to the same bytes.
    assert not np.signbit(rows.offset_BC[0, 4])
    assert not np.signbit(packed(x[:, :, ::-1], codec).offset_BC[0, 4])
    assert rows.offset_BC[0, 0] + LEVELS[codec] * rows.scale_BC[0, 0].astype(np.float64) <= LARGEST


def test_the_same_by_hand() -> None:
    x = np.array([[[0.0, 1.0, 2.0, 15.0], [-7.5, 7.5, 0.4, 0.6]]], np.float32)
    rows = packed(x, "int4")
    assert rows.scale_BC.tolist() == [[1.0, 1.0]]
    assert rows.offset_BC.tolist() == [[0.0, -7.5]]
    # 0 1 2 15, and 0 15 8 8: 7.9 and 8.1 from the smallest.
    assert rows.data_BZ.tolist() == [[0x10, 0xF2, 0xF0, 0x88]]
    odd = packed(x[:, :1, 1:], "int4")
    assert odd.data_BZ.shape == (1, 2)
    assert odd.data_BZ[0, 1] == 0x0F
    last = packed(np.moveaxis(x, 1, 2), "int8", 1)
    assert last.data_BZ.tolist() == [[0, 0, 17, 255, 34, 134, 255, 138]]
    assert packed(np.array([[0.0, 255.0, 2.0]], np.float32), "int8").data_BZ.tolist() == [[0, 255, 2]]


def test_a_row_of_one_dimension_has_one_channel() -> None:
    x = np.arange(10, dtype=np.float32).reshape(2, 5)
    assert packed(x, "int8").scale_BC.shape == (2, 1)
    assert (num_channels((5,), 0), num_channels((5, 6), 0), num_channels((5, 6), 1)) == (1, 5, 6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_is_not_finite_is_refused_by_row(codec: str, value: float, dtype: type) -> None:
    x = np.ones((300, 4, 100), dtype)
    x[290, 3, 7] = value
    with pytest.raises(WireError, match=r"1 of 300 rows hold NaN or infinity, the first is row 290") as caught:
        pack(x, codec)
    assert caught.value.code is ErrorCode.NOT_FINITE


def test_float16_refuses_what_it_cannot_hold_and_says_what_to_do() -> None:
    x = np.full((4, 3), 65504, np.float32)
    np.testing.assert_array_equal(pack(x, "float16"), x)
    x[2, 1] = x[3, 0] = -65536
    with pytest.raises(
        WireError, match=r"2 of 4 .* 65504, the largest of float16, the first is row 2\. Send"
    ) as caught:
        pack(x, "float16")
    assert caught.value.code is ErrorCode.NOT_FINITE
    assert "bfloat16" in caught.value.message
    for codec in ("float32", *PACKED_CODECS):
        pack(x, codec)


@pytest.mark.parametrize(
    ("x", "codec", "axis", "code"),
    [
        (np.zeros((2, 3)), "int8", 0, ErrorCode.DTYPE_MISMATCH),
        (np.zeros((2, 3), np.uint8), "float16", 0, ErrorCode.DTYPE_MISMATCH),
        (np.zeros((2, 3), np.float32), "int2", 0, ErrorCode.UNSUPPORTED),
        (np.zeros((2, 3), np.float32), "int8+zstd", 0, ErrorCode.UNSUPPORTED),
        (np.zeros((2, 3), np.float32), "int8", 1, ErrorCode.INVALID_ARGUMENT),
        (np.zeros((2, 3, 4), np.float32), "int4", 2, ErrorCode.INVALID_ARGUMENT),
        (np.zeros((2, 3, 4), np.float32), "float32", -1, ErrorCode.INVALID_ARGUMENT),
        (np.zeros((2, 3, 0), np.float32), "int8", 0, ErrorCode.EMPTY_BATCH),
        (np.zeros(2, np.float32), "int8", 0, ErrorCode.SHAPE_MISMATCH),
        (np.zeros((1,) * 9, np.float32), "bfloat16", 0, ErrorCode.SHAPE_MISMATCH),
    ],
)
def test_refusals(x: npt.NDArray[np.floating], codec: str, axis: int, code: ErrorCode) -> None:
    with pytest.raises(WireError) as caught:
        pack(x, codec, axis)
    assert caught.value.code is code


@pytest.mark.parametrize("codec", PACKED_CODECS)
def test_no_rows_pack_and_unpack(codec: str) -> None:
    rows = packed(np.zeros((0, 3, 5), np.float32), codec)
    assert unpack(rows).shape == (0, 3, 5)
    some = packed(np.ones((2, 3, 5), np.float32), codec)
    assert same(concatenate([rows, some, rows]), some)


@pytest.mark.parametrize("codec", CODECS)
def test_packing_and_unpacking_take_little_more_than_the_result(codec: str) -> None:
    x = np.random.default_rng(0).standard_normal((256, 32, 28, 28), np.float32)
    tracemalloc.start()
    try:
        rows = pack(x, codec)
        assert tracemalloc.get_traced_memory()[1] <= (rows.nbytes if codec != "float32" else 0) + 2**20
        if isinstance(rows, PackedRows):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            unpack(rows)
            assert tracemalloc.get_traced_memory()[1] - before <= x.nbytes + 2**20
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            check_packed(rows)
            assert tracemalloc.get_traced_memory()[1] - before <= 2**20
    finally:
        tracemalloc.stop()


GOOD = {codec: pack(np.linspace(-3, 3, 30, dtype=np.float32).reshape(2, 3, 5), codec) for codec in PACKED_CODECS}


def spoiled(array: npt.NDArray[np.generic], value: float, index: tuple[int, int] = (1, 0)) -> npt.NDArray[np.generic]:
    array = array.copy()
    array[index] = value
    return array


def good(codec: str) -> PackedRows:
    rows = GOOD[codec]
    assert isinstance(rows, PackedRows)
    return rows


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        (replace(good("int8"), codec="float16"), ErrorCode.UNSUPPORTED),
        (replace(good("int8"), row_shape=()), ErrorCode.SHAPE_MISMATCH),
        (replace(good("int8"), row_shape=(1,) * 8), ErrorCode.SHAPE_MISMATCH),
        (replace(good("int8"), row_shape=(3, 0)), ErrorCode.EMPTY_BATCH),
        (replace(good("int8"), row_shape=(-3, -5)), ErrorCode.EMPTY_BATCH),
        (replace(good("int8"), row_shape=(3, 6)), ErrorCode.SHAPE_MISMATCH),
        (replace(good("int8"), row_shape=(5, 3)), ErrorCode.SHAPE_MISMATCH),
        (replace(good("int8"), channel_axis=1), ErrorCode.SHAPE_MISMATCH),
        (replace(good("int8"), channel_axis=2), ErrorCode.INVALID_ARGUMENT),
        (replace(good("int8"), channel_axis=-1), ErrorCode.INVALID_ARGUMENT),
        (replace(good("int8"), codec="int4"), ErrorCode.SHAPE_MISMATCH),
        (replace(good("int8"), codec="bfloat16"), ErrorCode.SHAPE_MISMATCH),
        (replace(good("int8"), data_BZ=good("int8").data_BZ.reshape(-1)), ErrorCode.SHAPE_MISMATCH),
        (replace(good("int8"), data_BZ=good("int8").data_BZ.view(np.int8)), ErrorCode.DTYPE_MISMATCH),
        (replace(good("int8"), scale_BC=good("int8").scale_BC[:1]), ErrorCode.SHAPE_MISMATCH),
        (replace(good("int8"), offset_BC=good("int8").offset_BC[:, :2]), ErrorCode.SHAPE_MISMATCH),
        (replace(good("int8"), offset_BC=good("int8").offset_BC.astype(np.float64)), ErrorCode.DTYPE_MISMATCH),
        *(
            (replace(good(codec), **{field: spoiled(getattr(good(codec), field), value)}), code)
            for codec in ("int8", "int4")
            for field, value, code in (
                ("scale_BC", np.nan, ErrorCode.NOT_FINITE),
                ("scale_BC", np.inf, ErrorCode.NOT_FINITE),
                ("scale_BC", -np.inf, ErrorCode.NOT_FINITE),
                ("scale_BC", -1e-3, ErrorCode.CORRUPT_DATA),
                ("scale_BC", LARGEST / LEVELS[codec] * 1.01, ErrorCode.NOT_FINITE),
                ("offset_BC", np.nan, ErrorCode.NOT_FINITE),
                ("offset_BC", np.inf, ErrorCode.NOT_FINITE),
                ("offset_BC", -np.inf, ErrorCode.NOT_FINITE),
            )
        ),
        (replace(good("int4"), data_BZ=spoiled(good("int4").data_BZ, 0x10, (1, -1))), ErrorCode.CORRUPT_DATA),
        *(
            (replace(good("bfloat16"), data_BZ=spoiled(good("bfloat16").data_BZ, high, (1, 7))), ErrorCode.NOT_FINITE)
            for high in (0x7F, 0xFF)
        ),
    ],
)
def test_what_no_packer_wrote_is_refused(rows: PackedRows, code: ErrorCode) -> None:
    if rows.codec == "bfloat16" and rows.data_BZ.shape == (2, 30):
        rows.data_BZ[1, 6] |= 0x80  # the lowest bit of the exponent
    with pytest.raises(WireError) as caught:
        check_packed(rows)
    assert caught.value.code is code
    if code is ErrorCode.NOT_FINITE:
        assert "the first is row 1" in caught.value.message


@pytest.mark.parametrize("codec", ["int8", "int4"])
@given(
    scale=hnp.arrays(np.float32, (3, 2), elements=st.floats(width=32)),
    offset=hnp.arrays(np.float32, (3, 2), elements=st.floats(width=32)),
    data=st.binary(min_size=12, max_size=12),
)
def test_what_passes_the_check_unpacks_to_finite_values(
    codec: str, scale: npt.NDArray[np.float32], offset: npt.NDArray[np.float32], data: bytes
) -> None:
    values = 4 if codec == "int8" else 8
    rows = PackedRows(codec, (2, values // 2), 0, np.frombuffer(data, np.uint8).reshape(3, 4), scale, offset)
    try:
        check_packed(rows)
    except WireError:
        bad = ~(np.isfinite(scale) & np.isfinite(offset) & (scale >= 0))
        with np.errstate(invalid="ignore"):
            top = np.abs(offset.astype(np.float64) + LEVELS[codec] * scale.astype(np.float64))
        assert (bad | ~(top <= LARGEST)).any()
        return
    back = unpack(rows)
    assert np.isfinite(back).all()
    levels = rows.data_BZ if codec == "int8" else np.stack([rows.data_BZ & 15, rows.data_BZ >> 4], axis=-1)
    exact = offset[:, :, None] + levels.reshape(3, 2, -1) * scale.astype(np.float64)[:, :, None]
    span = np.abs(offset).astype(np.float64) + LEVELS[codec] * scale.astype(np.float64)
    assert (np.abs(back - exact) <= span[:, :, None] * 2**-22 + 1e-45).all()


def test_parts_of_different_kinds_do_not_go_together() -> None:
    others = [
        good("int4"),
        packed(np.ones((2, 5, 3), np.float32), "int8"),
        packed(np.ones((2, 3, 5), np.float32), "int8", 1),
    ]
    for other in others:
        with pytest.raises(WireError, match="do not go together") as caught:
            concatenate([good("int8"), other])
        assert caught.value.code is ErrorCode.SHAPE_MISMATCH


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("shape", "axis"), [((40, 28, 28), 0), ((7,), 0), ((5, 3), 1), ((1, 1, 1), 2)])
def test_the_size_of_a_row_is_what_packing_makes(codec: str, shape: tuple[int, ...], axis: int) -> None:
    rows = pack(np.ones((3, *shape), np.float32), codec, axis)
    assert rows.nbytes == 3 * row_bytes(shape, codec, axis)
    assert codec_of(rows) == codec
    assert row_bytes(shape, "uint8") == math.prod(shape)


def test_names_of_codecs() -> None:
    for codec in CODECS:
        assert parse_codec(codec) == CodecChoice(codec, False)
        assert str(parse_codec(f"{codec}+zstd")) == f"{codec}+zstd"
    assert [parse_codec(name).codec for name in ("fp32", "fp16", "bf16+zstd")] == ["float32", "float16", "bfloat16"]
    assert codec_of([b"picture"]) == "images"
    assert codec_of(np.zeros((1, 1), np.uint8)) == "uint8"
    for name in ("", "int2", "auto", "images", "uint8", "+zstd", "int8+zstd+zstd", "INT8", "int8 "):
        with pytest.raises(WireError, match="there is no codec") as caught:
            parse_codec(name)
        assert caught.value.code is ErrorCode.UNSUPPORTED
    assert set(quantise._BITS) == {*CODECS, "uint8"}
