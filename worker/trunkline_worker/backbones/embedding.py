"""How a feature map becomes columns of the embedding.

Written with slicing and means only, so that every exporter and runtime understands it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from trunkline_wire.specs import SliceSpec

# Shape suffix legend: B = rows, C = channels, H = height, W = width, D = embedding columns

POOLED = "pooled"
"""The slice of the last layer: what enters the network's own classifier."""

TAP_KINDS = ("mean", "std", "grid")
"""The slices of one tap, in order: per channel the mean, the standard deviation, the means of a 2 x 2 grid."""

GRID = 2
"""Cells along one side of the grid."""


class TapPool(nn.Module):
    """Pools one tap: ``mean``, ``std`` and ``grid`` side by side, in float32 whatever the input.

    Shape:
        x_BCHW: (B, C, H, W); returns (B, 6 C).
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the columns of the three slices."""
        x_BCHW = x_BCHW.float()
        mean_BC = x_BCHW.mean((2, 3))
        std_BC = (x_BCHW - mean_BC[:, :, None, None]).square().mean((2, 3)).sqrt()
        return torch.cat([mean_BC, std_BC, grid_means(x_BCHW)], dim=1)


def grid_means(x_BCHW: Tensor) -> Tensor:
    """Average over the cells of a grid: what ``adaptive_avg_pool2d(x, 2).flatten(1)`` gives.

    Cells overlap where a side is odd, and are equal where it is 1.

    Shape:
        x_BCHW: (B, C, H, W); returns (B, 4 C), the four cells of a channel side by side.
    """
    height, width = x_BCHW.shape[2:]
    cells: list[Tensor] = []
    for top, bottom in _spans(height):
        strip_BCW = x_BCHW[:, :, top:bottom].mean(2)
        cells.extend(strip_BCW[:, :, left:right].mean(2) for left, right in _spans(width))
    return torch.stack(cells, dim=2).flatten(1)


def _spans(size: int) -> list[tuple[int, int]]:
    return [(i * size // GRID, -(-(i + 1) * size // GRID)) for i in range(GRID)]


class LastPool(nn.Module):
    """Pools the last feature: as it is where it is flat, else the mean over the picture.

    Shape:
        x: (B, D) or (B, C, H, W); returns (B, D) or (B, C), float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the columns of ``pooled``."""
        x = x.float()
        return x.mean((2, 3)) if x.ndim == 4 else x.flatten(1)


def slices_of(tap_channels: Sequence[tuple[str, int]], pooled_width: int) -> tuple[SliceSpec, ...]:
    """Lay out the embedding.

    Args:
        tap_channels: Name and number of channels of every tap, by depth.
        pooled_width: Columns of ``pooled``, which comes last.
    """
    slices: list[SliceSpec] = []
    start = 0
    for tap, channels in tap_channels:
        for kind in TAP_KINDS:
            stop = start + channels * (GRID**2 if kind == "grid" else 1)
            slices.append(SliceSpec(f"{tap}.{kind}", start, stop))
            start = stop
    slices.append(SliceSpec(POOLED, start, start + pooled_width))
    return tuple(slices)
