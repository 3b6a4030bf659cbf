"""Small messages that claim to be large: refused, and in little memory. Each runs in a process of its own."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trunkline_wire import codecs
from trunkline_wire.codecs import zstd
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.v1 import tensor_pb2 as pb

MEASURE = r"""
import re, resource, sys, warnings
from pathlib import Path
from trunkline_wire import codecs, preprocess
from trunkline_wire.errors import WireError
from trunkline_wire.v1 import tensor_pb2 as pb


def peak_kib():
    # Not getrusage: its peak is inherited from the process that started this one.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


warnings.simplefilter("ignore")
data = Path(sys.argv[1]).read_bytes()
before = peak_kib()
resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))
try:
    {call}
    answer = "accepted"
except WireError as error:
    answer = error.code.name
print(answer, peak_kib() - before)
"""


def measure(call: str, data: bytes, folder: Path) -> tuple[str, int]:
    """Return the code that a call answers with, and by how many KiB the process grew."""
    path = folder / "bomb"
    path.write_bytes(data)
    script = textwrap.dedent(MEASURE).replace("{call}", call)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(
        [sys.executable, "-c", script, str(path)], env=environment, capture_output=True, text=True, check=True
    ).stdout
    code, growth = output.split()
    return code, int(growth)


def gigabyte_frame(num_bytes: int = 2**30) -> bytes:
    """Return a frame of tens of KiB that holds, and whose header claims, a GiB of zeros."""
    compressor = zstd.ZstdCompressor(1)
    compressor.set_pledged_input_size(num_bytes)
    block = bytes(2**22)
    parts = [compressor.compress(block) for _ in range(num_bytes // len(block))]
    return b"".join([*parts, compressor.flush(zstd.ZstdCompressor.FLUSH_FRAME)])


def png(width: int, height: int, idat: bytes = bytes(10)) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(idat, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def webp(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "WEBP", lossless=True)
    image = buffer.getvalue()[12:]
    canvas = b"\x10\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas + image
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def compressed(shape: list[int], data: bytes) -> bytes:
    return pb.Tensor(
        data_type=pb.DATA_TYPE_UINT8, codec=pb.CODEC_RAW, compression=pb.COMPRESSION_ZSTD, shape=shape, data=data
    ).SerializeToString()


DECODE = "codecs.decode(pb.Tensor.FromString(data))"
DECODE_IMAGE = "preprocess.decode_image(data)"


def affine(shape: list[int], data: bytes) -> bytes:
    numbers = bytes(4 * shape[0] * shape[1])
    return pb.Tensor(
        data_type=pb.DATA_TYPE_UINT4,
        codec=pb.CODEC_AFFINE,
        compression=pb.COMPRESSION_ZSTD,
        shape=shape,
        data=data,
        affine=pb.Affine(scale=numbers, offset=numbers),
    ).SerializeToString()


@pytest.mark.parametrize(
    "message", [lambda frame: compressed([1, 1000], frame), lambda frame: affine([2, 3, 9], frame)]
)
def test_a_frame_of_a_gibibyte_yields_one_byte_more_than_the_shape_allows(message, tmp_path: Path) -> None:
    frame = gigabyte_frame()
    assert len(frame) < 200_000
    code, growth = measure(DECODE, message(frame), tmp_path)
    assert code == "SHAPE_MISMATCH"
    assert growth < 24 * 1024


def test_the_measurement_sees_a_gibibyte(tmp_path: Path) -> None:
    code, growth = measure("bytes(1) * 2**30", b"", tmp_path)
    assert code == "accepted"
    assert growth > 1000 * 1024


def test_a_frame_cannot_ask_for_a_large_window(tmp_path: Path) -> None:
    # Magic number, no content size, a window of 128 MiB, one last block of 1,000 times the same byte.
    frame = struct.pack("<I", 0xFD2FB528) + b"\x00" + bytes([17 << 3]) + (1 | 1 << 1 | 1000 << 3).to_bytes(3, "little")
    frame += b"x"
    code, growth = measure(DECODE, compressed([1, 1000], frame), tmp_path)
    assert code == "CORRUPT_DATA"
    assert growth < 24 * 1024
    # The same with the window that every encoder may use is fine.
    small = frame[:5] + bytes([13 << 3]) + frame[6:]
    array = codecs.decode(pb.Tensor.FromString(compressed([1, 1000], small)))
    assert isinstance(array, np.ndarray)
    assert array.tobytes() == b"x" * 1000


@pytest.mark.parametrize("level", [1, 3, 19, 22])
def test_frames_of_every_level_are_read(level: int) -> None:
    data = np.random.default_rng(0).integers(0, 4, 2**20, dtype=np.uint8).tobytes()
    for frame in (zstd.compress(data, level), _streamed(data, level)):
        array = codecs.decode(pb.Tensor.FromString(compressed([1, len(data)], frame)))
        assert isinstance(array, np.ndarray)
        assert array.tobytes() == data


def _streamed(data: bytes, level: int) -> bytes:
    compressor = zstd.ZstdCompressor(min(level, 19))
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    "damage",
    [
        lambda frame: frame[:-1],
        lambda frame: frame[: len(frame) // 2],
        lambda frame: frame[:3],
        lambda frame: b"",
        lambda frame: b"not zstd at all",
        lambda frame: frame + b"trailing",
        lambda frame: frame[:10] + bytes([frame[10] ^ 0xFF]) + frame[11:],
    ],
    ids=["one byte short", "half", "no header", "empty", "text", "trailing", "flipped"],
)
def test_damaged_frames_are_refused(damage) -> None:
    data = np.random.default_rng(0).integers(0, 4, 4096, dtype=np.uint8).tobytes()
    with pytest.raises(WireError) as caught:
        codecs.decode(pb.Tensor.FromString(compressed([1, 4096], damage(zstd.compress(data, 3)))))
    assert caught.value.code in (ErrorCode.CORRUPT_DATA, ErrorCode.SHAPE_MISMATCH)


@pytest.mark.parametrize(
    "data",
    [png(60_000, 60_000), png(10_000, 9_000), png(8_000, 6_000), jpeg(65_500, 65_500), webp(16_383, 16_383)],
    ids=["png 60000 x 60000", "png 10000 x 9000", "png 8000 x 6000", "jpeg", "webp"],
)
def test_a_picture_is_refused_by_the_size_in_its_header(data: bytes, tmp_path: Path) -> None:
    code, growth = measure(DECODE_IMAGE, data, tmp_path)
    assert code == "PAYLOAD_TOO_LARGE"
    assert growth < 24 * 1024


def test_a_long_thin_picture_does_not_grow_when_it_is_resized(tmp_path: Path) -> None:
    data = png(1, 1_000_000, bytes(4_000_000))
    assert len(data) < 10_000
    call = (
        "from trunkline_wire.specs import Preprocessing;"
        "preprocess.preprocess_image(preprocess.decode_image(data),"
        " Preprocessing(224, 0.875, 'bicubic', (0.5,) * 3, (0.5,) * 3))"
    )
    code, growth = measure(call, data, tmp_path)
    assert code == "accepted"
    assert growth < 100 * 1024
