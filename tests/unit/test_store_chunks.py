"""Chunks: what goes in comes out, and damaged bytes are refused."""

import hashlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.quantise import PackedRows
from trunkline_worker.store import chunks
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.chunks import pack_rows, read_rows, take, unpack_rows, write_chunk
from trunkline_worker.store.records import RowLocation

FEATURES = st.sampled_from(["<f4", "<f2", "u1", ">f4"]).flatmap(
    lambda dtype: hnp.arrays(np.dtype(dtype), hnp.array_shapes(min_dims=1, max_dims=5, max_side=4))
)
IMAGES = st.lists(st.binary(max_size=50), min_size=1, max_size=8)


def packed(
    codec: str = "int8", row_shape: tuple[int, ...] = (3, 2), channel_axis: int = 0, num_rows: int = 2, seed: int = 0
) -> PackedRows:
    """Return rows of random content in a codec."""
    rng = np.random.default_rng(seed)
    values = math.prod(row_shape)
    channels = row_shape[channel_axis] if len(row_shape) > 1 else 1
    width = {"bfloat16": 2 * values, "int8": values, "int4": -(-values // 2)}[codec]
    scales = (num_rows, 0 if codec == "bfloat16" else channels)
    data = rng.integers(0, 128, (num_rows, width), dtype=np.uint8)
    if codec == "bfloat16":
        data[:, 1::2] &= 0x3F  # no exponent of NaN or infinity
    if codec == "int4" and values % 2:
        data[:, -1] &= 0x0F  # the half byte after the last value
    scale, offset = rng.random(scales, dtype=np.float32), rng.normal(size=scales).astype(np.float32)
    return PackedRows(codec, row_shape, channel_axis, data, scale, offset)


def same(one: object, other: object) -> bool:
    """Whether two packed rows are equal bit by bit, types included."""
    assert isinstance(one, PackedRows)
    assert isinstance(other, PackedRows)
    arrays = [(one.data_BZ, other.data_BZ), (one.scale_BC, other.scale_BC), (one.offset_BC, other.offset_BC)]
    return (one.codec, one.row_shape, one.channel_axis) == (other.codec, other.row_shape, other.channel_axis) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in arrays
    )


@st.composite
def packed_rows(draw: st.DrawFn) -> PackedRows:
    row_shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple))
    axis = draw(st.integers(0, len(row_shape) - 1)) if len(row_shape) > 1 else 0
    codec = draw(st.sampled_from(["bfloat16", "int8", "int4"]))
    return packed(codec, row_shape, axis, draw(st.integers(1, 4)), draw(st.integers(0, 99)))


PACKED = packed_rows()


@given(FEATURES)
def test_features_round_trip_bit_by_bit(rows: np.ndarray) -> None:
    unpacked = unpack_rows(pack_rows(rows))
    assert isinstance(unpacked, np.ndarray)
    assert unpacked.shape == rows.shape
    assert unpacked.dtype == rows.dtype.newbyteorder("<")
    assert unpacked.tobytes() == rows.astype(rows.dtype.newbyteorder("<")).tobytes()


@given(IMAGES)
def test_images_round_trip(rows: list[bytes]) -> None:
    assert unpack_rows(pack_rows(rows)) == rows


@given(PACKED)
def test_packed_rows_round_trip_bit_by_bit(rows: PackedRows) -> None:
    data = pack_rows(rows)
    assert same(unpack_rows(data), rows)
    assert len(data) <= rows.nbytes + 1024, "they are kept packed"


@given(FEATURES, st.data())
def test_take_is_indexing(rows: np.ndarray, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6))
    taken = take(rows, indices)
    assert isinstance(taken, np.ndarray)
    assert taken.tobytes() == rows[np.array(indices, dtype=int)].tobytes()
    listed = [bytes([index]) for index in range(len(rows))]
    assert take(listed, indices) == [listed[index] for index in indices]


@given(PACKED, st.data())
def test_take_of_packed_rows_is_indexing(rows: PackedRows, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6))
    index = np.array(indices, dtype=int)
    expected = replace(
        rows, data_BZ=rows.data_BZ[index], scale_BC=rows.scale_BC[index], offset_BC=rows.offset_BC[index]
    )
    assert same(take(rows, indices), expected)


@given(st.one_of(FEATURES, IMAGES, PACKED), st.data())
def test_any_damage_is_refused_or_changes_values_only(
    rows: np.ndarray | PackedRows | list[bytes], data: st.DataObject
) -> None:
    """The parser never does anything else with bytes that are not its own; the hash finds what it cannot."""
    packed = bytearray(pack_rows(rows))
    kind = data.draw(st.sampled_from(["flip", "cut", "grow"]))
    if kind == "flip":
        position = data.draw(st.integers(0, len(packed) - 1))
        packed[position] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del packed[data.draw(st.integers(0, len(packed) - 1)) :]
    else:
        packed += b"\0"
    try:
        unpack_rows(bytes(packed))
    except WireError as error:
        assert error.code is ErrorCode.CORRUPT_DATA
    else:
        assert kind == "flip"


def test_equal_rows_give_equal_bytes_in_any_layout() -> None:
    rows = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert pack_rows(rows) == pack_rows(np.asfortranarray(rows)) == pack_rows(np.repeat(rows, 2, axis=0)[::2])
    quantised = packed(num_rows=4)
    twice = PackedRows(
        quantised.codec,
        quantised.row_shape,
        quantised.channel_axis,
        np.repeat(quantised.data_BZ, 2, axis=0)[::2],
        np.asfortranarray(quantised.scale_BC),
        np.repeat(quantised.offset_BC, 2, axis=1)[:, ::2],
    )
    assert pack_rows(quantised) == pack_rows(twice)
    assert pack_rows(quantised) != pack_rows(replace(quantised, row_shape=(3, 2, 1)))


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        (np.zeros((0, 3), np.float32), ErrorCode.EMPTY_BATCH),
        (np.zeros((2, 0), np.float32), ErrorCode.EMPTY_BATCH),
        ([], ErrorCode.EMPTY_BATCH),
        (np.array(1, np.float32), ErrorCode.SHAPE_MISMATCH),
        (np.zeros((1,) * 9, np.float32), ErrorCode.SHAPE_MISMATCH),
        (np.zeros(2, np.float64), ErrorCode.DTYPE_MISMATCH),
        (np.zeros(2, np.int64), ErrorCode.DTYPE_MISMATCH),
        (np.array([object()]), ErrorCode.DTYPE_MISMATCH),
        (packed(num_rows=0), ErrorCode.EMPTY_BATCH),
        (packed(row_shape=(1,) * 8), ErrorCode.SHAPE_MISMATCH),
        (replace(packed(), row_shape=(3, 3)), ErrorCode.SHAPE_MISMATCH),
        (replace(packed(), channel_axis=1), ErrorCode.SHAPE_MISMATCH),
        (replace(packed(), scale_BC=np.ones((1, 3), np.float32)), ErrorCode.SHAPE_MISMATCH),
        (replace(packed(), codec="int2"), ErrorCode.UNSUPPORTED),
        (replace(packed(), offset_BC=np.full((2, 3), np.nan, np.float32)), ErrorCode.NOT_FINITE),
    ],
)
def test_rows_that_no_chunk_holds(rows: np.ndarray | PackedRows | list[bytes], code: ErrorCode) -> None:
    with pytest.raises(WireError) as error:
        pack_rows(rows)
    assert error.value.code is code


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 10_000)
    assert len(pack_rows(np.zeros(5_000, np.uint8))) < 10_000
    with pytest.raises(WireError) as error:
        pack_rows(np.zeros(6_000, np.uint8))
    assert error.value.code is ErrorCode.PAYLOAD_TOO_LARGE
    with pytest.raises(WireError) as error:
        unpack_rows(bytes(10_001))
    assert error.value.code is ErrorCode.CORRUPT_DATA
    monkeypatch.setattr(chunks, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(WireError) as error:
        pack_rows([bytes(11)])
    assert error.value.code is ErrorCode.PAYLOAD_TOO_LARGE


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def images(encoded: np.ndarray, offsets: object) -> bytes:
    return safetensors.numpy.save({"encoded": encoded, "offsets": np.array(offsets)})


FIVE = np.zeros(5, np.uint8)


def quantised(**changes: object) -> bytes:
    """Return a chunk of two rows of (3, 2) in int8, some of its tensors replaced."""
    tensors: dict[str, np.ndarray] = {
        "codec": np.frombuffer(b"int8", np.uint8),
        "layout": np.array([0, 3, 2], np.uint64),
        "data": np.zeros((2, 6), np.uint8),
        "scale": np.ones((2, 3), np.float32),
        "offset": np.ones((2, 3), np.float32),
    }
    return safetensors.numpy.save({**tensors, **{name: np.array(value) for name, value in changes.items()}})


def test_the_chunk_that_the_cases_below_damage_is_whole() -> None:
    rows = unpack_rows(quantised())
    assert isinstance(rows, PackedRows)
    assert rows.shape == (2, 3, 2)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        (2**63).to_bytes(8, "little") + b"{}",
        (10_000).to_bytes(8, "little") + b" " * 10_000,
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x02\0\0\0\0\0\0\0{}",
        with_header({"rows": tensor("F32", [2**62, 4], 0, 4)}, bytes(4)),
        with_header({"rows": tensor("F32", [2], 0, 4)}, bytes(4)),
        with_header({"rows": tensor("F32", [2**40], 0, 2**42)}, bytes(4)),
        with_header({"rows": tensor("I64", [1], 0, 8)}, bytes(8)),
        with_header({"rows": tensor("BF16", [1], 0, 2)}, bytes(2)),
        with_header({"rows": tensor("F32", [0], 0, 0)}),
        with_header({"rows": tensor("F32", [], 0, 4)}, bytes(4)),
        with_header({"rows": tensor("F32", [1] * 20, 0, 4)}, bytes(4)),
        with_header({"other": tensor("F32", [1], 0, 4)}, bytes(4)),
        safetensors.numpy.save({"rows": FIVE, "more": FIVE}),
        images(FIVE, np.array([0], np.uint64)),
        images(FIVE, np.array([1, 5], np.uint64)),
        images(FIVE, np.array([0, 4], np.uint64)),
        images(FIVE, np.array([0, 2**63, 5], np.uint64)),
        images(FIVE, np.array([0, 4, 3, 5], np.uint64)),
        images(FIVE, np.array([0, 5], np.int64)),
        images(FIVE, np.array([[0, 5]], np.uint64)),
        images(FIVE.astype(np.float32), np.array([0, 5], np.uint64)),
        b"\x80\x04K\x01.",
        quantised(codec=np.frombuffer(b"int2", np.uint8)),
        quantised(codec=np.frombuffer(b"int4", np.uint8)),
        quantised(codec=np.frombuffer(b"\xff" * 4, np.uint8)),
        quantised(codec=np.zeros((4, 1), np.uint8)),
        quantised(layout=np.array([0], np.uint64)),
        quantised(layout=np.zeros(0, np.uint64)),
        quantised(layout=np.array([1, 3, 2], np.uint64)),
        quantised(layout=np.array([2, 3, 2], np.uint64)),
        quantised(layout=np.array([2**63, 3, 2], np.uint64)),
        quantised(layout=np.array([0, 3, 2**62], np.uint64)),
        quantised(layout=np.array([0, 3, 2**63 + 2, 2], np.uint64)),
        quantised(layout=np.array([0, 0, 2], np.uint64)),
        quantised(layout=np.array([0, 3, 2, 1, 1, 1, 1, 1, 1], np.uint64)),
        quantised(layout=np.array([0, 3, 2], np.int64)),
        quantised(data=np.zeros((2, 5), np.uint8)),
        quantised(data=np.zeros((3, 6), np.uint8)),
        quantised(data=np.zeros((0, 6), np.uint8)),
        quantised(data=np.zeros(12, np.uint8)),
        quantised(data=np.zeros((2, 6), np.int8)),
        quantised(scale=np.ones((2, 2), np.float32)),
        quantised(scale=np.ones((2, 3), np.float16)),
        quantised(offset=np.ones((1, 3), np.float32)),
        quantised(offset=np.full((2, 3), np.inf, np.float32)),
        quantised(more=FIVE),
    ],
)
def test_bytes_that_are_no_chunk(data: bytes) -> None:
    with pytest.raises(WireError) as error:
        unpack_rows(data)
    assert error.value.code is ErrorCode.CORRUPT_DATA


def test_an_index_outside_the_chunk_is_refused() -> None:
    for indices in ([2], [-1], [0, 5]):
        with pytest.raises(WireError) as error:
            take(np.zeros((2, 3), np.float32), indices)
        assert error.value.code is ErrorCode.CORRUPT_DATA
        with pytest.raises(WireError) as error:
            take(packed(), indices)
        assert error.value.code is ErrorCode.CORRUPT_DATA


def test_rows_are_gathered_in_order_across_chunks(tmp_path: Path) -> None:
    blobs = BlobStore(f"file://{tmp_path}")
    rows = np.arange(60, dtype=np.float16).reshape(20, 3)
    first, second = write_chunk(blobs, rows[:12]), write_chunk(blobs, rows[12:])
    order = np.random.default_rng(0).permutation(np.r_[np.arange(20), 3, 3])
    where = [(first, one) if one < 12 else (second, one - 12) for one in order.tolist()]
    gathered = read_rows(blobs, [RowLocation(b"", chunk, index) for chunk, index in where])
    assert isinstance(gathered, np.ndarray)
    np.testing.assert_array_equal(gathered, rows[order])


@pytest.mark.parametrize("codec", ["bfloat16", "int8", "int4"])
def test_packed_rows_are_gathered_in_order_across_chunks_and_stay_packed(tmp_path: Path, codec: str) -> None:
    blobs = BlobStore(f"file://{tmp_path}")
    rows = packed(codec, (5, 3), num_rows=20)
    first, second = write_chunk(blobs, rows.take(slice(12))), write_chunk(blobs, rows.take(slice(12, None)))
    order = np.random.default_rng(0).permutation(np.r_[np.arange(20), 3, 3])
    where = [(first, one) if one < 12 else (second, one - 12) for one in order.tolist()]
    gathered = read_rows(blobs, [RowLocation(b"", chunk, index) for chunk, index in where])
    assert same(gathered, rows.take(order))


def test_images_are_gathered_and_kinds_do_not_mix(tmp_path: Path) -> None:
    blobs = BlobStore(f"file://{tmp_path}")
    pictures = write_chunk(blobs, [b"a", b"bb"])
    more = write_chunk(blobs, [b"ccc"])
    features = write_chunk(blobs, np.zeros((2, 3), np.float32))
    wider = write_chunk(blobs, np.zeros((2, 4), np.float32))
    halves = write_chunk(blobs, np.zeros((2, 3), np.float16))
    quantised = [write_chunk(blobs, packed(codec, (3,))) for codec in ("bfloat16", "int8", "int4")]
    quantised += [write_chunk(blobs, packed("int8", shape, axis)) for shape, axis in (((4,), 0), ((3, 3), 0))]
    quantised.append(write_chunk(blobs, packed("int8", (3, 3), 1)))
    at = lambda chunk, index=0: RowLocation(b"", chunk, index)  # noqa: E731
    assert read_rows(blobs, [at(more), at(pictures, 1), at(pictures, 0)]) == [b"ccc", b"bb", b"a"]
    kinds = [pictures, features, wider, halves, *quantised]
    for one, other in itertools.permutations(kinds, 2):
        with pytest.raises(WireError) as error:
            read_rows(blobs, [at(one), at(other)])
        assert error.value.code is ErrorCode.INCOMPATIBLE
    with pytest.raises(WireError) as error:
        read_rows(blobs, [])
    assert error.value.code is ErrorCode.EMPTY_BATCH


def test_a_chunk_damaged_on_disk_is_found_before_it_is_parsed(tmp_path: Path) -> None:
    blobs = BlobStore(f"file://{tmp_path}")
    chunk = write_chunk(blobs, np.zeros((2, 3), np.float32))
    assert chunk == hashlib.sha256(pack_rows(np.zeros((2, 3), np.float32))).hexdigest()
    path = tmp_path / chunks.chunk_path(chunk)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # a value: the parser cannot see it
    path.write_bytes(data)
    with pytest.raises(WireError, match="SHA-256") as error:
        read_rows(blobs, [RowLocation(b"", chunk, 0)])
    assert error.value.code is ErrorCode.CORRUPT_DATA
