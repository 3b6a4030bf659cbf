"""The parts that heads are put together from. Parameters start at zero; whoever trains a head draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from trunkline_wire.heads import GATE, GELU, HeadConfig

# Shape suffix legend: B = rows, C = channels, H = height, W = width, F = common width of fused inputs, I = inputs

Layer = TypeVar("Layer", bound=nn.Module)


def linear(inputs: int, outputs: int, device: torch.device | str) -> nn.Linear:
    """Return a layer whose numbers are still to be set."""
    # skip_init: the usual draw comes from the process-wide generator, which others may be using.
    return nn.utils.skip_init(nn.Linear, inputs, outputs, device=device)


def batch_norm(kind: type[Layer], channels: int, device: torch.device | str) -> Layer:
    """Return a batch normalisation without the counter, which is no number that predictions depend on."""
    norm = kind(channels, device=device)
    norm.num_batches_tracked = None  # type: ignore[assignment]
    return norm


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply an activation by name."""
    return functional.gelu(x) if activation == GELU else torch.relu(x)


def drop(x: Tensor, fraction: float, generator: torch.Generator | None) -> Tensor:
    """Leave out a fraction of the values and scale up the others. Without a generator nothing is left out."""
    if generator is None or fraction <= 0:
        return x
    keep = 1.0 - fraction
    drawn = torch.rand(x.shape, generator=generator, device=generator.device)
    return x * (drawn < keep).to(x) / keep


class Convolutions(nn.Module):
    """3x3 convolutions on a map, then the mean over the places.

    Shape:
        x_BCHW: (B, C, H, W); returns (B, channels of the last convolution).
    """

    def __init__(self, config: HeadConfig, channels: int, device: torch.device | str) -> None:
        """Build the layers."""
        super().__init__()
        self._activation = config.activation
        self.convs = nn.ModuleList(
            nn.utils.skip_init(nn.Conv2d, inputs, outputs, 3, padding=1, device=device)
            for inputs, outputs in pairwise((channels, *config.channels))
        )
        self.norms = nn.ModuleList(
            batch_norm(nn.BatchNorm2d, width, device) for width in (config.channels if config.batch_norm else ())
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return one vector a row."""
        for index, conv in enumerate(self.convs):
            x_BCHW = conv(x_BCHW)
            if len(self.norms):
                x_BCHW = self.norms[index](x_BCHW)
            x_BCHW = activate(x_BCHW, self._activation)
        return x_BCHW.mean(dim=(2, 3))


class Fusion(nn.Module):
    """Several vectors a row to one: each through a linear layer to a common width, then added, or weighted by a gate.

    Args:
        config: Says how.
        widths: Of the vectors.
        width: Common width, F.
        device: Where the numbers lie.
    """

    def __init__(self, config: HeadConfig, widths: Sequence[int], width: int, device: torch.device | str) -> None:
        """Build the layers."""
        super().__init__()
        self.projections = nn.ModuleList(linear(one, width, device) for one in widths)
        self.gate = linear(len(widths) * width, len(widths) * width, device) if config.fuse == GATE else None

    def forward(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return one vector of the common width a row."""
        x_BIF = torch.stack([project(one) for project, one in zip(self.projections, vectors, strict=True)], dim=1)
        if self.gate is None:
            return x_BIF.sum(dim=1)
        weights_BIF = self.gate(x_BIF.flatten(1)).view_as(x_BIF).softmax(dim=1)
        return (weights_BIF * x_BIF).sum(dim=1)


def zero_(module: nn.Module) -> None:
    """Set every parameter to zero, those of normalisations to what changes nothing."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                assert part.running_mean is not None
                assert part.running_var is not None
                for kept, value in (
                    (part.weight, 1.0),
                    (part.bias, 0.0),
                    (part.running_mean, 0.0),
                    (part.running_var, 1.0),
                ):
                    kept.fill_(value)
            elif not list(part.children()):
                for parameter in part.parameters(recurse=False):
                    parameter.zero_()


def draw_(layer: nn.Linear | nn.Conv2d, gain: float, generator: torch.Generator) -> None:
    """Draw a layer's weights evenly between bounds of ``sqrt(3) * gain / sqrt(fan in)``; biases are zero.

    Source: He et al. 2015, "Delving Deep into Rectifiers": a gain of ``sqrt(2)`` for layers before a ReLU.
    """
    assert layer.bias is not None
    bound = math.sqrt(3.0 * gain**2 / layer.weight[0].numel())
    with torch.no_grad():
        # Drawn on the CPU, so that every device starts from the same numbers.
        drawn = torch.rand(layer.weight.shape, generator=generator).mul_(2 * bound).sub_(bound)
        layer.weight.copy_(drawn)
        layer.bias.zero_()
