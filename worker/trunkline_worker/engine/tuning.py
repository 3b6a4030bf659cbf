"""The steps from a trunk to the runtime that runs it. ``prepared`` says which of them follow one another, and where."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import CutSpec, RuntimeResult, Tuning

from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.engine import runtime_names as names
from trunkline_worker.engine.batcher import Monotonic
from trunkline_worker.engine.building import Builder, libraries, reason_of
from trunkline_worker.engine.choice import Prepared, best_speed, trunk_slices
from trunkline_worker.engine.notes import read_note, write_note
from trunkline_worker.engine.runtimes import Runtime, batch_sizes, has_fast_bf16, has_fast_fp16
from trunkline_worker.engine.sample import sample_pictures
from trunkline_worker.engine.torch_runtimes import exact_features
from trunkline_worker.engine.trials import FULL_BUDGET_S, QUICK_BUDGET_S, Refused, Trials
from trunkline_worker.engine.trunk_exports import TrunkExports, trunk_fingerprint
from trunkline_worker.store.blobs import BlobStore

if TYPE_CHECKING:
    from trunkline_worker.engine.targets import TrunkKey

logger = logging.getLogger(__name__)

_NOTE_FORMAT = 2
_LATER = "not tried at start, for it takes long to make; tuning again tries it"


@dataclass(frozen=True)
class Exported:
    """A trunk as an ONNX file, or why there is none."""

    data: bytes | None = None
    refused: str = ""


class RuntimeChooser:
    """Builds, measures and remembers the runtimes of one backbone. Its methods block: each says on which thread."""

    def __init__(
        self,
        backbone: Backbone,
        placed: Backbone,
        blobs: BlobStore,
        *,
        device: torch.device,
        num_threads: int,
        most_rows: int,
        clock: Monotonic,
        use_onnx: bool = True,
        fixed: str = "",
    ) -> None:
        """Prepare.

        Args:
            backbone: On the CPU.
            placed: The same, on the device.
            blobs: Where exported trunks and choices are kept.
            device: Where trunks run.
            num_threads: Of the CPU, for one batch.
            most_rows: Most rows of 224 px in a batch.
            clock: Measures.
            use_onnx: Whether to try what reads an exported trunk (on the CPU only).
            fixed: The runtime that the operator wants. Empty: whichever is best.

        Raises:
            WireError: INVALID_ARGUMENT for a fixed runtime that does not exist.
        """
        if fixed:
            names.check_runtime(fixed)
        self._backbone = backbone
        self._placed = placed
        self._blobs = blobs
        self._exports = TrunkExports(backbone, blobs)
        self._device = device
        self._num_threads = num_threads
        self._most_rows = most_rows
        self._clock = clock
        self._use_onnx = use_onnx
        self.fixed = fixed
        self._builder = Builder(placed, device=device, num_threads=num_threads, most_rows=most_rows, use_onnx=use_onnx)

    @property
    def available(self) -> tuple[str, ...]:
        """The runtimes that this machine may have, in the order of the trials: the operator's comes first."""
        found = [name for name in names.RUNTIMES if not self._builder.why_not(name)]
        return tuple(sorted(found, key=lambda name: name != self.fixed))

    def noted(self, key: TrunkKey) -> Tuning | None:
        """Return what an earlier measurement on a machine like this found out, or None. On the exporting thread."""
        return read_note(self._blobs, self._note_path(key))

    def remember(self, key: TrunkKey, tuning: Tuning) -> None:
        """Keep what was found out. On the exporting thread."""
        write_note(self._blobs, self._note_path(key), tuning)

    def exported(self, key: TrunkKey) -> Exported:
        """Return the trunk as a file, exporting it where storage lacks it. On the exporting thread."""
        try:
            return Exported(self._exports.get(self._backbone.describe(key.input_size), key.cut, key.whole))
        except Exception as error:  # neither exporter nor storage may keep torch from serving
            reason = reason_of(error)
            logger.warning("no export of %s/%s: %s", self._backbone.name, key.cut, reason)
            return Exported(refused=reason)

    def load(self, key: TrunkKey, tuning: Tuning, exported: Exported) -> Prepared:
        """Make the runtime that was chosen before, and check that its answers are still right. On the device's thread.

        Raises:
            Refused: It cannot be used.
        """
        runtime, _ = self._checked(key, tuning.chosen, exported)
        result = tuning.runtime(tuning.chosen)
        assert result is not None
        speeds = {one.batch_rows: one.rows_per_s for one in result.speeds}
        return Prepared(runtime, result.error, speeds.get(tuning.batch_rows, 0.0), tuning.batch_rows, tuning)

    def load_fixed(self, key: TrunkKey, exported: Exported) -> Prepared:
        """Make the runtime that the operator wants, and check its answers; it is not timed. On the device's thread.

        Raises:
            Refused: It cannot be used.
        """
        runtime, result = self._checked(key, self.fixed, exported)
        tuning = self._tuning(key, (result,), result, self._sizes(key)[-1])
        return Prepared(runtime, result.error, tuning=tuning)

    def begin(self, key: TrunkKey, exported: Exported, *, everything: bool, refused: Mapping[str, str]) -> Trials:
        """Return trials to which every one of ``available`` is to be put. On the device's thread.

        Args:
            key: Which trunk.
            exported: Of it.
            everything: Whether to try those that are slow to make, too.
            refused: Runtimes that are not to be used, and why.
        """
        trials = self._trials(key, exported, FULL_BUDGET_S if everything else QUICK_BUDGET_S)
        trials.attempt(names.TORCH_FP32)
        trials.refuse(refused)
        if self.fixed:
            unavailable = self._builder.why_not(self.fixed)
            trials.refuse({self.fixed: unavailable} if unavailable else {})
        if not everything:
            trials.refuse({one: _LATER for one in self.available if one in names.SLOW_TO_MAKE and one != self.fixed})
        return trials

    def finish(self, key: TrunkKey, trials: Trials) -> Prepared:
        """Choose. On the device's thread.

        Raises:
            Refused: The runtime that the operator wants cannot be used.
        """
        runtime, result = trials.finish(self.fixed)
        speed = best_speed(result)
        tuning = self._tuning(key, trials.results, result, speed.batch_rows)
        logger.info("runtime of %s: %s", self._label(key), tuning)
        return Prepared(runtime, result.error, speed.rows_per_s, speed.batch_rows, tuning)

    def _checked(self, key: TrunkKey, name: str, exported: Exported) -> tuple[Runtime, RuntimeResult]:
        if name == names.TORCH_FP32:  # there is nothing to compare it with
            return self._build(key, name, exported), RuntimeResult(name)
        unavailable = self._builder.why_not(name)
        if unavailable:
            raise Refused(unavailable)
        return self._trials(key, exported, 0.0).check(name)

    def _trials(self, key: TrunkKey, exported: Exported, budget_s: float) -> Trials:
        spec = self._backbone.describe(key.input_size)
        pictures_BHWC = sample_pictures(self._backbone.samples, spec.preprocessing)
        return Trials(
            lambda name: self._build(key, name, exported),
            sample=exact_features(self._placed, key.cut, pictures_BHWC, self._device),
            slices=trunk_slices(spec, key.cut, key.whole),
            batch_sizes=self._sizes(key),
            budget_s=budget_s,
            clock=self._clock,
            label=self._label(key),
        )

    def _build(self, key: TrunkKey, name: str, exported: Exported) -> Runtime:
        if name in names.FROM_ONNX and exported.data is None:
            raise WireError(ErrorCode.UNSUPPORTED, exported.refused)
        return self._builder.build(name, self._cut(key), key.input_size, key.whole, exported.data)

    def _cut(self, key: TrunkKey) -> CutSpec:
        found = self._backbone.describe(key.input_size).cut(key.cut)
        assert found is not None
        return found

    def _sizes(self, key: TrunkKey) -> tuple[int, ...]:
        return batch_sizes(self._device, self._most_rows, key.input_size)

    def _tuning(
        self, key: TrunkKey, results: tuple[RuntimeResult, ...], chosen: RuntimeResult, batch_rows: int
    ) -> Tuning:
        return Tuning(
            backbone=self._backbone.name,
            cut=key.cut,
            input_size=key.input_size,
            device=str(self._device),
            num_threads=self._num_threads,
            runtimes=tuple(sorted(results, key=lambda one: names.RUNTIMES.index(one.runtime))),
            chosen=chosen.runtime,
            batch_rows=batch_rows,
            fixed=bool(self.fixed),
            libraries=libraries(),
        )

    def _label(self, key: TrunkKey) -> str:
        where = f"{self._backbone.name}/{key.cut}" + (f"/{key.whole}" if key.whole else "")
        return f"{where} at {key.input_size} px"

    def _note_path(self, key: TrunkKey) -> str:
        spec = self._backbone.describe(key.input_size)
        parts = [
            _NOTE_FORMAT,
            trunk_fingerprint(spec, key.cut, key.whole),
            self._backbone.samples.digest,
            self._device_name(),
            self._num_threads,
            self._sizes(key),
            self._use_onnx,
            self.fixed,
            libraries(),
        ]
        return f"runtimes/{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.json"

    def _device_name(self) -> str:
        if self._device.type == "cuda":
            return torch.cuda.get_device_name(self._device)
        halves = has_fast_bf16(self._device), has_fast_fp16(self._device)
        return f"cpu {torch.backends.cpu.get_cpu_capability()} {halves}"
