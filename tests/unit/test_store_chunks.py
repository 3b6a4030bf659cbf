"""Chunks: what goes in comes out, and damaged bytes are refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_worker.store import chunks
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.chunks import codec_of, pack_rows, read_rows, take, unpack_rows, write_chunk
from trunkline_worker.store.records import RowLocation

FEATURES = st.sampled_from(["<f4", "<f2", "u1", ">f4"]).flatmap(
    lambda dtype: hnp.arrays(np.dtype(dtype), hnp.array_shapes(min_dims=1, max_dims=5, max_side=4))
)
IMAGES = st.lists(st.binary(max_size=50), min_size=1, max_size=8)


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


@given(FEATURES, st.data())
def test_take_is_indexing(rows: np.ndarray, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6))
    taken = take(rows, indices)
    assert isinstance(taken, np.ndarray)
    assert taken.tobytes() == rows[np.array(indices, dtype=int)].tobytes()
    listed = [bytes([index]) for index in range(len(rows))]
    assert take(listed, indices) == [listed[index] for index in indices]


@given(st.one_of(FEATURES, IMAGES), st.data())
def test_any_damage_is_refused_or_changes_values_only(rows: np.ndarray | list[bytes], data: st.DataObject) -> None:
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
    ],
)
def test_rows_that_no_chunk_holds(rows: np.ndarray | list[bytes], code: ErrorCode) -> None:
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


def test_codec_names() -> None:
    assert codec_of(np.zeros(1, np.float16)) == "float16"
    assert codec_of(np.zeros(1, np.uint8)) == "uint8"
    assert codec_of([b""]) == "images"


def test_rows_are_gathered_in_order_across_chunks(tmp_path: Path) -> None:
    blobs = BlobStore(f"file://{tmp_path}")
    rows = np.arange(60, dtype=np.float16).reshape(20, 3)
    first, second = write_chunk(blobs, rows[:12]), write_chunk(blobs, rows[12:])
    order = np.random.default_rng(0).permutation(np.r_[np.arange(20), 3, 3])
    where = [(first, one) if one < 12 else (second, one - 12) for one in order.tolist()]
    gathered = read_rows(blobs, [RowLocation(b"", chunk, index) for chunk, index in where])
    assert isinstance(gathered, np.ndarray)
    np.testing.assert_array_equal(gathered, rows[order])


def test_images_are_gathered_and_kinds_do_not_mix(tmp_path: Path) -> None:
    blobs = BlobStore(f"file://{tmp_path}")
    pictures = write_chunk(blobs, [b"a", b"bb"])
    more = write_chunk(blobs, [b"ccc"])
    features = write_chunk(blobs, np.zeros((2, 3), np.float32))
    wider = write_chunk(blobs, np.zeros((2, 4), np.float32))
    halves = write_chunk(blobs, np.zeros((2, 3), np.float16))
    at = lambda chunk, index=0: RowLocation(b"", chunk, index)  # noqa: E731
    assert read_rows(blobs, [at(more), at(pictures, 1), at(pictures, 0)]) == [b"ccc", b"bb", b"a"]
    for other in (pictures, wider, halves):
        for pair in ([at(features), at(other)], [at(other), at(features)]):
            with pytest.raises(WireError) as error:
                read_rows(blobs, pair)
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
