"""A trunk on the cluster as a module of a PyTorch model: gradients come back to the layers before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from trunkline_wire.bottleneck import ChannelLinear
from trunkline_wire.finite import is_finite
from trunkline_wire.limits import MAX_BATCH_ROWS, MAX_PAYLOAD_BYTES
from trunkline_wire.specs import INPUT_CUT, POOLED, BackboneSpec, CutSpec, FeatureSpace

from trunkline._calls.trunk import TrunkAnswer, TrunkBatch
from trunkline._deadline import Deadline
from trunkline.errors import (
    DtypeMismatchError,
    EmptyBatchError,
    IncompatibleModelError,
    InvalidArgumentError,
    NotFiniteError,
    NotFoundError,
    PayloadTooLargeError,
    ShapeMismatchError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from trunkline.client import Client

# Shape suffix legend: B = rows, C = channels, K = channels of a code, D = outputs

LOGITS = "logits"
"""Asks for the network's own outputs."""

STEP_TIMEOUT_S = 300.0
"""Deadline of one forward or backward pass where none is stated: long enough for a replica to start again."""

BATCH_BYTES = 16 * 2**20
"""What one message of features aims at. Few rows at a time cost the worker more than waiting for more of them does."""


class RemoteTrunk(nn.Module):
    """The part of a backbone behind a cut, run on the cluster, forward and backward.

    It is frozen and in evaluation mode whatever ``train`` and ``eval`` say, and computes in float32. No pass depends on
    another, so a broken connection or a dead replica costs time and changes no number.

    Attributes:
        space: Where features enter.
        feature_shape: Shape of one row of features; with a decoder, of the features that it makes.
        slices: Names of what comes out.
        num_outputs: How many numbers a row that are.
        decoder: Turns codes into features before the trunk, on the cluster. Trained along; None without one.
    """

    def __init__(
        self,
        client: Client,
        backbone: str,
        *,
        cut: str,
        input_size: int | None = None,
        outputs: str | Sequence[str] = POOLED,
        decoder: nn.Module | None = None,
        batch_rows: int | None = None,
        max_in_flight: int = 4,
        timeout_s: float | None = None,
    ) -> None:
        """Ask the cluster what is there.

        Args:
            client: Of the cluster. May be used for other things at the same time.
            backbone: Name of the backbone.
            cut: Where features enter. Not ``input``: pictures have no gradient.
            input_size: Side of the square that pictures would have, in pixels. Default: the backbone's own.
            outputs: ``pooled``, what the network's own classifier reads; ``logits``; or slices of the embedding.
            decoder: A module with parameters ``weight`` (C, K) and ``bias`` (C): a linear layer over the channels of
                each place. Rows then have K channels. Its parameters travel with every pass.
            batch_rows: Rows in one message. Default: what fits some MiB.
            max_in_flight: Messages without an answer.
            timeout_s: Deadline of one pass, repetitions included. Default: 300 s.

        Raises:
            NotFoundError: There is no such backbone, cut or slice.
            InvalidArgumentError: Something is out of range.
            ShapeMismatchError: The decoder does not fit the cut.
        """
        super().__init__()
        spec = client.describe(backbone, input_size=input_size)
        found = _cut(spec, cut)
        names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
        if (batch_rows is not None and batch_rows < 1) or max_in_flight < 1:
            raise InvalidArgumentError(f"batch_rows ({batch_rows}) and max_in_flight ({max_in_flight}) are 1 or more")
        if decoder is not None:
            _check_decoder(decoder, found)
        self.space = spec.space(found)
        self.feature_shape = found.feature_shape
        self.slices = names
        self.decoder = decoder
        self._remote = _Remote(client, self.space, names, batch_rows, max_in_flight, timeout_s)
        self._channel_axis = found.channel_axis
        # What a compiler cannot look into: it leaves a gap in its graph.
        self._run = torch.compiler.disable(_run)
        self.num_outputs = self._width(spec, found)

    def forward(self, features: Tensor) -> Tensor:
        """Return the outputs. May be used from several threads.

        Args:
            features: Floats; others than float32 are widened, and get a gradient of their own type.

        Shape:
            features: (B, *feature_shape), with a decoder with K channels. Returns (B, num_outputs), float32, on the
            features' device.

        Raises:
            EmptyBatchError, DtypeMismatchError, ShapeMismatchError, PayloadTooLargeError: Before anything is sent.
            NotFiniteError: A row holds NaN or infinity; out of ``backward``: its gradient does.
            IncompatibleModelError: The backbone was replaced.
            ServiceUnavailableError, DeadlineExceededError: The cluster stays away.
        """
        self._check(features)
        weight, bias = (None, None) if self.decoder is None else (self.decoder.weight, self.decoder.bias)
        outputs: Tensor = self._run(self._remote, features, weight, bias)
        return outputs

    def extra_repr(self) -> str:
        """Return what a printed module shows."""
        space = self.space
        return f"{space.backbone!r}, cut={space.cut!r}, input_size={space.input_size}, outputs={', '.join(self.slices)}"

    def _width(self, spec: BackboneSpec, cut: CutSpec) -> int:
        if self.slices == (LOGITS,):
            # Only the network itself knows how many it has: one row of zeros is asked.
            zeros = np.zeros((1, *cut.feature_shape), np.float32)
            return int(self._remote.forward(zeros, None).shape[1])
        widths = {one.name: one.width for one in spec.slices}
        missing = [name for name in self.slices if name not in cut.slices]
        if missing or not self.slices:
            raise NotFoundError(
                f"{spec.name} has no output {missing[0] if missing else ''!r} behind {cut.name!r}",
                hint=f"There are {LOGITS} (alone), {', '.join(cut.slices)}",
            )
        if len(set(self.slices)) != len(self.slices):
            raise InvalidArgumentError(f"an output is named twice: {', '.join(self.slices)}")
        return sum(widths[name] for name in self.slices)

    def _check(self, features: Tensor) -> None:
        shape = list(self.feature_shape)
        if self.decoder is not None:
            weight: Tensor = self.decoder.weight  # type: ignore[assignment]  # checked when it was made
            shape[self._channel_axis] = weight.shape[1]
        if not features.is_floating_point():
            raise DtypeMismatchError(f"features are floats; got {features.dtype}", hint="Use features.float()")
        if tuple(features.shape[1:]) != tuple(shape):
            raise ShapeMismatchError(
                f"a row of features is {tuple(shape)}; got {tuple(features.shape[1:])}",
                hint=f"That is what {self.space.backbone} has at {self.space.cut} and {self.space.input_size} pixels",
            )
        if features.shape[0] == 0:
            raise EmptyBatchError("there are no features", hint="Give at least one row")


class _Remote:
    """What a module knows of the cluster. Copies of the module share it; it does not go to another process."""

    def __init__(
        self,
        client: Client,
        space: FeatureSpace,
        outputs: tuple[str, ...],
        batch_rows: int | None,
        max_in_flight: int,
        timeout_s: float | None,
    ) -> None:
        self._client = client
        self._space = space
        self._outputs = outputs
        self._batch_rows = batch_rows
        self._max_in_flight = max_in_flight
        self._timeout_s = STEP_TIMEOUT_S if timeout_s is None else timeout_s

    def __deepcopy__(self, memo: dict[int, Any]) -> _Remote:
        return self

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "a RemoteTrunk holds a connection, which cannot be saved or sent to another process",
            hint="Keep state_dict() instead of the module; in another process connect and build it there",
        )

    def forward(self, features: npt.NDArray[np.float32], decoder: ChannelLinear | None) -> npt.NDArray[np.float32]:
        _check_finite(features, "features")
        batches = [TrunkBatch(some.start, features[some]) for some in self._pieces(features)]
        return np.concatenate([one.values for one in self._run(batches, decoder)])

    def backward(
        self,
        features: npt.NDArray[np.float32],
        gradient_BD: npt.NDArray[np.float32],
        decoder: ChannelLinear | None,
    ) -> tuple[npt.NDArray[np.float32], ChannelLinear | None]:
        _check_finite(gradient_BD, "gradient")
        batches = [TrunkBatch(some.start, features[some], gradient_BD[some]) for some in self._pieces(features)]
        answers = self._run(batches, decoder)
        gradient = np.concatenate([one.values for one in answers])
        own = [one.decoder for one in answers if one.decoder is not None]
        if not own:
            return gradient, None
        return gradient, ChannelLinear(
            np.sum([one.weight for one in own], axis=0), np.sum([one.bias for one in own], axis=0)
        )

    def _run(self, batches: Sequence[TrunkBatch], decoder: ChannelLinear | None) -> list[TrunkAnswer]:
        try:
            return self._client._calls.trunk.run(
                self._space,
                batches,
                self._outputs,
                decoder,
                window=self._max_in_flight,
                deadline=Deadline(self._timeout_s),
            )
        except IncompatibleModelError as error:
            raise IncompatibleModelError(
                error.message,
                hint=f"{self._space.backbone} was replaced; make a new RemoteTrunk, and expect other features",
                request_id=error.request_id,
            ) from None

    def _pieces(self, features: npt.NDArray[np.float32]) -> list[slice]:
        """Cut rows into messages. Only their shape decides, so that a step can be repeated to the bit."""
        row_bytes = features[0].nbytes
        if row_bytes > MAX_PAYLOAD_BYTES:
            raise PayloadTooLargeError(
                f"one row of features has {row_bytes} bytes; at most {MAX_PAYLOAD_BYTES} fit a message",
                hint="Choose a later cut, or a smaller input_size",
            )
        fits = min(MAX_BATCH_ROWS, MAX_PAYLOAD_BYTES // row_bytes)
        size = min(self._batch_rows or max(1, BATCH_BYTES // row_bytes), fits)
        return [slice(first, first + size) for first in range(0, len(features), size)]


class _Through(torch.autograd.Function):
    """Features to outputs over the wire, and the gradient back."""

    @staticmethod
    def forward(ctx: Any, remote: _Remote, features: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.remote = remote
        ctx.save_for_backward(features, weight, bias)
        outputs = remote.forward(_numpy(features), _decoder(weight, bias))
        return torch.from_numpy(outputs).to(features.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BD: Tensor) -> tuple[None, Tensor | None, Tensor | None, Tensor | None]:
        features, weight, bias = ctx.saved_tensors
        gradient, own = ctx.remote.backward(_numpy(features), _numpy(gradient_BD), _decoder(weight, bias))
        found = torch.from_numpy(gradient).to(features.device)
        if own is None:
            return None, found, None, None
        return None, found, torch.from_numpy(own.weight).to(weight), torch.from_numpy(own.bias).to(bias)


def _run(remote: _Remote, features: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    # Under autocast too: what crosses the wire is float32, whatever the layers around compute in.
    with torch.autocast(features.device.type, enabled=False):
        outputs: Tensor = _Through.apply(remote, features.float(), weight, bias)
    return outputs


def _decoder(weight: Tensor | None, bias: Tensor | None) -> ChannelLinear | None:
    if weight is None or bias is None:
        return None
    layer = ChannelLinear(_numpy(weight), _numpy(bias))
    if not (is_finite(layer.weight) and is_finite(layer.bias)):
        raise NotFiniteError(
            "the decoder's weight or bias holds NaN or infinity",
            hint="Go back to a state dict from before, and lower the learning rate or clip",
        )
    return layer


def _numpy(tensor: Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return array


def _check_finite(rows: npt.NDArray[np.float32], what: str) -> None:
    if not is_finite(rows):
        row = int(np.isfinite(rows.reshape(len(rows), -1)).all(axis=1).argmin())
        raise NotFiniteError(
            f"the {what} of row {row} hold{'s' if what == 'gradient' else ''} NaN or infinity",
            hint="Skip this batch, lower the learning rate, or clip; no weight has changed in this step",
        )


def _cut(spec: BackboneSpec, name: str) -> CutSpec:
    if name == INPUT_CUT:
        raise InvalidArgumentError(
            "the cut 'input' takes pictures, which have no gradient", hint="Choose a cut behind it: client.describe()"
        )
    found = spec.cut(name)
    if found is None:
        raise NotFoundError(
            f"{spec.name} has no cut {name!r}",
            hint="Where its stages end: " + ", ".join(one.name for one in spec.cuts if one.is_stage),
        )
    return found


def _check_decoder(decoder: nn.Module, cut: CutSpec) -> None:
    weight, bias = getattr(decoder, "weight", None), getattr(decoder, "bias", None)
    channels = cut.feature_shape[cut.channel_axis]
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
        raise InvalidArgumentError(
            f"decoder is {type(decoder).__name__}; a module with parameters weight and bias is needed",
            hint=f"torch.nn.Linear(code_channels, {channels}) is one",
        )
    if weight.ndim != 2 or weight.shape[0] != channels or bias.shape != (channels,):
        raise ShapeMismatchError(
            f"the decoder's weight is {tuple(weight.shape)} and its bias {tuple(bias.shape)}; ({channels}, code "
            f"channels) and ({channels},) are needed at {cut.name!r}"
        )
