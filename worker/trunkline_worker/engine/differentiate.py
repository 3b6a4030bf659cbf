"""The trunk as a function with a gradient: float32, frozen, nothing kept between calls.

A backward pass runs the forward pass again, from the features that come with it, so its answer depends on nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from trunkline_wire.bottleneck import ChannelLinear
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.finite import check_finite
from trunkline_wire.quantise import PackedRows, unpack
from trunkline_wire.specs import BackboneSpec, CutSpec, FeatureSpace, Timings, map_tap

from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.engine.api import Payload, TrunkGradients, TrunkOutputs
from trunkline_worker.engine.batcher import Batcher, Monotonic
from trunkline_worker.engine.checks import check_rows, check_space, select_slices
from trunkline_worker.engine.compute import Work, is_out_of_memory
from trunkline_worker.engine.threads import Threads

# Shape suffix legend: B = rows, D = outputs

LOGITS = "logits"
"""Asks for the network's own outputs in place of slices of the embedding."""

DEFAULT_OUTPUTS = ("pooled",)

CAPACITY = 16
"""Most parts of the network, by cut and outputs, that are kept. They share the weights: a part is a graph alone."""


@dataclasses.dataclass(frozen=True)
class _Function:
    """What is computed: a part of the network, on features of one shape."""

    module: nn.Module
    cut: CutSpec
    width: int

    def run(self, features: Tensor, decoder: Sequence[Tensor]) -> Tensor:
        """Return the outputs, (B, D)."""
        if decoder:
            axis = self.cut.channel_axis + 1
            features = functional.linear(features.movedim(axis, -1), *decoder).movedim(-1, axis)
        # A tensor of its own: the network's first layer may work in place.
        outputs: Tensor = self.module(features.clone(memory_format=torch.contiguous_format))
        return outputs


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
        self._plain: Backbone | None = None
        self._threads = threads
        self._batcher = batcher
        self._device = device
        self._clock = clock
        self._max_rows = max_rows
        self._functions: OrderedDict[tuple[str, tuple[str, ...]], _Function] = OrderedDict()

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
        function = self._function(spec, space, outputs)
        features = _checked(rows, function.cut, decoder)

        def run(some: slice) -> npt.NDArray[np.float32]:
            return self._forward(function, features[some], decoder)

        parts, timings = await self._in_slices(spec, len(features), run, deadline)
        return TrunkOutputs(np.concatenate(parts), timings)

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
        function = self._function(spec, space, outputs)
        features = _checked(rows, function.cut, decoder)
        _check_gradient(gradient_BD, len(features), function.width)

        def run(some: slice) -> list[npt.NDArray[np.float32]]:
            return self._backward(function, features[some], gradient_BD[some], decoder)

        parts, timings = await self._in_slices(spec, len(features), run, deadline)
        own = None
        if decoder is not None:
            own = ChannelLinear(np.sum([one[1] for one in parts], axis=0), np.sum([one[2] for one in parts], axis=0))
        return TrunkGradients(np.concatenate([part[0] for part in parts]), own, timings)

    def _function(self, spec: BackboneSpec, space: FeatureSpace, outputs: Sequence[str]) -> _Function:
        """Check a space and outputs, and return what is to be computed."""
        if space.is_input or space.is_own or not space.backbone:
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                "only features at a cut behind 'input' have a gradient here, in the space of the cut itself: not "
                "images, local features or codes of a bottleneck",
            )
        cut, _ = check_space(space, spec, self._placed.check_cut)
        names = tuple(outputs) or DEFAULT_OUTPUTS
        key = (cut.name, names)
        if key not in self._functions:
            self._functions[key] = self._make(spec, cut, names, self._in_plain_layout())
            while len(self._functions) > CAPACITY:
                self._functions.popitem(last=False)
        self._functions.move_to_end(key)
        # The part fits every input size; the shape of a row does not.
        return dataclasses.replace(self._functions[key], cut=cut)

    def _in_plain_layout(self) -> Backbone:
        """Return the backbone with weights laid out as PyTorch does by default; other weights than those are shared.

        Convolutions on other layouts round differently, so a ReLU near 0 may open that is closed in a loop without a
        wire: enough to change a gradient in its third digit.
        """
        if self._plain is None:
            whole = self._placed.modules()
            shared = [one for part in whole for one in (*part.parameters(), *part.buffers()) if one.ndim != 4]
            self._plain = copy.deepcopy(self._placed, {id(one): one for one in shared})
            for part in self._plain.modules():
                part.to(memory_format=torch.contiguous_format)
        return self._plain

    def _make(self, spec: BackboneSpec, cut: CutSpec, names: tuple[str, ...], backbone: Backbone) -> _Function:
        if names == (LOGITS,):
            module = backbone.rest(cut.name)
            with torch.no_grad():
                zeros = torch.zeros((1, *cut.feature_shape), device=self._device)
                width = int(module(zeros).shape[1])
            return _Function(module, cut, width)
        if LOGITS in names or any(map_tap(name) is not None for name in names):
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                f"outputs are slices of the embedding, or {LOGITS!r} alone; got {', '.join(names)[:200]}",
            )
        slices = select_slices(names, spec, cut)
        return _Function(backbone.reader(cut.name, names), cut, slices[-1].stop)

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

    def _forward(
        self, function: _Function, features: npt.NDArray[np.float32], decoder: ChannelLinear | None
    ) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            return _guarded(len(features), lambda: self._run(function, features, self._decoder(decoder)).cpu().numpy())

    def _backward(
        self,
        function: _Function,
        features: npt.NDArray[np.float32],
        gradient_BD: npt.NDArray[np.generic],
        decoder: ChannelLinear | None,
    ) -> list[npt.NDArray[np.float32]]:
        def run() -> list[npt.NDArray[np.float32]]:
            layer = [one.requires_grad_() for one in self._decoder(decoder)]
            leaf = _tensor(features, self._device).requires_grad_()
            outputs_BD = function.run(leaf, layer).float()
            gradients = torch.autograd.grad(outputs_BD, [leaf, *layer], _tensor(gradient_BD, self._device).float())
            return [one.cpu().contiguous().numpy() for one in gradients]

        return _guarded(len(features), run)

    def _run(self, function: _Function, features: npt.NDArray[np.float32], decoder: Sequence[Tensor]) -> Tensor:
        return function.run(_tensor(features, self._device), decoder).float()

    def _decoder(self, decoder: ChannelLinear | None) -> list[Tensor]:
        return [] if decoder is None else [_tensor(one, self._device) for one in (decoder.weight, decoder.bias)]


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
    finite_B = np.isfinite(gradient_BD).all(axis=1)
    if not finite_B.all():
        raise WireError(
            ErrorCode.NOT_FINITE,
            f"the gradient of row {int(finite_B.argmin())} holds NaN or infinity; lower the learning rate, clip, or "
            "leave this batch out",
        )


def _tensor(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Return a tensor of its own on a device: what a message holds cannot be written to."""
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy(order="C")
    return torch.from_numpy(array).to(device)


def _guarded(num_rows: int, run: Callable[[], Any]) -> Any:
    exact: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if torch.cuda.is_available():
        # Not in TF32, which keeps ten bits, and the same numbers every time.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    try:
        with exact:
            return run()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise WireError(
            ErrorCode.WORKER_OOM,
            f"{num_rows} rows with what their gradient needs do not fit this worker's memory; send fewer rows at once "
            "or use a smaller input size",
        ) from error
