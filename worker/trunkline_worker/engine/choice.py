"""Which runtime runs a trunk: measured once per trunk and machine, remembered in storage.

Of the runtimes whose embedding stays within ``MAX_RUNTIME_ERROR`` of float32 torch the fastest wins. One that is not
exact must win by a clear margin.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import INPUT_CUT, BackboneSpec, Preprocessing, SliceSpec, map_slice

from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.export import MAX_EXPORT_BYTES, export_module, sample_images
from trunkline_worker.backbones.onnx_safety import check_onnx
from trunkline_worker.engine.batcher import Monotonic
from trunkline_worker.engine.exports import TRUNKS, ExportStore
from trunkline_worker.engine.runtimes import (
    ONNX_FP32,
    TORCH_FP32,
    TRUNK_INPUT,
    TRUNK_OUTPUT,
    OnnxRuntime,
    Runtime,
    exact_features,
    torch_candidates,
    torch_runtime,
)
from trunkline_worker.engine.sample import sample_pictures
from trunkline_worker.store.blobs import BlobStore

logger = logging.getLogger(__name__)

MAX_RUNTIME_ERROR = 0.02
"""Largest error of a runtime that is used: over the slices of the embedding the largest relative difference to
float32 torch, each slice taken as one vector over the sample."""

EXACT_ERROR = 1e-3
"""Up to this error a runtime counts as exact."""

INEXACT_GAIN = 1.25
"""An inexact runtime must be this many times as fast as the fastest exact one."""

_TRUNK_FORMAT = 1
_REPEATS = 3
_BUDGET_S = 2.0


@dataclass(frozen=True)
class Prepared:
    """A runtime, ready to run, and its error as defined at ``MAX_RUNTIME_ERROR``."""

    runtime: Runtime
    error: float


@dataclass(frozen=True)
class Measurement:
    """What was measured of one runtime."""

    runtime: str
    error: float
    rows_per_s: float


def choose(measurements: Sequence[Measurement]) -> Measurement:
    """Return the one to use. One of them is float32 torch, whose error is 0."""
    exact = [one for one in measurements if one.error <= EXACT_ERROR]
    best = max(exact, key=lambda one: one.rows_per_s)
    inexact = [
        one
        for one in measurements
        if EXACT_ERROR < one.error <= MAX_RUNTIME_ERROR and one.rows_per_s >= INEXACT_GAIN * best.rows_per_s
    ]
    return max(inexact, key=lambda one: one.rows_per_s, default=best)


def embedding_error(got_BD: Tensor, expected_BD: Tensor, slices: Sequence[SliceSpec]) -> float:
    """Return the largest relative difference over the slices. NaN and infinity count as infinite.

    Shape:
        got_BD, expected_BD: (B, D), the columns of ``slices`` side by side.
    """
    if not torch.isfinite(got_BD).all():
        return float("inf")
    first = slices[0].start
    errors = []
    for one in slices:
        columns = slice(one.start - first, one.stop - first)
        expected = expected_BD[:, columns]
        errors.append(float((got_BD[:, columns] - expected).norm() / expected.norm().clamp_min(1e-12)))
    return max(errors)


class RuntimeChooser:
    """Builds, measures and remembers. Its methods block: call them from threads."""

    def __init__(
        self,
        backbone: Backbone,
        placed: Backbone,
        blobs: BlobStore,
        *,
        device: torch.device,
        num_threads: int,
        clock: Monotonic,
        use_onnx: bool = True,
    ) -> None:
        """Prepare.

        Args:
            backbone: On the CPU.
            placed: The same, on the device.
            blobs: Where exported trunks and choices are kept.
            device: Where trunks run.
            num_threads: Of the CPU, for one batch.
            clock: Measures.
            use_onnx: Whether to try ONNX Runtime (on the CPU only).
        """
        self._backbone = backbone
        self._placed = placed
        self._blobs = blobs
        self._exports = ExportStore(blobs)
        self._device = device
        self._num_threads = num_threads
        self._clock = clock
        self._use_onnx = use_onnx and device.type == "cpu"

    def remembered(self, cut: str, input_size: int, tap: str = "") -> Prepared | None:
        """Return the runtime that an earlier measurement on a machine like this chose, or None."""
        spec = self._backbone.describe(input_size)
        try:
            note = json.loads(self._blobs.get(self._note_path(spec, cut, tap)))
            name, error = str(note["runtime"]), float(note["error"])
            runtime = self._build(name, spec, cut, tap)
        except WireError as error_read:
            if error_read.code not in (ErrorCode.NOT_FOUND, ErrorCode.UNSUPPORTED):
                raise
            return None
        except (ValueError, KeyError, TypeError):
            return None
        return None if runtime is None else Prepared(runtime, error)

    def candidates(self, cut: str, input_size: int, tap: str = "") -> list[Runtime]:
        """Build every runtime worth trying, float32 torch first. Exports the trunk where storage lacks it."""
        spec = self._backbone.describe(input_size)
        names = list(torch_candidates(self._device))
        if self._use_onnx:
            names.append(ONNX_FP32)
        built = [self._build(name, spec, cut, tap) for name in names]
        return [one for one in built if one is not None]

    def measure(self, cut: str, input_size: int, candidates: Sequence[Runtime], tap: str = "") -> Prepared:
        """Run the candidates on a small batch, choose one and remember it. Nothing else should run meanwhile."""
        spec = self._backbone.describe(input_size)
        slices = trunk_slices(spec, cut, tap)
        sample = self._sample(cut, spec.preprocessing)
        expected_BD = candidates[0].run(sample)
        measurements = []
        for runtime in candidates:
            got_BD = runtime.run(sample)
            error = 0.0 if runtime.name == TORCH_FP32 else embedding_error(got_BD, expected_BD, slices)
            measurements.append(Measurement(runtime.name, error, self._rows_per_s(runtime, sample)))
        best = choose(measurements)
        logger.info("runtime of %s/%s/%s at %d px: %s of %s", spec.name, cut, tap, input_size, best, measurements)
        self._remember(self._note_path(spec, cut, tap), best)
        return Prepared(next(one for one in candidates if one.name == best.runtime), best.error)

    def _rows_per_s(self, runtime: Runtime, sample: npt.NDArray[np.generic]) -> float:
        best_s, spent_s = float("inf"), 0.0
        for _ in range(_REPEATS):
            start = self._clock.monotonic()
            runtime.run(sample)
            elapsed_s = self._clock.monotonic() - start
            best_s, spent_s = min(best_s, elapsed_s), spent_s + elapsed_s
            if spent_s > _BUDGET_S:
                break
        return len(sample) / max(best_s, 1e-9)

    def _sample(self, cut: str, preprocessing: Preprocessing) -> npt.NDArray[np.generic]:
        pictures_BHWC = sample_pictures(self._backbone.samples, preprocessing)
        return exact_features(self._placed, cut, pictures_BHWC, self._device)

    def _build(self, name: str, spec: BackboneSpec, cut: str, tap: str = "") -> Runtime | None:
        """Build a runtime by name; None where this machine, or this network, has no such runtime."""
        if name != ONNX_FP32:
            if name not in torch_candidates(self._device):
                return None
            found = spec.cut(cut)
            assert found is not None
            return torch_runtime(self._placed, found, name, self._device, tap=tap)
        if not self._use_onnx:
            return None
        try:
            return OnnxRuntime(self._exported(spec, cut, tap), num_threads=self._num_threads)
        except Exception as error:  # neither exporter nor loader may keep torch from serving
            logger.warning("no ONNX Runtime for %s/%s: %s", spec.name, cut, error)
            return None

    def _exported(self, spec: BackboneSpec, cut: str, tap: str = "") -> bytes:
        fingerprint = _trunk_fingerprint(spec, cut, tap)
        found = self._exports.find(TRUNKS, fingerprint)
        if found is not None:
            check_onnx(found[1], MAX_EXPORT_BYTES)
            return found[1]
        size = spec.preprocessing.input_size
        with torch.inference_mode():
            images = sample_images(2, size)
            example = images if cut == INPUT_CUT else self._backbone.stem(cut)(images)
        # An inference tensor cannot be traced; a copy made outside of the mode can.
        data = export_module(self._backbone.trunk(cut, tap), example.clone(), TRUNK_INPUT, TRUNK_OUTPUT)
        try:
            self._exports.put(TRUNKS, fingerprint, data)
        except WireError as error:
            logger.warning("the exported trunk of %s/%s is not kept: %s", spec.name, cut, error)
        return data

    def _note_path(self, spec: BackboneSpec, cut: str, tap: str = "") -> str:
        parts = [
            _trunk_fingerprint(spec, cut, tap),
            self._backbone.samples.digest,
            self._device_name(),
            self._num_threads,
            self._use_onnx,
            torch.__version__,
            onnxruntime.__version__,
        ]
        return f"runtimes/{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.json"

    def _device_name(self) -> str:
        if self._device.type == "cuda":
            return torch.cuda.get_device_name(self._device)
        return f"cpu {torch.backends.cpu.get_cpu_capability()} {torch_candidates(self._device)}"

    def _remember(self, path: str, measurement: Measurement) -> None:
        try:
            self._blobs.put(path, json.dumps(asdict(measurement)).encode())
        except WireError as error:
            logger.warning("the choice of a runtime is not kept: %s", error)


def trunk_slices(spec: BackboneSpec, cut: str, tap: str) -> list[SliceSpec]:
    """Return what comes out behind a cut, side by side: the slices of the embedding, or the map at a tap."""
    if tap:
        width = spec.slice_width(map_slice(tap))
        assert width is not None
        return [SliceSpec(map_slice(tap), 0, width)]
    found = spec.cut(cut)
    assert found is not None
    return [one for one in spec.slices if one.name in found.slices]


def _trunk_fingerprint(spec: BackboneSpec, cut: str, tap: str) -> str:
    found = spec.cut(cut)
    assert found is not None
    parts = [_TRUNK_FORMAT, found.fingerprint, spec.embedding_fingerprint, *([tap] if tap else [])]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
