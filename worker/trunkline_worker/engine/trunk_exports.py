"""Trunks as ONNX files: exported once, kept in storage."""

from __future__ import annotations

import hashlib
import json
import logging

import torch
from trunkline_wire.errors import WireError
from trunkline_wire.specs import INPUT_CUT, BackboneSpec

from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.export import MAX_EXPORT_BYTES, export_module, sample_images
from trunkline_worker.backbones.onnx_safety import check_onnx
from trunkline_worker.engine.exports import TRUNKS, ExportStore
from trunkline_worker.engine.runtimes import TRUNK_INPUT, TRUNK_OUTPUT
from trunkline_worker.store.blobs import BlobStore

logger = logging.getLogger(__name__)

_TRUNK_FORMAT = 1


class TrunkExports:
    """Exports trunks of one backbone. Its methods block: call them from threads."""

    def __init__(self, backbone: Backbone, blobs: BlobStore) -> None:
        """Keep the backbone, on the CPU, and where files are kept."""
        self._backbone = backbone
        self._exports = ExportStore(blobs)

    def get(self, spec: BackboneSpec, cut: str, whole: str = "") -> bytes:
        """Return the file of the trunk behind a cut, exporting it where storage lacks it.

        Raises:
            WireError: UNSUPPORTED, PAYLOAD_TOO_LARGE.
        """
        fingerprint = trunk_fingerprint(spec, cut, whole)
        found = self._exports.find(TRUNKS, fingerprint)
        if found is not None:
            check_onnx(found[1], MAX_EXPORT_BYTES)
            return found[1]
        size = spec.preprocessing.input_size
        with torch.inference_mode():
            images = sample_images(2, size)
            example = images if cut == INPUT_CUT else self._backbone.stem(cut)(images)
        # An inference tensor cannot be traced; a copy made outside of the mode can.
        data = export_module(self._backbone.trunk(cut, whole), example.clone(), TRUNK_INPUT, TRUNK_OUTPUT)
        try:
            self._exports.put(TRUNKS, fingerprint, data)
        except WireError as error:
            logger.warning("the exported trunk of %s/%s is not kept: %s", spec.name, cut, error)
        return data


def trunk_fingerprint(spec: BackboneSpec, cut: str, whole: str) -> str:
    """Return what tells trunks apart: weights, preprocessing, where it begins and where it ends."""
    found = spec.cut(cut)
    assert found is not None
    parts = [_TRUNK_FORMAT, found.fingerprint, spec.embedding_fingerprint, *([whole] if whole else [])]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
