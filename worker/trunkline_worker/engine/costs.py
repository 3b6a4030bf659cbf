"""What the codecs do to the embedding and how many bytes they take, at one cut, on sample pictures.

Measured once per cut, input size and stem, and remembered in storage. The exact stem and the float32 trunk are what
everything is compared with: for features that a quantised stem makes, an error is that of codec and stem together.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from trunkline_wire.compress import compress
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.preprocess import decode_image
from trunkline_wire.quantise import CODECS, IMAGES, ZSTD, PackedRows, pack, unpack
from trunkline_wire.specs import FLOAT32, INPUT_CUT, BackboneSpec, CodecCost, CutSpec, Preprocessing

from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.engine.choice import embedding_error
from trunkline_worker.engine.runtime_names import TORCH_FP32
from trunkline_worker.engine.sample import NUM_PICTURES, sample_pictures
from trunkline_worker.engine.torch_runtimes import exact_features, torch_runtime
from trunkline_worker.store.blobs import BlobStore

# Shape suffix legend: B = rows, H = height, W = width, C = channels, D = embedding columns

logger = logging.getLogger(__name__)

PIXELS = "uint8"
"""Codec name of rows that are pixels."""

JPEG_QUALITY = 90

_NOTE_FORMAT = 1


@dataclass(frozen=True)
class CodecTable:
    """How rows at a cut may travel. A codec that cannot hold the features there is left out.

    Attributes:
        codecs: By falling size before zstd, each without and with it.
        jpeg_bytes_per_row: Mean size of the sample pictures as JPEG files of quality ``JPEG_QUALITY``.
        sample: What they are.
    """

    codecs: tuple[CodecCost, ...]
    jpeg_bytes_per_row: float
    sample: str

    def error(self, codec: str) -> float | None:
        """Return the embedding error of a codec; None for one that is left out."""
        return next((one.embedding_error for one in self.codecs if one.codec == codec), None)


@dataclass(frozen=True)
class Reference:
    """What is sent, and what the embedding would be without any error.

    Attributes:
        pictures_BHWC: uint8.
        features: (B, ...) float32, that a stem made of them; the pictures themselves at ``input``.
        embedding_BD: float32, the columns behind the cut, exact.
        error: What the stem does to the embedding; 0 for the exact one.
    """

    pictures_BHWC: npt.NDArray[np.uint8]
    features: npt.NDArray[np.generic]
    embedding_BD: Tensor
    error: float = 0.0


@dataclass(frozen=True)
class Coded:
    """Rows after a codec.

    Attributes:
        codec: Its name.
        sizes_bytes: By name, without and where it exists with zstd, of all rows.
        features: What the other side gets out; None where that is exactly what went in.
    """

    codec: str
    sizes_bytes: dict[str, int]
    features: npt.NDArray[np.generic] | None


class CodecMeter:
    """Measures and remembers. Its methods block: call them from threads, those that say so from the device's."""

    def __init__(self, backbone: Backbone, placed: Backbone, blobs: BlobStore, *, device: torch.device) -> None:
        """Prepare.

        Args:
            backbone: On the CPU.
            placed: The same, on the device.
            blobs: Where measurements are kept.
            device: Where trunks run.
        """
        self._backbone = backbone
        self._placed = placed
        self._blobs = blobs
        self._device = device

    def pictures(self, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
        """Return the sample pictures, (B, H, W, 3)."""
        return sample_pictures(self._backbone.samples, preprocessing)

    def reference(self, cut: CutSpec, pictures_BHWC: npt.NDArray[np.uint8]) -> Reference:
        """Compute exact features and their embedding. On the device's thread."""
        features = exact_features(self._placed, cut.name, pictures_BHWC, self._device)
        return Reference(pictures_BHWC, features, self._embed(cut, features))

    def coded(self, cut: CutSpec, codec: str, reference: Reference) -> Coded | None:
        """Take the reference's features through a codec; None where they are beyond what it can hold."""
        if codec == PIXELS:
            return _coded_array(codec, reference.features)
        if codec == IMAGES:
            files = jpeg_files(reference.pictures_BHWC)
            decoded_BHWC = np.stack([np.asarray(decode_image(one)) for one in files])
            return Coded(codec, {codec: sum(map(len, files))}, decoded_BHWC)
        try:
            packed = pack(reference.features, codec, cut.channel_axis)  # type: ignore[arg-type]
        except WireError as error:
            if error.code is not ErrorCode.NOT_FINITE:
                raise
            return None
        if not isinstance(packed, PackedRows):
            return _coded_array(codec, packed)
        scales = packed.scale_BC.nbytes + packed.offset_BC.nbytes
        sizes = {codec: packed.nbytes, codec + ZSTD: scales + _compressed_bytes(packed.data_BZ)}
        return Coded(codec, sizes, unpack(packed))

    def error(self, spec: BackboneSpec, cut: CutSpec, reference: Reference, features: npt.NDArray[np.generic]) -> float:
        """Return what other features than the exact ones do to the embedding. On the device's thread."""
        slices = [one for one in spec.slices if one.name in cut.slices]
        return embedding_error(self._embed(cut, features), reference.embedding_BD, slices)

    def table(self, reference: Reference, coded: Sequence[tuple[Coded, float]]) -> CodecTable:
        """Put together what was measured. A codec with an error that is no number is left out."""
        num_rows = len(reference.pictures_BHWC)
        codecs = tuple(
            CodecCost(name, size / num_rows, error)
            for one, error in coded
            if math.isfinite(error)
            for name, size in one.sizes_bytes.items()
        )
        jpeg_bytes = sum(map(len, jpeg_files(reference.pictures_BHWC)))
        sample = f"{num_rows} pictures: {self._backbone.samples.description}"
        return CodecTable(codecs, jpeg_bytes / num_rows, sample)

    def remembered(self, spec: BackboneSpec, cut: CutSpec, precision: str) -> CodecTable | None:
        """Return what an earlier measurement said of features that the stem of a precision makes, or None."""
        try:
            note = json.loads(self._blobs.get(self._note_path(spec, cut, precision)))
            table = CodecTable(
                tuple(
                    CodecCost(str(one["codec"]), float(one["bytes_per_row"]), float(one["embedding_error"]))
                    for one in note["codecs"]
                ),
                float(note["jpeg_bytes_per_row"]),
                str(note["sample"]),
            )
        except WireError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                raise
            return None
        except (ValueError, KeyError, TypeError):
            return None
        numbers = [table.jpeg_bytes_per_row]
        for one in table.codecs:
            numbers += [one.bytes_per_row, one.embedding_error]
        return table if table.codecs and all(map(math.isfinite, numbers)) else None

    def remember(self, spec: BackboneSpec, cut: CutSpec, precision: str, table: CodecTable) -> None:
        """Keep a measurement; where storage is full, do without."""
        size = spec.preprocessing.input_size
        logger.info("codecs of %s/%s at %d px behind a %s stem: %s", spec.name, cut.name, size, precision, table)
        try:
            self._blobs.put(self._note_path(spec, cut, precision), json.dumps(asdict(table), allow_nan=False).encode())
        except WireError as error:
            logger.warning("what the codecs cost is not kept: %s", error)

    def _embed(self, cut: CutSpec, features: npt.NDArray[np.generic]) -> Tensor:
        # A copy: a trunk that only passes features on would share their memory.
        return torch_runtime(self._placed, cut, TORCH_FP32, self._device).run(features).clone()

    def _note_path(self, spec: BackboneSpec, cut: CutSpec, precision: str) -> str:
        parts = [
            _NOTE_FORMAT,
            spec.space(cut, precision).fingerprint,
            spec.embedding_fingerprint,
            self._backbone.samples.digest,
            NUM_PICTURES,
            list(CODECS),
        ]
        return f"costs/{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.json"


def codecs_at(cut: str) -> tuple[str, ...]:
    """Return how rows that enter at a cut may travel, zstd left out."""
    return (PIXELS, IMAGES) if cut == INPUT_CUT else CODECS


def jpeg_files(pictures_BHWC: npt.NDArray[np.uint8]) -> list[bytes]:
    """Return pictures as JPEG files of quality ``JPEG_QUALITY``."""
    files = []
    for picture_HWC in pictures_BHWC:
        buffer = io.BytesIO()
        Image.fromarray(picture_HWC).save(buffer, format="JPEG", quality=JPEG_QUALITY)
        files.append(buffer.getvalue())
    return files


def _coded_array(codec: str, rows: npt.NDArray[np.generic]) -> Coded:
    sizes = {codec: rows.nbytes, codec + ZSTD: _compressed_bytes(rows)}
    return Coded(codec, sizes, None if codec in (FLOAT32, PIXELS) else rows)


def _compressed_bytes(array: npt.NDArray[np.generic]) -> int:
    # As messages are: compressed only where that makes them smaller.
    return min(array.nbytes, len(compress(array.tobytes())))
