"""How fast a stem runs on this machine, and what its features weigh."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image
from trunkline_wire import quantise
from trunkline_wire.codecs import encode_rows, encoded_size
from trunkline_wire.errors import WireError

from trunkline._features import rows_per_chunk
from trunkline.images import BytesPicture
from trunkline.stems import RUN_ROWS, Stem

if TYPE_CHECKING:
    from trunkline.images import Picture

# Shape suffix legend: B = rows, H = height, W = width, C = channels

GENERATED_SIDE = 512
"""Side of generated pictures, in pixels."""


@dataclass(frozen=True)
class StemSpeed:
    """How fast a stem runs.

    Attributes:
        precision: Which network.
        threads: Threads of ONNX Runtime; None leaves it the choice.
        size_bytes: Of the file.
        stem_error: Embedding error of its features; None if the cluster never told.
        load_s: Seconds to make the session.
        first_s: Seconds of the first batch.
        rows_per_batch: Pictures in a batch.
        images_per_s: Through the network alone.
        decoded_images_per_s: With decoding, resizing and cropping before it, on the same thread.
    """

    precision: str
    threads: int | None
    size_bytes: int
    stem_error: float | None
    load_s: float
    first_s: float
    rows_per_batch: int
    images_per_s: float
    decoded_images_per_s: float


def measure_speed(stem: Stem, rows: Sequence[Picture], seconds: float) -> StemSpeed:
    """Run a stem that has not run yet.

    Args:
        stem: The stem.
        rows: Pictures, one at least; used again and again.
        seconds: How long each of the two rates is measured. At least one batch is run.
    """
    import onnxruntime  # noqa: F401  # so that its own loading is not counted

    batch = [rows[index % len(rows)] for index in range(RUN_ROWS)]
    pixels_BHWC = np.stack([row.preprocessed(stem.preprocessing) for row in batch])
    load_s = _timed(stem.load)
    first_s = _timed(lambda: stem.run_pixels(pixels_BHWC))
    return StemSpeed(
        precision=stem.precision,
        threads=stem.threads,
        size_bytes=stem.size_bytes,
        stem_error=stem.stem_error,
        load_s=load_s,
        first_s=first_s,
        rows_per_batch=RUN_ROWS,
        images_per_s=RUN_ROWS * _rate(lambda: stem.run_pixels(pixels_BHWC), seconds),
        decoded_images_per_s=RUN_ROWS * _rate(lambda: stem.run(batch), seconds),
    )


def measure_codecs(stem: Stem, rows: Sequence[Picture]) -> dict[str, float | None]:
    """Return the mean bytes of a row in each codec, with and without zstd; None where it cannot hold the features.

    Args:
        stem: A stem with the codec ``float32``.
        rows: Pictures, one at least; as many of the first ``RUN_ROWS`` count as travel together.

    Raises:
        PayloadTooLargeError: Not even one of them does.
    """
    fits = rows_per_chunk(quantise.row_bytes(stem.feature_shape, quantise.FLOAT32))
    features = stem.run(rows[: min(RUN_ROWS, fits)])
    sizes: dict[str, float | None] = {}
    for codec in quantise.CODECS:
        for suffix in ("", quantise.ZSTD):
            sizes[codec + suffix] = _bytes_per_row(features, codec, stem.channel_axis, bool(suffix))
    return sizes


def generated_pictures(count: int) -> list[Picture]:
    """Return JPEG files of smooth shapes with some noise, ``GENERATED_SIDE`` pixels a side; the same each time."""
    generator = np.random.default_rng(0)
    made: list[Picture] = []
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 12, 3)).astype(np.uint8))
        smooth = np.asarray(coarse.resize((GENERATED_SIDE, GENERATED_SIDE), Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + generator.integers(-12, 13, smooth.shape).astype(np.int16)
        buffer = io.BytesIO()
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        made.append(BytesPicture(buffer.getvalue(), f"generated picture {number}"))
    return made


def _bytes_per_row(features: npt.NDArray[np.floating], codec: str, channel_axis: int, compress: bool) -> float | None:
    try:
        rows = quantise.pack(features, codec, channel_axis)
    except WireError:
        return None
    return encoded_size(encode_rows(rows, compress=compress)) / len(features)


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _rate(action: Callable[[], object], seconds: float) -> float:
    """Return how often a second an action can be done."""
    count, started = 0, time.perf_counter()
    while True:
        action()
        count += 1
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return count / elapsed
