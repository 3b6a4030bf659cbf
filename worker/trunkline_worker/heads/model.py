"""Head modules: the trained task layers on what a row's inputs give, standardisation included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import (
    CLASSIFICATION,
    CONCAT,
    CONV,
    DEFAULT_FUSE_WIDTH,
    MULTI_LABEL,
    ORDINAL,
    PROTOTYPE,
    REGRESSION,
    TAIL,
    TASKS,
    HeadConfig,
    invalid,
)

from trunkline_worker.heads.inputs import HeadInput, TailModule, check_names
from trunkline_worker.heads.layers import (
    Convolutions,
    Fusion,
    activate,
    batch_norm,
    draw_,
    drop,
    linear,
    zero_,
)

# Shape suffix legend: B = rows, D = columns of all inputs side by side, S = statistics, H = one layer's width,
# K = outputs


class Head(nn.Module):
    """Standardise, fuse the inputs, then hidden layers and the output layer. See ``HeadConfig``.

    ``mean`` and ``scale`` are buffers, fitted on the training split by whoever trains the head: one number for each
    column, of a map one for each channel. Parameters start at zero; ``reset_parameters`` draws them. Training mode
    matters to batch normalisation alone.

    Args:
        config: What the head is made of.
        inputs: What enters, in order. Only the first can be a map.
        num_outputs: K.
        device: Where the tensors lie. ``meta``: nowhere yet.
        tail: The backbone's last blocks, where the head is one of kind ``tail``: from the map that is its only input to
            the columns of ``config.slices``. Theirs are then the statistics.

    Raises:
        WireError: INVALID_ARGUMENT if config and inputs do not fit each other.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        config: HeadConfig,
        inputs: Sequence[HeadInput],
        num_outputs: int,
        *,
        device: torch.device | str = "cpu",
        tail: nn.Module | None = None,
    ) -> None:
        """Build the layers."""
        super().__init__()
        _check_inputs(config, inputs, tail)
        self.config = config
        self.inputs = tuple(inputs)
        num_statistics = sum(_tail_widths(tail) if tail is not None else (one.num_statistics for one in inputs))
        self.register_buffer("mean", torch.zeros(num_statistics, device=device))
        self.register_buffer("scale", torch.ones(num_statistics, device=device))
        widths = [one.num_columns for one in inputs] if tail is None else [num_statistics]
        self.convolutions: Convolutions | None = None
        if config.kind == CONV:
            self.convolutions = Convolutions(config, inputs[0].map_shape[0], device)
            widths[0] = config.channels[-1]
        self.fusion: Fusion | None = None
        if is_fused(config, inputs):
            width = config.fuse_width or min(DEFAULT_FUSE_WIDTH, max(widths))
            self.fusion = Fusion(config, widths, width, device)
            widths = [width]
        layers = pairwise((sum(widths), *config.hidden, num_outputs))
        self.layers = nn.ModuleList(linear(before, behind, device) for before, behind in layers)
        self.norms = nn.ModuleList(
            batch_norm(nn.BatchNorm1d, width, device) for width in (config.hidden if config.batch_norm else ())
        )
        zero_(self)
        # Behind it: what was trained before is not to be set to zero.
        self.tail = tail

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the weights: He's uniform for hidden layers and convolutions, variance-preserving for projections.

        The output layer and the gate are zero: outputs start unbiased, inputs with equal weights.
        """
        zero_(self)
        if self.convolutions is not None:
            for conv in self.convolutions.convs:
                draw_(conv, math.sqrt(2.0), generator)  # type: ignore[arg-type]
        if self.fusion is not None:
            for projection in self.fusion.projections:
                draw_(projection, 1.0, generator)  # type: ignore[arg-type]
        for layer in self.linears[:-1]:
            draw_(layer, math.sqrt(2.0), generator)

    @property
    def num_features(self) -> int:
        """Columns that go in."""
        return sum(one.num_columns for one in self.inputs)

    @property
    def linears(self) -> list[nn.Linear]:
        """The linear layers behind the fusion, or the tail; the output layer last."""
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    @property
    def output(self) -> nn.Linear:
        """The output layer."""
        return self.linears[-1]

    @property
    def penalised(self) -> list[Tensor]:
        """The weights that an L2 penalty covers: all but biases and those of normalisations."""
        return [one.weight for one in self.modules() if isinstance(one, nn.Linear | nn.Conv2d)]

    def standardise(self, x_BD: Tensor) -> Tensor:
        """Shift and scale each column, of a map each channel; of a tail the columns that it makes."""
        if self.tail is not None:
            x_BD = self.tail(x_BD)
        return (x_BD - self._columns(self.mean)) / self._columns(self.scale)

    def _columns(self, statistics_S: Tensor) -> Tensor:
        """Return one number for each column."""
        shape = self.inputs[0].map_shape
        if not shape or self.tail is not None:
            return statistics_S
        channels, *places = shape
        return torch.cat([statistics_S[:channels].repeat_interleave(math.prod(places)), statistics_S[channels:]])

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return logits or values, (B, K), from raw columns."""
        return self.forward_standardised(self.standardise(x_BD))

    def forward_standardised(self, x_BD: Tensor, dropout_generator: torch.Generator | None = None) -> Tensor:
        """Return logits or values, (B, K), from standardised columns.

        Args:
            x_BD: What ``standardise`` returned.
            dropout_generator: Where the units to leave out are drawn from; none means that none is left out.
        """
        x_BH = self._fused(x_BD, dropout_generator)
        *hidden, output = self.linears
        for index, layer in enumerate(hidden):
            x_BH = layer(x_BH)
            if len(self.norms):
                x_BH = self.norms[index](x_BH)
            x_BH = drop(activate(x_BH, self.config.activation), self.config.dropout, dropout_generator)
        logits: Tensor = output(x_BH)
        return logits

    def _fused(self, x_BD: Tensor, dropout_generator: torch.Generator | None) -> Tensor:
        if self.config.kind == PROTOTYPE:
            return functional.normalize(x_BD, dim=1)
        if self.convolutions is None and self.fusion is None:
            return x_BD
        vectors = list(x_BD.split([one.num_columns for one in self.inputs], dim=1))
        if self.convolutions is not None:
            pooled = self.convolutions(vectors[0].unflatten(1, self.inputs[0].map_shape))
            vectors[0] = drop(pooled, self.config.dropout, dropout_generator)
        return torch.cat(vectors, dim=1) if self.fusion is None else self.fusion(vectors)


def is_fused(config: HeadConfig, inputs: Sequence[object]) -> bool:
    """Whether layers stand between the inputs and what comes behind: there are several, not just side by side."""
    return config.fuse != CONCAT and len(inputs) > 1


def _tail_widths(tail: nn.Module) -> Sequence[int]:
    return cast(TailModule, tail).widths


def _check_inputs(config: HeadConfig, inputs: Sequence[HeadInput], tail: nn.Module | None) -> None:
    if not inputs:
        raise invalid("a head needs at least one input")
    first, *others = inputs
    if (config.kind == TAIL) != (tail is not None):
        raise invalid("the blocks of a backbone make a head of kind 'tail', and no other")
    if tail is not None:
        if others or not first.map_shape or len(_tail_widths(tail)) != len(config.slices):
            raise invalid("a tail reads one map, and nothing beside it, and makes the slices that it names")
        return
    if config.kind == CONV and not first.map_shape:
        raise invalid("a convolutional head reads a map; name a tap whose features have places")
    if config.kind != CONV and first.map_shape:
        raise invalid(f"a map is for convolutional heads; this one is of kind {config.kind!r}")
    if any(one.map_shape for one in others):
        raise invalid("only the first input of a head can be a map")


@dataclass(frozen=True)
class TrainedHead:
    """A head with what its outputs mean: what a model is made of.

    Attributes:
        head: The module.
        task: One of ``heads.TASKS``.
        class_names: In the order of the output's columns; empty for regression.

    Raises:
        WireError: INVALID_ARGUMENT if the parts contradict each other.
    """

    head: Head
    task: str
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that the parts fit each other."""
        if self.task not in TASKS:
            raise invalid(f"task {str(self.task)[:40]!r} is not known; one of {', '.join(TASKS)} is needed")
        check_names(self.class_names, "class")
        if self.task == REGRESSION:
            if self.class_names:
                raise invalid("a regression head has no class names")
            return
        least = {CLASSIFICATION: 2, ORDINAL: 3}.get(self.task, 1)
        if len(self.class_names) < least or len(self.class_names) != self.num_outputs:
            raise invalid(f"{len(self.class_names)} class names do not fit {self.num_outputs} outputs")

    @property
    def config(self) -> HeadConfig:
        """What the head is made of."""
        return self.head.config

    @property
    def inputs(self) -> tuple[HeadInput, ...]:
        """What goes in."""
        return self.head.inputs

    @property
    def slices(self) -> tuple[str, ...]:
        """Names of the first input's slices."""
        return self.inputs[0].slices

    @property
    def more_width(self) -> int:
        """Columns of the inputs behind the first."""
        return sum(one.num_columns for one in self.inputs[1:])

    @property
    def num_features(self) -> int:
        """Columns that go in."""
        return self.head.num_features

    @property
    def num_outputs(self) -> int:
        """Columns of the answer: classes in order are one more than the thresholds between them."""
        return self.head.output.out_features + (self.task == ORDINAL)

    @property
    def size_bytes(self) -> int:
        """Memory that the tensors take."""
        return sum(one.numel() * one.element_size() for one in self.head.state_dict().values())

    def to(self, device: torch.device | str) -> TrainedHead:
        """Move the tensors to a device, in place, and return the head."""
        self.head.to(device)
        return self

    @torch.inference_mode()
    def predict(self, x_BD: Tensor) -> Tensor:
        """Return class probabilities, or values.

        Args:
            x_BD: The columns of all inputs, side by side, raw. Any floating-point type, any device.

        Shape:
            x_BD: (B, D); returns (B, K), float32, on the head's device.

        Raises:
            WireError: SHAPE_MISMATCH.
        """
        check_columns(self.inputs, x_BD)
        return answers(self.head(x_BD.to(self.head.mean)), self.task)


def check_columns(inputs: Sequence[HeadInput], x_BD: Tensor) -> None:
    """Check that rows have the columns of a head's inputs.

    Raises:
        WireError: SHAPE_MISMATCH.
    """
    width = sum(one.num_columns for one in inputs)
    if x_BD.ndim != 2 or x_BD.shape[1] != width:
        names = ", ".join(name for one in inputs for name in one.slices)
        raise WireError(
            ErrorCode.SHAPE_MISMATCH, f"the head takes (rows, {width}), slices {names}; got {tuple(x_BD.shape)}"
        )


def class_probabilities(outputs: Tensor) -> Tensor:
    """Return the probabilities of classes in order, (..., T + 1), from the log-odds of lying above each threshold."""
    above = outputs.sigmoid()
    one = torch.ones_like(above[..., :1])
    # Thresholds that cross, by rounding, would give a class less than nothing.
    return (torch.cat([one, above], dim=-1) - torch.cat([above, torch.zeros_like(one)], dim=-1)).clamp(min=0.0)


def answers(outputs: Tensor, task: str) -> Tensor:
    """Return what a head's outputs, (..., K), mean: probabilities, or the values themselves."""
    if task == CLASSIFICATION:
        return outputs.softmax(dim=-1)
    if task == ORDINAL:
        return class_probabilities(outputs)
    return outputs.sigmoid() if task == MULTI_LABEL else outputs
