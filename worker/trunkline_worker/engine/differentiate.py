"""The trunk as a function with a gradient: float32, frozen, and the same answer to the same question.

A backward pass brings its features along and runs the forward pass again, unless that one is still at hand. So its
answer depends on nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from trunkline_wire.bottleneck import ChannelLinear
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.finite import check_finite, is_finite, not_finite
from trunkline_wire.quantise import PackedRows, unpack
from trunkline_wire.specs import BackboneSpec, CutSpec, FeatureSpace, Timings, map_tap

from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.engine.api import DEFAULT_OUTPUTS, LOGITS, Payload, TrunkGradients, TrunkOutputs
from trunkline_worker.engine.batcher import Batcher, Monotonic
from trunkline_worker.engine.checks import check_rows, check_space, select_slices
from trunkline_worker.engine.compute import Work
from trunkline_worker.engine.graphs import Function, Graphs, Inputs
from trunkline_worker.engine.memory import is_out_of_memory
from trunkline_worker.engine.shared import Shared
from trunkline_worker.engine.threads import Threads

# Shape suffix legend: B = rows, D = outputs

CAPACITY = 16
"""Most parts of the network, by cut and outputs, that are kept. They share the weights: a part is a graph alone."""

_GRAPH_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
"""Most memory for forward passes that wait for their backward pass."""


@dataclasses.dataclass(frozen=True)
class _Target:
    """Where rows enter, and what is wanted of them."""

    cut: CutSpec
    outputs: tuple[str, ...]
    width: int


class Differentiator:
    """Answers ``forward`` and ``backward`` of an engine, between the batches of everybody else."""

    def __init__(
        self,
        placed: Backbone,
        threads: Threads,
        batcher: Batcher[Work],
        *,
        device: torch.device,
        clock: Monotonic,
        max_rows: Callable[[int], int],
    ) -> None:
        """Prepare.

        Args:
            placed: On the device.
            threads: Where it is computed.
            batcher: Whose line the rows count in.
            device: Where the trunk runs.
            clock: Deadlines and timings.
            max_rows: Most rows at a time, by input size.
        """
        self._placed = placed
        self._threads = threads
        self._batcher = batcher
        self._device = device
        self._clock = clock
        self._max_rows = max_rows
        self._graphs = Graphs(_GRAPH_BYTES.get(device.type, _GRAPH_BYTES["cpu"]))
        self._functions: Shared[tuple[str, tuple[str, ...]], Function] = Shared(self._make, capacity=CAPACITY)

    async def forward(
        self,
        spec: BackboneSpec,
        space: FeatureSpace,
        rows: Payload,
        outputs: Sequence[str],
        decoder: ChannelLinear | None,
        deadline: float | None,
    ) -> TrunkOutputs:
        """Return the outputs. See ``Engine.forward``."""
        target = self._target(spec, space, outputs)
        features = _checked(rows, target.cut, decoder)
        function = await self._functions.get((target.cut.name, target.outputs))

        def run(some: slice) -> npt.NDArray[np.float32]:
            inputs = self._inputs(features[some], decoder)
            return self._guarded(len(inputs[0]), lambda: self._graphs.forward(function, inputs).cpu().numpy())

        parts, timings = await self._in_slices(spec, len(features), run, deadline)
        outputs_BD = np.concatenate(parts)
        _check_no_overflow(outputs_BD, "outputs")
        return TrunkOutputs(outputs_BD, timings)

    async def backward(
        self,
        spec: BackboneSpec,
        space: FeatureSpace,
        rows: Payload,
        gradient_BD: npt.NDArray[np.generic],
        outputs: Sequence[str],
        decoder: ChannelLinear | None,
        deadline: float | None,
    ) -> TrunkGradients:
        """Return the gradients. See ``Engine.backward``."""
        target = self._target(spec, space, outputs)
        features = _checked(rows, target.cut, decoder)
        _check_gradient(gradient_BD, len(features), target.width)
        function = await self._functions.get((target.cut.name, target.outputs))

        def run(some: slice) -> list[npt.NDArray[np.float32]]:
            inputs = self._inputs(features[some], decoder)
            gradient = _tensor(gradient_BD[some], self._device)
            return self._guarded(len(inputs[0]), lambda: self._gradients(function, inputs, gradient))

        parts, timings = await self._in_slices(spec, len(features), run, deadline)
        gradients = np.concatenate([part[0] for part in parts])
        _check_no_overflow(gradients, "gradients")
        own = None
        if decoder is not None:
            own = ChannelLinear(np.sum([one[1] for one in parts], axis=0), np.sum([one[2] for one in parts], axis=0))
        return TrunkGradients(gradients, own, timings)

    def _target(self, spec: BackboneSpec, space: FeatureSpace, outputs: Sequence[str]) -> _Target:
        """Check where rows enter, and the names of what is wanted."""
        if space.is_input or space.is_own or not space.backbone:
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                "only features at a cut behind 'input' have a gradient here, in the space of the cut itself: not "
                "images, local features or codes of a bottleneck",
            )
        cut, _ = check_space(space, spec, self._placed.check_cut)
        names = tuple(outputs) or DEFAULT_OUTPUTS
        if names == (LOGITS,):
            return _Target(cut, names, self._placed.num_logits)
        if LOGITS in names or any(map_tap(name) is not None for name in names):
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                f"outputs are slices of the embedding, or {LOGITS!r} alone; got {', '.join(names)[:200]}",
            )
        return _Target(cut, names, select_slices(names, spec, cut)[-1].stop)

    async def _make(self, key: tuple[str, tuple[str, ...]]) -> Function:
        return await self._threads.compute(self._build, *key)

    def _build(self, cut: str, outputs: tuple[str, ...]) -> Function:
        """Build the part behind a cut. It fits every input size.

        Of weights laid out as PyTorch does by default, as ``place`` leaves them. Convolutions on other layouts round
        differently, so a ReLU near 0 may open that is closed in a loop without a wire: enough to change a gradient in
        its third digit.
        """
        backbone = self._placed
        part = backbone.rest(cut) if outputs == (LOGITS,) else backbone.reader(cut, outputs)
        found = self._placed.describe().cut(cut)
        assert found is not None
        return Function(part, found.channel_axis).eval()

    async def _in_slices(
        self, spec: BackboneSpec, num_rows: int, run: Callable[[slice], Any], deadline: float | None
    ) -> tuple[list[Any], Timings]:
        """Run some rows after others, each time behind whoever is in the line already."""
        start = self._clock.monotonic()
        size = self._max_rows(spec.preprocessing.input_size)
        parts, trunk_s = [], 0.0

        def timed(some: slice) -> tuple[Any, float]:
            began = self._clock.monotonic()
            return run(some), self._clock.monotonic() - began

        with self._batcher.hold(num_rows):
            for first in range(0, num_rows, size):
                self._check_deadline(deadline)
                part, seconds = await self._threads.compute(timed, slice(first, first + size))
                parts.append(part)
                trunk_s += seconds
        total_s = self._clock.monotonic() - start
        return parts, Timings(queue_s=total_s - trunk_s, trunk_s=trunk_s, total_s=total_s)

    def _check_deadline(self, deadline: float | None) -> None:
        if deadline is not None and self._clock.monotonic() >= deadline:
            raise WireError(
                ErrorCode.DEADLINE_EXCEEDED,
                "the deadline passed before all rows had their turn; allow more time or send fewer rows at once",
            )

    def _inputs(self, features: npt.NDArray[np.float32], decoder: ChannelLinear | None) -> Inputs:
        arrays = [features] if decoder is None else [features, decoder.weight, decoder.bias]
        return tuple(_tensor(one, self._device).requires_grad_() for one in arrays)

    def _gradients(self, function: Function, inputs: Inputs, gradient_BD: Tensor) -> list[npt.NDArray[np.float32]]:
        gradients = self._graphs.take(function, inputs).gradients(gradient_BD)
        return [one.cpu().contiguous().numpy() for one in gradients]

    def _guarded(self, num_rows: int, run: Callable[[], Any]) -> Any:
        """Run on the device, without what waits for a backward pass if that is needed for the room."""
        try:
            try:
                return _exactly(run)
            except (MemoryError, RuntimeError) as error:
                if not (is_out_of_memory(error) and len(self._graphs)):
                    raise
            self._graphs.clear()
            return _exactly(run)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise WireError(
                ErrorCode.WORKER_OOM,
                f"{num_rows} rows with what their gradient needs do not fit this worker's memory; send fewer rows at "
                "once or use a smaller input size",
            ) from error


def _checked(rows: Payload, cut: CutSpec, decoder: ChannelLinear | None) -> npt.NDArray[np.float32]:
    """Check rows that enter at a cut, or codes that a decoder turns into such, and return them as float32."""
    if decoder is not None:
        shape = list(cut.feature_shape)
        channels = shape[cut.channel_axis]
        if decoder.weight.ndim != 2 or decoder.weight.shape[0] != channels or decoder.bias.shape != (channels,):
            raise WireError(
                ErrorCode.SHAPE_MISMATCH,
                f"a decoder at cut {cut.name!r} has a weight of ({channels}, code channels) and a bias of "
                f"({channels}); got {decoder.weight.shape} and {decoder.bias.shape}",
            )
        check_finite(decoder.weight)
        check_finite(decoder.bias[:, None])
        shape[cut.channel_axis] = decoder.weight.shape[1]
        cut = dataclasses.replace(cut, feature_shape=tuple(shape))
    check_rows(rows, cut, is_input=False)
    if isinstance(rows, PackedRows):
        return unpack(rows)
    return np.asarray(rows).astype(np.float32, copy=False)


def _check_gradient(gradient_BD: npt.NDArray[np.generic], num_rows: int, width: int) -> None:
    if gradient_BD.shape != (num_rows, width):
        raise WireError(
            ErrorCode.SHAPE_MISMATCH,
            f"the gradient of the outputs has shape ({num_rows}, {width}), as the outputs; got {gradient_BD.shape}",
        )
    if gradient_BD.dtype.kind != "f":
        raise WireError(ErrorCode.DTYPE_MISMATCH, f"a gradient is of floats; got {gradient_BD.dtype}")
    if not is_finite(gradient_BD):
        row = int(np.isfinite(gradient_BD).all(axis=1).argmin())
        raise WireError(
            ErrorCode.NOT_FINITE,
            f"the gradient of row {row} holds NaN or infinity; lower the learning rate, clip, or leave this batch out",
        )


def _check_no_overflow(array: npt.NDArray[np.float32], what: str) -> None:
    if not is_finite(array):
        raise not_finite(
            ~np.isfinite(array),
            f"{what} beyond what float32 holds",
            "What was sent for them is far outside of what the network knows",
        )


def _tensor(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Return a copy as float32 on a device: nobody else can write to it."""
    return torch.tensor(array, dtype=torch.float32, device=device)


def _exactly(run: Callable[[], Any]) -> Any:
    """Run so that the numbers are the same every time."""
    exact: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if torch.cuda.is_available():
        # And not in TF32, which keeps ten bits.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with exact:
        return run()
