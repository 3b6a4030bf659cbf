"""Arrays and images into messages and back, and every refusal."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from trunkline_wire import codecs, finite
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_BATCH_ROWS, MAX_IMAGE_BYTES, MAX_PAYLOAD_BYTES
from trunkline_wire.quantise import CODECS, PACKED_CODECS, PackedRows, pack, row_bytes, unpack
from trunkline_wire.v1 import tensor_pb2 as pb

GOLDEN = Path(__file__).parent.parent / "data" / "wire"

finite_arrays = st.sampled_from(["<f4", ">f4", "<f2", ">f2", "u1"]).flatmap(
    lambda dtype: hnp.arrays(
        np.dtype(dtype),
        hnp.array_shapes(min_dims=1, max_dims=8, max_side=4),
        elements=None if dtype == "u1" else {"allow_nan": False, "allow_infinity": False},
    )
)


def raw(shape: list[int], data: bytes = b"", **changes: object) -> pb.Tensor:
    fields: dict[str, object] = {"data_type": pb.DATA_TYPE_FLOAT32, "codec": pb.CODEC_RAW, "shape": shape, "data": data}
    return pb.Tensor(**(fields | changes))  # type: ignore[arg-type]


def refused(tensor: pb.Tensor, **arguments: int) -> WireError:
    with pytest.raises(WireError) as caught:
        codecs.decode(tensor, **arguments)
    return caught.value


@given(array=finite_arrays, compress=st.booleans())
def test_every_dtype_survives_the_wire(array: npt.NDArray[np.generic], compress: bool) -> None:
    message = pb.Tensor.FromString(codecs.encode_array(array, compress=compress).SerializeToString())
    back = codecs.decode(message)
    assert isinstance(back, np.ndarray)
    assert back.dtype == array.dtype.newbyteorder("<")
    assert back.shape == array.shape
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "u1", ">f4", ">f2"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda a: a.T,
        lambda a: a[::2],
        lambda a: a[:, ::-1],
        lambda a: np.asfortranarray(a),
        lambda a: np.broadcast_to(a[:1], a.shape),
    ],
    ids=["transposed", "strided", "reversed", "fortran", "broadcast"],
)
def test_any_memory_layout_is_sent_in_c_order(dtype: str, layout) -> None:
    array = layout(np.arange(24).reshape(4, 6).astype(dtype))
    back = codecs.decode(codecs.encode_array(array))
    np.testing.assert_array_equal(back, array)


def test_compression_is_kept_only_where_it_helps() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 64), dtype=np.uint8)
    assert codecs.encode_array(noise, compress=True).compression == pb.COMPRESSION_NONE
    zeros = codecs.encode_array(np.zeros((4, 4096), np.float32), compress=True)
    assert zeros.compression == pb.COMPRESSION_ZSTD
    assert len(zeros.data) < 200


def test_an_uncompressed_array_shares_the_message_and_is_read_only() -> None:
    back = codecs.decode(codecs.encode_array(np.ones((2, 2), np.float32)))
    assert isinstance(back, np.ndarray)
    assert not back.flags.writeable


@pytest.mark.parametrize("dtype", ["f8", "i4", "i8", "?", "c8", "U4", "O", "i1"])
def test_other_dtypes_cannot_be_sent(dtype: str) -> None:
    with pytest.raises(WireError, match="cannot send") as caught:
        codecs.encode_array(np.zeros((2, 2), dtype))
    assert caught.value.code is ErrorCode.DTYPE_MISMATCH


def test_a_scalar_and_nine_dimensions_cannot_be_sent() -> None:
    for shape in ((), (1,) * 9):
        with pytest.raises(WireError) as caught:
            codecs.encode_array(np.zeros(shape, np.float32))
        assert caught.value.code is ErrorCode.SHAPE_MISMATCH


def test_what_is_too_large_is_refused_before_it_is_copied() -> None:
    large = np.broadcast_to(np.zeros((1, 1), np.float32), (1024, MAX_PAYLOAD_BYTES // 1024))
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as caught:
            codecs.encode_array(large)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert caught.value.code is ErrorCode.PAYLOAD_TOO_LARGE
    assert "fewer rows" in caught.value.message


@pytest.mark.parametrize(
    ("tensor", "code"),
    [
        (raw([]), ErrorCode.SHAPE_MISMATCH),
        (raw([1] * 9, bytes(4)), ErrorCode.SHAPE_MISMATCH),
        (raw([2, -1], bytes(8)), ErrorCode.SHAPE_MISMATCH),
        (raw([-2, -1], bytes(8)), ErrorCode.SHAPE_MISMATCH),
        (raw([0, 3]), ErrorCode.EMPTY_BATCH),
        (raw([3, 0]), ErrorCode.EMPTY_BATCH),
        (raw([MAX_BATCH_ROWS + 1, 1], bytes(4)), ErrorCode.PAYLOAD_TOO_LARGE),
        (raw([1, 2**62], bytes(4)), ErrorCode.PAYLOAD_TOO_LARGE),
        # The product wraps around to 0 and to 4 in 64 bits.
        (raw([4, 2**62], bytes(4)), ErrorCode.PAYLOAD_TOO_LARGE),
        (raw([1, 2**32, 2**32], bytes(4)), ErrorCode.PAYLOAD_TOO_LARGE),
        (raw([1, 2**63 - 1, 2**63 - 1, 2**63 - 1], bytes(4)), ErrorCode.PAYLOAD_TOO_LARGE),
        (raw([2, 2], bytes(15)), ErrorCode.SHAPE_MISMATCH),
        (raw([2, 2], bytes(17)), ErrorCode.SHAPE_MISMATCH),
        (raw([2, 2]), ErrorCode.SHAPE_MISMATCH),
        (raw([1], bytes(4), data_type=pb.DATA_TYPE_UNSPECIFIED), ErrorCode.DTYPE_MISMATCH),
        (raw([1], bytes(4), data_type=77), ErrorCode.DTYPE_MISMATCH),
        (raw([1], bytes(4), codec=pb.CODEC_UNSPECIFIED), ErrorCode.UNSUPPORTED),
        (raw([1], bytes(4), codec=77), ErrorCode.UNSUPPORTED),
        (raw([1], bytes(4), compression=77), ErrorCode.UNSUPPORTED),
        (raw([1], bytes(4), encoded=[b"x"]), ErrorCode.INVALID_ARGUMENT),
        (raw([1], np.float32([np.nan]).tobytes()), ErrorCode.NOT_FINITE),
        (raw([1], np.float32([-np.inf]).tobytes()), ErrorCode.NOT_FINITE),
    ],
)
def test_refusals(tensor: pb.Tensor, code: ErrorCode) -> None:
    tracemalloc.start()
    try:
        assert refused(tensor).code is code
        # Whatever the shape claims, nothing of that size is allocated.
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_caller_may_allow_fewer_rows() -> None:
    tensor = raw([3, 1], bytes(12))
    assert refused(tensor, max_rows=2).code is ErrorCode.PAYLOAD_TOO_LARGE
    assert len(codecs.decode(tensor, max_rows=3)) == 3


@given(st.binary(max_size=300))
def test_any_bytes_as_a_message_decode_or_are_refused(data: bytes) -> None:
    try:
        tensor = pb.Tensor.FromString(data)
    except Exception:  # protobuf's own refusal; what matters is what gets past it
        return
    try:
        codecs.decode(tensor)
    except WireError as error:
        assert error.code in ErrorCode


sizes = st.one_of(st.integers(-1, 6), st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, -(2**63)]))


@given(
    st.builds(
        pb.Tensor,
        data_type=st.integers(0, 6),
        codec=st.integers(0, 4),
        compression=st.integers(0, 3),
        shape=st.lists(sizes, max_size=9),
        data=st.one_of(st.binary(max_size=80), st.integers(0, 300).map(bytes)),
        encoded=st.lists(st.binary(max_size=3), max_size=2),
        affine=st.none()
        | st.builds(
            pb.Affine,
            channel_axis=st.one_of(st.integers(0, 8), st.just(2**32 - 1)),
            scale=st.integers(0, 40).map(bytes),
            offset=st.integers(0, 40).map(bytes),
        ),
    )
)
def test_any_fields_decode_or_are_refused_in_little_memory(tensor: pb.Tensor) -> None:
    tracemalloc.start()
    try:
        rows = codecs.decode(tensor)
    except WireError as error:
        assert error.code in ErrorCode
        assert len(error.message) < 500
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20
    check_decoded(tensor, rows)


def check_decoded(tensor: pb.Tensor, rows: object) -> None:
    """Check that what was decoded is what the message says, and can be used."""
    if isinstance(rows, list):
        assert rows == list(tensor.encoded)
        return
    assert isinstance(rows, np.ndarray | PackedRows)
    assert rows.shape == tuple(tensor.shape)
    values = unpack(rows) if isinstance(rows, PackedRows) else rows
    assert values.shape == rows.shape
    assert np.isfinite(values).all()
    again = pb.Tensor.FromString(codecs.encode_rows(rows).SerializeToString())
    again.compression = tensor.compression
    if tensor.compression != pb.COMPRESSION_ZSTD:
        assert again == tensor
        assert codecs.encoded_size(tensor) == rows.nbytes


@pytest.mark.parametrize("codec", CODECS)
@given(data=st.data(), compress=st.booleans())
def test_a_damaged_message_decodes_or_is_refused(codec: str, data: st.DataObject, compress: bool) -> None:
    array = np.arange(300, dtype=np.float32).reshape(3, 20, 5) % 7
    whole = bytearray(codecs.encode_rows(pack(array, codec), compress=compress).SerializeToString())
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        # Where the fields are told apart, and anywhere.
        early = data.draw(st.booleans())
        position = data.draw(st.integers(0, (20 if early else len(whole)) * 8 - 1))
        whole[position // 8] ^= 1 << (position % 8)
    try:
        tensor = pb.Tensor.FromString(bytes(whole))
    except Exception as error:
        assert type(error).__module__.startswith("google.protobuf")
        return
    tracemalloc.start()
    try:
        rows = codecs.decode(tensor)
    except WireError as error:
        assert error.code in ErrorCode
    else:
        unpack(rows) if isinstance(rows, PackedRows) else rows
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 2])
def test_a_value_that_is_not_finite_is_found_and_its_row_named(dtype: type, value: float, row: int) -> None:
    array = np.full((3, 5, 2), np.finfo(dtype).max, dtype)
    array[1] = -array[1]
    finite.check_finite(array)
    array[row, 4, 1] = value
    with pytest.raises(WireError, match=f"1 of 3 rows .* the first is row {row}") as caught:
        finite.check_finite(array)
    assert caught.value.code is ErrorCode.NOT_FINITE


@given(hnp.arrays(st.sampled_from([np.dtype("<f2"), np.dtype(">f2")]), hnp.array_shapes(min_dims=1, max_dims=3)))
def test_the_fast_check_of_float16_agrees_with_numpy(array: npt.NDArray[np.float16]) -> None:
    for view in (array, array[::2], array.T):
        try:
            finite.check_finite(view)
            accepted = True
        except WireError:
            accepted = False
        assert accepted == bool(np.isfinite(view).all())


def test_every_bit_pattern_of_float16_is_judged_rightly() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    for one, expected in zip(every.reshape(-1, 1), np.isfinite(every), strict=True):
        assert finite.is_finite(one) == expected


@pytest.mark.parametrize("low_half", [0, 1, 0xFFFF])
def test_every_upper_half_of_float32_is_judged_rightly(low_half: int) -> None:
    every = ((np.arange(2**16, dtype=np.uint32) << 16) | low_half).view(np.float32)
    for one, expected in zip(every.reshape(-1, 1), np.isfinite(every), strict=True):
        assert finite.is_finite(one) == expected


def test_images_survive_the_wire() -> None:
    images = [b"\x89PNG...", b"", b"\xff\xd8"]
    tensor = codecs.encode_images(images)
    assert codecs.num_rows(tensor) == 3
    assert codecs.decode(pb.Tensor.FromString(tensor.SerializeToString())) == images


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"shape": [3]}, ErrorCode.SHAPE_MISMATCH),
        ({"shape": [2, 1]}, ErrorCode.SHAPE_MISMATCH),
        ({"shape": [2**40]}, ErrorCode.PAYLOAD_TOO_LARGE),
        ({"data": b"x"}, ErrorCode.INVALID_ARGUMENT),
        ({"compression": pb.COMPRESSION_ZSTD}, ErrorCode.INVALID_ARGUMENT),
        ({"data_type": pb.DATA_TYPE_FLOAT32}, ErrorCode.DTYPE_MISMATCH),
        ({"encoded": [b"a", bytes(MAX_IMAGE_BYTES + 1)]}, ErrorCode.PAYLOAD_TOO_LARGE),
    ],
)
def test_refusals_of_images(changes: dict[str, object], code: ErrorCode) -> None:
    fields: dict[str, object] = {
        "data_type": pb.DATA_TYPE_UINT8,
        "codec": pb.CODEC_ENCODED_IMAGES,
        "shape": [2],
        "encoded": [b"a", b"b"],
    }
    assert refused(pb.Tensor(**(fields | changes))).code is code  # type: ignore[arg-type]


def test_too_many_bytes_of_images_are_refused_before_sending() -> None:
    with pytest.raises(WireError) as caught:
        codecs.encode_images([bytes(MAX_PAYLOAD_BYTES // 2)] * 3)
    assert caught.value.code is ErrorCode.PAYLOAD_TOO_LARGE


packed_rows = st.tuples(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=8, max_side=4),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    st.sampled_from(PACKED_CODECS),
    st.integers(0, 6),
).map(lambda drawn: pack(drawn[0], drawn[1], drawn[2] % (drawn[0].ndim - 1)))


@given(rows=packed_rows, compress=st.booleans())
def test_packed_rows_survive_the_wire_packed(rows: PackedRows, compress: bool) -> None:
    tensor = pb.Tensor.FromString(codecs.encode_rows(rows, compress=compress).SerializeToString())
    back = codecs.decode(tensor)
    assert isinstance(back, PackedRows)
    assert (back.codec, back.row_shape, back.channel_axis) == (rows.codec, rows.row_shape, rows.channel_axis)
    for one, other in (
        (back.data_BZ, rows.data_BZ),
        (back.scale_BC, rows.scale_BC),
        (back.offset_BC, rows.offset_BC),
    ):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(unpack(back), unpack(rows))
    assert codecs.num_rows(tensor) == len(rows)


def test_some_of_the_rows_are_sent_in_any_order() -> None:
    rows = pack(np.random.default_rng(0).standard_normal((9, 3, 7), np.float32), "int4")
    assert isinstance(rows, PackedRows)
    part = rows.take(slice(8, 2, -2))
    back = codecs.decode(codecs.encode_rows(part))
    assert isinstance(back, PackedRows)
    np.testing.assert_array_equal(unpack(back), unpack(rows)[8:2:-2])


@pytest.mark.parametrize("codec", PACKED_CODECS)
def test_packed_rows_share_the_message_and_zstd_covers_the_data_alone(codec: str) -> None:
    rows = pack(np.tile(np.arange(64, dtype=np.float32), (4, 8, 1)), codec)
    assert isinstance(rows, PackedRows)
    plain, small = codecs.encode_rows(rows), codecs.encode_rows(rows, compress=True)
    assert codecs.encoded_size(plain) == rows.nbytes == 4 * row_bytes((8, 64), codec)
    assert len(small.data) < len(plain.data) / 2
    assert small.affine == plain.affine
    assert plain.HasField("affine") == (codec != "bfloat16")
    back = codecs.decode(plain)
    assert isinstance(back, PackedRows)
    assert not back.data_BZ.flags.writeable


def test_rows_that_are_arrays_or_pictures_have_a_size_too() -> None:
    array = np.ones((3, 5), np.float16)
    assert codecs.encode_rows(array) == codecs.encode_array(array)
    assert codecs.encoded_size(codecs.encode_rows(array)) == 30
    assert codecs.encoded_size(codecs.encode_images([b"abc", b"de"])) == 5


def test_packed_rows_are_checked_before_they_are_sent() -> None:
    rows = pack(np.ones((2, 3, 5), np.float32), "int8")
    assert isinstance(rows, PackedRows)
    rows.scale_BC[1, 2] = np.nan
    with pytest.raises(WireError, match="the first is row 1") as caught:
        codecs.encode_rows(rows)
    assert caught.value.code is ErrorCode.NOT_FINITE
    many = np.broadcast_to(np.uint8(0), (4096, 8192))
    one = np.zeros((4096, 1), np.float32)
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as caught:
            codecs.encode_rows(PackedRows("int8", (8192,), 0, many, one, one))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert caught.value.code is ErrorCode.PAYLOAD_TOO_LARGE


AFFINE = pb.Affine(channel_axis=0, scale=bytes(24), offset=bytes(24))
"""Of two rows of three channels."""


def affine(**changes: object) -> pb.Tensor:
    fields: dict[str, object] = {
        "data_type": pb.DATA_TYPE_UINT8,
        "codec": pb.CODEC_AFFINE,
        "shape": [2, 3, 5],
        "data": bytes(30),
        "affine": AFFINE,
    }
    return pb.Tensor(**(fields | changes))  # type: ignore[arg-type]


def numbers(*changes: tuple[int, float]) -> bytes:
    array = np.ones(6, "<f4")
    for index, value in changes:
        array[index] = value
    return array.tobytes()


@pytest.mark.parametrize(
    ("tensor", "code"),
    [
        (affine(affine=None), ErrorCode.INVALID_ARGUMENT),
        (raw([2], bytes(8), affine=pb.Affine()), ErrorCode.INVALID_ARGUMENT),
        (raw([2], bytes(8), affine=AFFINE), ErrorCode.INVALID_ARGUMENT),
        (raw([2, 2], bytes(8), affine=AFFINE, data_type=pb.DATA_TYPE_BFLOAT16), ErrorCode.INVALID_ARGUMENT),
        (raw([2], affine=AFFINE, codec=pb.CODEC_ENCODED_IMAGES, encoded=[b"", b""]), ErrorCode.INVALID_ARGUMENT),
        (raw([2, 2], bytes(2), data_type=pb.DATA_TYPE_UINT4), ErrorCode.DTYPE_MISMATCH),
        (affine(data_type=pb.DATA_TYPE_FLOAT32), ErrorCode.DTYPE_MISMATCH),
        (affine(data_type=pb.DATA_TYPE_BFLOAT16), ErrorCode.DTYPE_MISMATCH),
        (affine(data_type=pb.DATA_TYPE_UNSPECIFIED), ErrorCode.DTYPE_MISMATCH),
        (affine(encoded=[b"x"]), ErrorCode.INVALID_ARGUMENT),
        (affine(compression=77), ErrorCode.UNSUPPORTED),
        (affine(compression=pb.COMPRESSION_ZSTD), ErrorCode.CORRUPT_DATA),
        (affine(shape=[30]), ErrorCode.SHAPE_MISMATCH),
        (affine(shape=[2, 5, 3]), ErrorCode.SHAPE_MISMATCH),
        (affine(shape=[2, 3, 5], data=bytes(29)), ErrorCode.SHAPE_MISMATCH),
        (affine(shape=[2, 3, 5], data=bytes(31)), ErrorCode.SHAPE_MISMATCH),
        (affine(data_type=pb.DATA_TYPE_UINT4), ErrorCode.SHAPE_MISMATCH),
        (affine(data_type=pb.DATA_TYPE_UINT4, data=bytes(15)), ErrorCode.SHAPE_MISMATCH),
        (affine(data_type=pb.DATA_TYPE_UINT4, data=bytes(15) + b"\x10"), ErrorCode.CORRUPT_DATA),
        (affine(shape=[0, 3, 5]), ErrorCode.EMPTY_BATCH),
        (affine(shape=[1] * 9), ErrorCode.SHAPE_MISMATCH),
        (affine(shape=[2, 3, 2**40]), ErrorCode.PAYLOAD_TOO_LARGE),
        (affine(shape=[2, 2**40, 5]), ErrorCode.PAYLOAD_TOO_LARGE),
        (affine(shape=[2, 2**32, 2**32]), ErrorCode.PAYLOAD_TOO_LARGE),
        (affine(shape=[1, 1, 2**62], data_type=pb.DATA_TYPE_UINT4), ErrorCode.PAYLOAD_TOO_LARGE),
        # Within the limit for data alone: the scales count too.
        (affine(shape=[4096, 2000, 1]), ErrorCode.PAYLOAD_TOO_LARGE),
        (affine(affine=pb.Affine(channel_axis=1, scale=bytes(24), offset=bytes(24))), ErrorCode.SHAPE_MISMATCH),
        (affine(affine=pb.Affine(channel_axis=2, scale=bytes(24), offset=bytes(24))), ErrorCode.INVALID_ARGUMENT),
        (affine(affine=pb.Affine(channel_axis=2**32 - 1)), ErrorCode.INVALID_ARGUMENT),
        (affine(affine=pb.Affine(scale=bytes(24), offset=bytes(20))), ErrorCode.SHAPE_MISMATCH),
        (affine(affine=pb.Affine(scale=bytes(28), offset=bytes(24))), ErrorCode.SHAPE_MISMATCH),
        (affine(affine=pb.Affine(scale=numbers((5, np.nan)), offset=bytes(24))), ErrorCode.NOT_FINITE),
        (affine(affine=pb.Affine(scale=numbers((5, np.inf)), offset=bytes(24))), ErrorCode.NOT_FINITE),
        (affine(affine=pb.Affine(scale=numbers((5, 3e38)), offset=bytes(24))), ErrorCode.NOT_FINITE),
        (affine(affine=pb.Affine(scale=bytes(24), offset=numbers((3, -np.inf)))), ErrorCode.NOT_FINITE),
        (affine(affine=pb.Affine(scale=numbers((5, -1)), offset=bytes(24))), ErrorCode.CORRUPT_DATA),
        (raw([4], bytes(8), data_type=pb.DATA_TYPE_BFLOAT16), ErrorCode.SHAPE_MISMATCH),
        (raw([2, 2], bytes(7), data_type=pb.DATA_TYPE_BFLOAT16), ErrorCode.SHAPE_MISMATCH),
        (raw([2, 1], b"\0\0\x80\x7f", data_type=pb.DATA_TYPE_BFLOAT16), ErrorCode.NOT_FINITE),
        (raw([2, 1], b"\0\0\xff\xff", data_type=pb.DATA_TYPE_BFLOAT16), ErrorCode.NOT_FINITE),
    ],
)
def test_refusals_of_packed_rows(tensor: pb.Tensor, code: ErrorCode) -> None:
    tracemalloc.start()
    try:
        error = refused(tensor)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert error.code is code
    if code is ErrorCode.NOT_FINITE:
        assert "the first is row 1" in error.message


def test_the_packed_message_that_the_refusals_start_from_is_good() -> None:
    check_decoded(affine(), codecs.decode(affine()))
    four = affine(data_type=pb.DATA_TYPE_UINT4, data=bytes(15) + b"\x0f")
    check_decoded(four, codecs.decode(four))


GOLDEN_ARRAYS = {
    "float32": np.array([[0.0, -1.5, 3.25], [1e-30, 65504.0, -2.0]], "<f4"),
    "float16": np.array([[0.0, -1.5, 3.25], [6e-5, 65504.0, -2.0]], "<f2"),
    "uint8": np.arange(6, dtype=np.uint8).reshape(2, 3) * 51,
    "float32-zstd": np.tile(np.array([[1.0, 2.0, 3.0, 4.0]], "<f4"), (8, 16)),
}


@pytest.mark.parametrize("name", sorted(GOLDEN_ARRAYS))
def test_what_an_earlier_version_wrote_still_decodes(name: str) -> None:
    array = GOLDEN_ARRAYS[name]
    written = (GOLDEN / f"{name}.bin").read_bytes()
    back = codecs.decode(pb.Tensor.FromString(written))
    assert isinstance(back, np.ndarray)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)
    if "zstd" not in name:  # another version of the library may compress otherwise, and still be read
        assert codecs.encode_array(array).SerializeToString(deterministic=True) == written


def test_images_that_an_earlier_version_wrote_still_decode() -> None:
    written = (GOLDEN / "images.bin").read_bytes()
    assert codecs.decode(pb.Tensor.FromString(written)) == [b"first", b"", b"third"]
    assert codecs.encode_images([b"first", b"", b"third"]).SerializeToString(deterministic=True) == written


_ROWS = np.array([[[0.0, 1.0, 2.0], [-3.0, 0.5, 4.0]], [[7.0, 7.0, 7.0], [-65536.0, 1e-3, 65536.0]]], "<f4")
GOLDEN_ROWS = {
    "bfloat16": pack(_ROWS, "bfloat16"),
    "int8": pack(_ROWS, "int8"),
    "int4": pack(_ROWS[:, :, :2].reshape(2, 4)[:, :3], "int4"),
    "int8-axis1": pack(_ROWS, "int8", 1),
    "bfloat16-zstd": pack(np.tile(_ROWS, (1, 1, 40)), "bfloat16"),
    "int8-zstd": pack(np.tile(_ROWS, (1, 1, 40)), "int8"),
    "int4-zstd": pack(np.tile(_ROWS, (1, 1, 41)), "int4"),
}


@pytest.mark.parametrize("name", sorted(GOLDEN_ROWS))
def test_packed_rows_that_an_earlier_version_wrote_still_decode(name: str) -> None:
    rows = GOLDEN_ROWS[name]
    assert isinstance(rows, PackedRows)
    written = (GOLDEN / f"{name}.bin").read_bytes()
    tensor = pb.Tensor.FromString(written)
    back = codecs.decode(tensor)
    assert isinstance(back, PackedRows)
    assert (back.codec, back.shape, back.channel_axis) == (rows.codec, rows.shape, rows.channel_axis)
    np.testing.assert_array_equal(unpack(back), unpack(rows))
    assert (tensor.compression == pb.COMPRESSION_ZSTD) == ("zstd" in name)
    if "zstd" not in name:
        assert codecs.encode_rows(rows).SerializeToString(deterministic=True) == written
