"""Pooling of one tap against torch's own, for every layout and every parity of the sides."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from trunkline_worker.backbones.embedding import LastPool, MapPool, Tap, TapPool, grid_means, map_shape, slices_of
from trunkline_worker.backbones.layout import channel_axis, is_picture, num_extra_tokens, resolution


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("height", [1, 2, 3, 7, 8])
def test_a_tap_is_mean_spread_and_grid(height: int, width: int) -> None:
    x_BCHW = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height * 9 + width))
    grid = functional.adaptive_avg_pool2d(x_BCHW, 2).flatten(1)
    torch.testing.assert_close(grid_means(x_BCHW), grid)
    expected = torch.cat([x_BCHW.mean((2, 3)), x_BCHW.flatten(2).std(2, correction=0), grid], dim=1)
    torch.testing.assert_close(TapPool((3, 8, 8))(x_BCHW), expected)


@pytest.mark.parametrize("extra", [0, 1, 5])
def test_places_are_found_in_every_layout(extra: int) -> None:
    x_BCHW = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(extra))
    expected = TapPool((3, 4, 4))(x_BCHW)
    torch.testing.assert_close(TapPool((4, 4, 3))(x_BCHW.permute(0, 2, 3, 1)), expected)
    tokens = torch.cat([torch.full((2, extra, 3), 9.0), x_BCHW.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(TapPool((16 + extra, 3))(tokens), expected)
    torch.testing.assert_close(LastPool((16 + extra, 3))(tokens), expected[:, :3])


@pytest.mark.parametrize("extra", [0, 1, 5])
def test_maps_of_every_layout_have_their_channels_first(extra: int) -> None:
    x_BCHW = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(extra))
    expected = x_BCHW.flatten(1)
    assert torch.equal(MapPool((3, 4, 4))(x_BCHW), expected)
    assert torch.equal(MapPool((4, 4, 3))(x_BCHW.permute(0, 2, 3, 1)), expected)
    tokens = torch.cat([torch.full((2, extra, 3), 9.0), x_BCHW.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(MapPool((16 + extra, 3))(tokens), expected)
    assert MapPool((3, 4, 4))(x_BCHW.to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("row_shape", "expected"),
    [
        ((512, 7, 7), (512, 7, 7)),
        ((14, 14, 96), (96, 14, 14)),
        ((7, 7, 7), (7, 7, 7)),
        ((196, 768), (768, 14, 14)),
        ((197, 768), (768, 14, 14)),
        ((201, 768), (768, 14, 14)),
        ((35, 768), ()),  # no square, and no square with a few more
        ((1, 768), ()),
        ((512,), ()),
        ((512, 1, 1), ()),
    ],
)
def test_the_shape_of_a_map_is_read_from_that_of_a_row(row_shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert map_shape(row_shape) == expected


def test_tokens_that_form_no_square_have_no_grid() -> None:
    x_BTC = torch.randn(2, 14, 3, generator=torch.Generator().manual_seed(0))
    pool = TapPool((34, 3))  # 25 places would leave 9 tokens over, more than any network adds
    assert pool.kinds == ("mean", "std")
    expected = torch.cat([x_BTC.mean(1), x_BTC.std(1, correction=0)], dim=1)
    torch.testing.assert_close(pool(x_BTC), expected)


@pytest.mark.parametrize(
    ("shape", "axis", "places", "picture"),
    [
        ((64, 7, 7), 0, (7, 7), True),
        ((7, 7, 64), 2, (7, 7), True),
        ((7, 7, 7), 0, (7, 7), True),
        ((64, 1, 1), 0, (1, 1), False),
        ((197, 64), 1, (196,), True),
        ((1, 64), 1, (1,), False),
        ((64,), 0, (), False),
    ],
)
def test_layouts_are_read_from_shapes(
    shape: tuple[int, ...], axis: int, places: tuple[int, ...], picture: bool
) -> None:
    assert channel_axis(shape) == axis
    assert resolution(shape) == places
    assert is_picture(shape) == picture


@pytest.mark.parametrize(("tokens", "extra"), [(196, 0), (197, 1), (198, 2), (201, 5), (1, None), (35, None)])
def test_tokens_beyond_a_square_stand_for_no_place(tokens: int, extra: int | None) -> None:
    assert num_extra_tokens(tokens) == extra


def test_columns_are_float32_whatever_comes_in() -> None:
    x_BCHW = torch.ones(1, 2, 4, 4, dtype=torch.bfloat16)
    assert TapPool((2, 4, 4))(x_BCHW).dtype == torch.float32
    assert LastPool((2, 4, 4))(x_BCHW).shape == (1, 2)
    assert LastPool((5,))(torch.ones(1, 5, dtype=torch.float16)).dtype == torch.float32
    assert LastPool((5, 1, 1))(torch.ones(1, 5, 1, 1)).shape == (1, 5)


def test_slices_lie_side_by_side_by_depth() -> None:
    taps = [Tap("a", "a", TapPool((2, 4, 4)), 2), Tap("b", "b", TapPool((35, 3)), 3)]
    assert [(one.name, one.start, one.stop) for one in slices_of(taps, 7)] == [
        ("a.mean", 0, 2),
        ("a.std", 2, 4),
        ("a.grid", 4, 12),
        ("b.mean", 12, 15),
        ("b.std", 15, 18),
        ("pooled", 18, 25),
    ]
