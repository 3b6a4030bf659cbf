"""Pooling of one tap against torch's own, for every parity of the sides."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from trunkline_worker.backbones.embedding import LastPool, TapPool, grid_means, slices_of


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("height", [1, 2, 3, 7, 8])
def test_a_tap_is_mean_spread_and_grid(height: int, width: int) -> None:
    x_BCHW = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height * 9 + width))
    grid = functional.adaptive_avg_pool2d(x_BCHW, 2).flatten(1)
    torch.testing.assert_close(grid_means(x_BCHW), grid)
    expected = torch.cat([x_BCHW.mean((2, 3)), x_BCHW.flatten(2).std(2, correction=0), grid], dim=1)
    torch.testing.assert_close(TapPool()(x_BCHW), expected)


def test_columns_are_float32_whatever_comes_in() -> None:
    x_BCHW = torch.ones(1, 2, 4, 4, dtype=torch.bfloat16)
    assert TapPool()(x_BCHW).dtype == torch.float32
    assert LastPool()(x_BCHW).shape == (1, 2)
    assert LastPool()(torch.ones(1, 5, dtype=torch.float16)).dtype == torch.float32


def test_slices_lie_side_by_side_by_depth() -> None:
    slices = slices_of([("a", 2), ("b", 3)], 7)
    assert [(one.name, one.start, one.stop) for one in slices] == [
        ("a.mean", 0, 2),
        ("a.std", 2, 4),
        ("a.grid", 4, 12),
        ("b.mean", 12, 15),
        ("b.std", 15, 18),
        ("b.grid", 18, 30),
        ("pooled", 30, 37),
    ]
