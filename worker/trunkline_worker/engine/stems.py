"""Stems that clients run: exported or quantised once, kept in storage with what they do to the embedding."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import onnxruntime
from trunkline_wire.limits import MAX_CODEC_ERROR, MAX_STEM_BYTES
from trunkline_wire.specs import BackboneSpec, CutSpec

from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.export import STEM_INPUT, STEM_OUTPUT, export_stem, session_options
from trunkline_worker.backbones.int8_stem import quantise_stem
from trunkline_worker.backbones.onnx_safety import check_onnx
from trunkline_worker.engine.exports import STEMS, ExportStore, StoredExport
from trunkline_worker.store.blobs import BlobStore

# Shape suffix legend: B = rows, H = height, W = width, C = channels

MAX_INT8_STEM_ERROR = MAX_CODEC_ERROR
"""Largest embedding error of a quantised stem that is offered: with more, no codec on top of it could stay within what
``codec="auto"`` keeps to."""


class StemMaker:
    """Makes stems and finds those made before. Its methods block: call them from threads."""

    def __init__(self, backbone: Backbone, blobs: BlobStore, *, num_threads: int) -> None:
        """Prepare.

        Args:
            backbone: On the CPU.
            blobs: Where stems are kept.
            num_threads: Of the CPU, to run a quantised stem on the sample.
        """
        self._backbone = backbone
        self._blobs = blobs
        self._exports = ExportStore(blobs)
        self._num_threads = num_threads

    def find(self, fingerprint: str) -> StoredExport | None:
        """Return the stem whose features have a fingerprint, or None where it is missing or damaged."""
        found = self._exports.find(STEMS, fingerprint)
        return None if found is None else found[0]

    def exact(self, spec: BackboneSpec, cut: CutSpec) -> StoredExport:
        """Export the exact stem, unless another caller was first. On the one thread that exports.

        Raises:
            WireError: UNSUPPORTED or PAYLOAD_TOO_LARGE where it cannot be exported, STORAGE_FULL.
        """
        return self._exact(spec, cut)[0]

    def quantised(self, spec: BackboneSpec, cut: CutSpec) -> bytes:
        """Return the quantised stem, made from the exact one. On the one thread that exports.

        Raises:
            WireError: As ``exact``; UNSUPPORTED where it cannot be quantised.
        """
        _, exact = self._exact(spec, cut)
        data = quantise_stem(exact, self._backbone.samples.calibration(spec.preprocessing))
        check_onnx(data, MAX_STEM_BYTES)
        return data

    def run(self, data: bytes, pictures_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the features that a file makes of pictures, as a client would compute them."""
        options = session_options(self._num_threads)
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        features: npt.NDArray[np.float32]
        (features,) = session.run([STEM_OUTPUT], {STEM_INPUT: pictures_BHWC})
        return features

    def features(self, stored: StoredExport, pictures_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the features that a stem in storage makes of pictures.

        Raises:
            WireError: NOT_FOUND or CORRUPT_DATA where it is missing or damaged.
        """
        return self.run(self._blobs.get_checked(stored.path, stored.sha256), pictures_BHWC)

    def keep(self, cut: CutSpec, data: bytes, embedding_error: float) -> StoredExport:
        """Keep a quantised stem with its error.

        Raises:
            WireError: STORAGE_FULL.
        """
        return self._exports.put(STEMS, cut.int8_fingerprint, data, embedding_error)

    def _exact(self, spec: BackboneSpec, cut: CutSpec) -> tuple[StoredExport, bytes]:
        found = self._exports.find(STEMS, cut.fingerprint)
        if found is not None:
            return found
        data = export_stem(self._backbone, cut.name, spec.preprocessing.input_size)
        return self._exports.put(STEMS, cut.fingerprint, data), data


def int8_refusal(error: float, spec: BackboneSpec, cut: CutSpec) -> str:
    """Return why a quantised stem with that embedding error is not offered; empty where it is."""
    if error <= MAX_INT8_STEM_ERROR:
        return ""
    what = f"changes the embedding by {error:.3g}" if math.isfinite(error) else "gives values that are not finite"
    return (
        f"the int8 stem of {spec.name} at cut {cut.name!r} and {spec.preprocessing.input_size} px {what}; a change of "
        f"at most {MAX_INT8_STEM_ERROR:g} is allowed"
    )
