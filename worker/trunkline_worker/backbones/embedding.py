"""How the features at a tap become columns of the embedding.

Written with slicing and means only, so that every exporter and runtime understands it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from trunkline_wire.specs import POOLED, SliceSpec

from trunkline_worker.backbones.layout import channel_axis, is_picture, num_extra_tokens

# Shape suffix legend: B = rows, C = channels, H = height, W = width, T = tokens, P = places, D = embedding columns

GRID = 2
"""Cells along one side of the grid."""


class Places(nn.Module):
    """Brings features of any layout to (B, C, H, W), or (B, C, P) where their places are no square.

    Shape:
        x: (B, C, H, W), (B, H, W, C) or (B, T, C). Tokens that stand for no place are left out.
    """

    def __init__(self, row_shape: Sequence[int]) -> None:
        """Read the layout from the shape of one row."""
        super().__init__()
        self.axis = channel_axis(row_shape)
        self.rank = len(row_shape)
        self.extra = num_extra_tokens(row_shape[0]) if self.rank == 2 else 0

    @property
    def has_grid(self) -> bool:
        """Whether the places form a square or a map."""
        return self.extra is not None

    def forward(self, x: Tensor) -> Tensor:
        """Return the features by channel."""
        if self.rank == 3:
            return x if self.axis == 0 else x.permute(0, 3, 1, 2)
        if self.extra is None:
            return x.permute(0, 2, 1)
        x = x[:, self.extra :]
        side = round(x.shape[1] ** 0.5)
        return x.permute(0, 2, 1).reshape(x.shape[0], x.shape[2], side, side)


class TapPool(nn.Module):
    """Pools one tap: per channel the mean, the standard deviation and the means of a 2 x 2 grid, side by side.

    In float32, whatever the input. No grid where the places do not form a map.

    Shape:
        x: One row as ``row_shape``; returns (B, 6 C), or (B, 2 C) without a grid.
    """

    def __init__(self, row_shape: Sequence[int]) -> None:
        """Read the layout from the shape of one row."""
        super().__init__()
        self.places = Places(row_shape)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The slices that it makes, in order."""
        return ("mean", "std", "grid") if self.places.has_grid else ("mean", "std")

    def forward(self, x: Tensor) -> Tensor:
        """Return the columns of the slices."""
        x = self.places(x.float())
        x_BCP = x.flatten(2)
        mean_BC = x_BCP.mean(2)
        columns = [mean_BC, _root((x_BCP - mean_BC[:, :, None]).square().mean(2))]
        if self.places.has_grid:
            columns.append(grid_means(x))
        return torch.cat(columns, dim=1)


def _root(x: Tensor) -> Tensor:
    """Return the square root, with a gradient of 0 at 0, where the derivative is infinite and would make NaN."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


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


def map_shape(row_shape: Sequence[int]) -> tuple[int, ...]:
    """Return channels, height and width of features as a map; empty where their places form none."""
    if not is_picture(row_shape):
        return ()
    axis = channel_axis(row_shape)
    if len(row_shape) == 3:
        places = [size for index, size in enumerate(row_shape) if index != axis]
        return (row_shape[axis], *places)
    extra = num_extra_tokens(row_shape[0])
    if extra is None:
        return ()
    side = round((row_shape[0] - extra) ** 0.5)
    return (row_shape[1], side, side)


class MapPool(nn.Module):
    """Pools nothing: the features as a map, flat.

    Shape:
        x: One row as ``row_shape``, which has a ``map_shape``; returns (B, C * H * W), float32.
    """

    def __init__(self, row_shape: Sequence[int]) -> None:
        """Read the layout from the shape of one row."""
        super().__init__()
        self.places = Places(row_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return the columns."""
        return self.places(x.float()).flatten(1)


class TokensPool(nn.Module):
    """Pools nothing, and leaves nothing out: all tokens, flat, channel by channel.

    Shape:
        x_BTC: (B, T, C); returns (B, C * T), float32.
    """

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return the columns."""
        return x_BTC.float().transpose(1, 2).flatten(1)


class LastPool(nn.Module):
    """Pools the last features: as they are where a row is one vector, else the mean over its places.

    Shape:
        x: One row as ``row_shape``; returns (B, D) or (B, C), float32.
    """

    def __init__(self, row_shape: Sequence[int]) -> None:
        """Read the layout from the shape of one row."""
        super().__init__()
        self.places = Places(row_shape) if is_picture(row_shape) else None
        self.width = row_shape[channel_axis(row_shape)] if self.places else int(torch.Size(row_shape).numel())

    def forward(self, x: Tensor) -> Tensor:
        """Return the columns of ``pooled``."""
        x = x.float()
        return x.flatten(1) if self.places is None else self.places(x).flatten(2).mean(2)


class Select(nn.Module):
    """Takes ranges of columns, side by side.

    Shape:
        x_BD: (B, D); returns (B, columns of the ranges).
    """

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Keep the ranges, from the first column to the one behind the last."""
        super().__init__()
        self.ranges = tuple(ranges)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return the columns."""
        parts = [x_BD[:, start:stop] for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Tap:
    """A tap and how it is pooled.

    Attributes:
        name: Of the cut there.
        node: Of the graph.
        pool: Makes the columns.
        channels: Of the features.
    """

    name: str
    node: str
    pool: TapPool
    channels: int


def slices_of(taps: Sequence[Tap], pooled_width: int) -> tuple[SliceSpec, ...]:
    """Lay out the embedding: the taps by depth, then ``pooled``."""
    slices: list[SliceSpec] = []
    start = 0
    for tap in taps:
        for kind in tap.pool.kinds:
            stop = start + tap.channels * (GRID**2 if kind == "grid" else 1)
            slices.append(SliceSpec(f"{tap.name}.{kind}", start, stop))
            start = stop
    slices.append(SliceSpec(POOLED, start, start + pooled_width))
    return tuple(slices)
