"""Where networks of every shape can be cut, what the cuts are called, and what is said where they cannot."""

from __future__ import annotations

import operator

import parity
import pytest
import torch
from small_backbones import Tokens
from torch import Tensor, nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import Preprocessing, map_slice
from trunkline_worker.backbones.backbone import Backbone, WeightsInfo
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.backbones.export import sample_images

SIZE = 32
PREPROCESSING = Preprocessing(SIZE, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def _backbone(network: nn.Module, **options: object) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
    return Backbone("mine", network, PREPROCESSING, WeightsInfo("made up", False), "0" * 64, **options)  # type: ignore[arg-type]


def _check(network: nn.Module, **options: object) -> Backbone:
    backbone = _backbone(network, **options)
    result = parity.compare(backbone, network.eval(), backbone.cut_names[1:], SIZE)
    assert result.error <= parity.RELATIVE_TOLERANCE
    return backbone


def _conv(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1), nn.BatchNorm2d(outside), nn.ReLU(inplace=True))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        y += x
        return torch.relu_(y)


class Small(nn.Module):
    """Stages of residual blocks, a dropout and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 8, 2)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(_conv(8, 8), Residual(8)),
                nn.Sequential(_conv(8, 12, 2), Residual(12)),
            ]
        )
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.drop(x.mean((2, 3))))


def test_points_are_named_by_module_path_and_the_outermost_module_gives_the_name() -> None:
    backbone = _check(Small())
    assert backbone.cut_names == (
        "input",
        "stem.0",
        "stem.1",
        "stem",
        "stages.0.0.0",
        "stages.0.0.1",
        "stages.0.0",
        "stages.0.1.add",
        "stages.0",
        "stages.1.0.0",
        "stages.1.0.1",
        "stages.1.0",
        "stages.1.1.add",
        "stages.1",
        "drop",
    )
    assert backbone.stage_names == ("stages.0", "stages.1")
    assert [one.name for one in backbone.describe().slices] == [
        *(f"stages.{index}.{kind}" for index in range(2) for kind in ("mean", "std", "grid")),
        "pooled",
    ]


def test_the_description_of_a_cut_says_what_lies_before_and_behind_it() -> None:
    spec = _backbone(Small()).describe()
    cut = spec.cut("stages.0")
    assert cut.feature_shape == (8, 16, 16)
    assert cut.channel_axis == 0
    assert cut.is_stage
    assert not spec.cut("stem").is_stage
    convolutions = 3 * 8 * 9 * 256 + 3 * 8 * 8 * 9 * 256
    assert cut.stem_macs == convolutions
    assert cut.stem_parameters == (3 * 8 * 9 + 8 + 16) + 2 * (8 * 8 * 9 + 8 + 16) + (8 * 8 * 9 + 8)
    assert spec.macs == convolutions + 8 * 12 * 9 * 64 + 2 * 12 * 12 * 9 * 64
    assert cut.slices == tuple(one.name for one in spec.slices)
    assert spec.cut("stages.1.0").slices == ("stages.1.mean", "stages.1.std", "stages.1.grid", "pooled")
    assert spec.cut("drop").slices == ("pooled",)
    assert spec.cuts[0].stem_macs == 0
    assert spec.cuts[0].channel_axis == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layer1.0.conv1", "2 tensors cross there, 'maxpool', 'layer1.0.conv1'. The nearest cuts: 'maxpool' before it"),
        ("layer1.0.conv1", "and 'layer1.0.add' after it"),
        ("layer2.0.downsample.0", "'layer1' before it and 'layer2.0.add' after it"),
        ("fc", "it lies behind the embedding. The nearest cuts: 'flatten' before it"),
    ],
)
def test_a_point_where_several_tensors_cross_is_refused_with_the_nearest_cuts(name: str, expected: str) -> None:
    backbone = load_backbone("resnet18", allow_untrained=True)
    for call in (backbone.check_cut, backbone.stem, backbone.trunk, backbone.rest):
        with pytest.raises(WireError) as caught:
            call(name)
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT
        assert expected in caught.value.message


def test_another_name_of_a_cut_is_refused_with_its_own() -> None:
    backbone = load_backbone("squeezenet1_1", allow_untrained=True)
    with pytest.raises(WireError, match=r"the cut at 'features' of squeezenet1_1 is called 'features\.12'"):
        backbone.check_cut("features")


def test_a_cut_that_is_not_there_is_refused_with_those_that_are() -> None:
    backbone = load_backbone("resnet18", allow_untrained=True)
    with pytest.raises(WireError, match=r"Did you mean 'layer4'.* input, relu, layer1, layer2") as caught:
        backbone.trunk("layer9")
    assert caught.value.code is ErrorCode.NOT_FOUND
    with pytest.raises(WireError, match="has no stem"):
        backbone.stem("input")


class Looks(nn.Module):
    """Decides on the values that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) > 0 else x


def test_a_network_that_cannot_be_traced_is_refused_with_the_module_that_stops_it() -> None:
    network = nn.Sequential(_conv(3, 8), Looks(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with pytest.raises(WireError) as caught:
        _backbone(network)
    assert caught.value.code is ErrorCode.UNSUPPORTED
    assert "its module '1' (Looks)" in caught.value.message
    assert "torch.fx.wrap" in caught.value.message


def test_a_module_that_is_not_looked_into_may_do_what_it_likes() -> None:
    network = nn.Sequential(_conv(3, 8), Looks(), _conv(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with pytest.raises(WireError, match="does something that depends on"):
        _backbone(network)  # its shape cannot be found out without values


class Asks(nn.Module):
    """Decides on shapes, which torch.export follows and fx cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 4:
            x = self.layer(x)
        return x.reshape(x.shape[0], 8, -1).reshape(x.shape[0], 8, x.shape[2], x.shape[3])


def test_a_network_that_decides_on_shapes_is_traced_by_export_and_bound_to_its_size() -> None:
    network = nn.Sequential(_conv(3, 8), Asks(), _conv(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    backbone = _check(network)
    assert not backbone.resizable
    assert {"0", "1", "2", "4"} <= set(backbone.cut_names)
    with torch.inference_mode():
        one, three = (backbone.trunk("1")(backbone.stem("1")(sample_images(3, SIZE)[:rows])) for rows in (1, 3))
    torch.testing.assert_close(three[:1], one)


class CarriesSizes(nn.Module):
    """Keeps the batch size, and the picture's, for later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _conv(3, 8, 2), _conv(8, 8)
        self.head = nn.Linear(8 * 256, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows, side = x.shape[0], x.shape[2]
        x = self.second(self.first(x))
        return self.head(x.reshape(rows, 8 * side * side // 4))


def test_the_batch_size_is_worked_out_anew_and_another_size_crosses() -> None:
    resizable = _backbone(CarriesSizes())
    assert "second" not in resizable.cut_names
    fixed = _check(CarriesSizes(), resizable=False)
    assert {"first", "second", "reshape"} <= set(fixed.cut_names)


def test_a_layer_that_does_nothing_at_the_beginning_leaves_the_input_its_name() -> None:
    network = nn.Sequential(nn.Dropout(), _conv(3, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    assert _check(network).cut_names[:3] == ("input", "0", "1.0")


class Shared(nn.Module):
    """Runs one layer twice, and takes an argument that nobody gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = _conv(3, 8), _conv(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        x = self.again(self.again(self.first(x)))
        x = x if mask is None else x * mask
        return self.head((x * scale).mean((2, 3)))


def test_a_layer_that_runs_twice_gives_two_cuts() -> None:
    backbone = _check(Shared())
    assert {"again", "again_1", "mul"} <= set(backbone.cut_names)


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((2, 3)), x


class Integers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).argmax(1)


@pytest.mark.parametrize("last", [Two(), Integers(), nn.Identity()])
def test_a_network_must_return_one_vector_of_numbers_a_row(last: nn.Module) -> None:
    with pytest.raises(WireError, match="must return one float tensor of shape") as caught:
        _backbone(nn.Sequential(_conv(3, 8), last))
    assert caught.value.code is ErrorCode.UNSUPPORTED


def test_a_network_of_another_input_size_is_refused() -> None:
    network = nn.Sequential(_conv(3, 8), nn.Flatten(), nn.Linear(8 * 64 * 64, 5))
    with pytest.raises(WireError, match="does not take pictures of 32 pixels") as caught:
        _backbone(network)
    assert caught.value.code is ErrorCode.UNSUPPORTED


def test_a_network_that_ends_in_features_is_pooled_at_its_output() -> None:
    network = nn.Sequential(_conv(3, 8), _conv(8, 12, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    spec = _check(network).describe()
    assert spec.cuts[-1].name == "3"
    assert (spec.slices[-1].name, spec.slices[-1].width) == ("pooled", 12)


def test_a_network_that_ends_in_a_sum_is_pooled_at_its_output() -> None:
    network = nn.Sequential(_conv(3, 8, 2), Residual(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    spec = _check(network).describe()
    assert (spec.cuts[-1].name, spec.slices[-1].width) == ("3", 8)
    assert "1" in [cut.name for cut in spec.cuts]


class Branches(nn.Module):
    """Two networks side by side, whose answers are added: nothing but the input crosses alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Sequential(_conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return operator.add(self.one(x), self.two(x))


def test_where_nothing_crosses_alone_the_output_is_the_embedding() -> None:
    spec = _check(Branches()).describe()
    assert [cut.name for cut in spec.cuts] == ["input", "add"]
    assert [(one.name, one.width) for one in spec.slices] == [("pooled", 5)]


def test_layers_of_one_shape_are_tapped_at_four_depths_without_the_class_token() -> None:
    torch.backends.mha.set_fastpath_enabled(False)  # whose numbers differ from the slow path's in the last bits
    try:
        backbone = _check(Tokens(num_layers=6))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert backbone.stage_names == ("layers.0", "layers.2", "layers.3", "layers.5")
    spec = backbone.describe()
    assert spec.cut("layers.0").feature_shape == (17, 16)
    assert spec.cut("layers.0").channel_axis == 1
    features = torch.randn(2, 17, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        embedding = backbone.trunk("layers.0")(features)
    torch.testing.assert_close(embedding[:, :16], features[:, 1:].mean(1))


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _conv(3, 8, 2), nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).permute(0, 2, 3, 1)).mean((1, 2)))


def test_channels_are_found_where_they_come_last() -> None:
    backbone = _check(ChannelsLast())
    cut = backbone.describe().cut("second")
    assert (cut.feature_shape, cut.channel_axis, cut.is_stage) == ((16, 16, 12), 2, True)
    features = torch.randn(2, 16, 16, 12, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        embedding = backbone.trunk("second")(features)
    torch.testing.assert_close(embedding[:, :12], features.mean((1, 2)))
    torch.testing.assert_close(embedding[:, 24:28], features.reshape(2, 2, 8, 2, 8, 12).mean((2, 4))[..., 0].flatten(1))


def test_the_map_of_tokens_leaves_out_those_that_stand_for_no_place() -> None:
    backbone = _backbone(Tokens(num_layers=6))
    assert backbone.describe().cut("layers.2").map_shape == (16, 4, 4)  # type: ignore[union-attr]
    with torch.inference_mode():
        tokens = backbone.stem("layers.2")(sample_images(2, SIZE))
        at_the_cut = backbone.trunk("layers.2", "layers.2.map")(tokens)
        from_before = backbone.trunk("layers.0", "layers.2.map")(backbone.stem("layers.0")(sample_images(2, SIZE)))
    torch.testing.assert_close(at_the_cut, tokens[:, 1:].transpose(1, 2).flatten(1))
    torch.testing.assert_close(from_before, at_the_cut)


def test_all_tokens_are_a_slice_of_their_own() -> None:
    backbone = _backbone(Tokens(num_layers=6))
    spec = backbone.describe()
    cut = spec.cut("layers.2")
    assert cut is not None
    assert (cut.whole_slice, cut.whole_shape) == ("layers.2.tokens", (16, 17, 1))
    assert (spec.slice_width("layers.2.tokens"), spec.slice_width("layers.2.map")) == (17 * 16, 16 * 16)
    with torch.inference_mode():
        tokens = backbone.stem("layers.2")(sample_images(2, SIZE))
        at_the_cut = backbone.trunk("layers.2", "layers.2.tokens")(tokens)
        from_before = backbone.trunk("layers.0", "layers.2.tokens")(backbone.stem("layers.0")(sample_images(2, SIZE)))
    torch.testing.assert_close(at_the_cut, tokens.transpose(1, 2).flatten(1))
    torch.testing.assert_close(from_before, at_the_cut)
    with pytest.raises(WireError, match="no places that form a map"):
        backbone.trunk("input", "input.tokens")


def test_where_all_is_in_the_map_there_are_no_tokens() -> None:
    spec = _backbone(ChannelsLast()).describe()
    cut = spec.cut("second")
    assert cut is not None
    assert (cut.whole_slice, cut.whole_shape) == ("second.map", (12, 16, 16))
    assert spec.slice_width("second.tokens") is None
    assert spec.slice_width("nowhere.tokens") is None
    assert spec.cuts[0].whole_shape == ()


def test_the_map_of_channels_last_features_has_its_channels_first() -> None:
    backbone = _backbone(ChannelsLast())
    assert backbone.describe().cut("second").map_shape == (12, 16, 16)  # type: ignore[union-attr]
    with torch.inference_mode():
        images = sample_images(2, SIZE)
        flat = backbone.trunk("input", "second.map")(images)
        features = backbone.stem("second")(images)
    torch.testing.assert_close(flat, features.permute(0, 3, 1, 2).flatten(1))


def test_the_map_at_a_convolution_is_what_leaves_it() -> None:
    backbone = _backbone(Small())
    spec = backbone.describe()
    assert spec.cuts[0].map_shape == spec.cuts[-1].map_shape == ()
    with torch.inference_mode():
        images = sample_images(3, SIZE)
        for tap in backbone.stage_names:
            features = backbone.stem(tap)(images)
            assert spec.cut(tap).map_shape == features.shape[1:]  # type: ignore[union-attr]
            flat = backbone.trunk("stem", map_slice(tap))(backbone.stem("stem")(images))
            torch.testing.assert_close(flat, features.flatten(1))


def test_a_tap_that_gives_no_map_is_refused_with_those_that_do() -> None:
    backbone = _backbone(Small())
    first, last = backbone.stage_names
    for tap, why in ((first, "lies before it"), ("stem", "lies before it"), ("input", "lies before it")):
        with pytest.raises(WireError, match=f"{why}.*are maps there: {last}$") as caught:
            backbone.trunk(last, map_slice(tap))
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    pooled = backbone.cut_names[-1]
    for tap in (pooled, "input"):
        with pytest.raises(WireError, match=f"no places that form a map.*: {first}, {last}$") as caught:
            backbone.trunk("input", map_slice(tap))
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    with pytest.raises(WireError) as caught:
        backbone.trunk("stem", "nowhere.map")
    assert caught.value.code is ErrorCode.NOT_FOUND


class Places(nn.Module):
    """Adds an encoding of places, made from the picture's size once and used in every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = _conv(3, 8, 2), _conv(8, 8), _conv(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[2] // 2
        places = torch.arange(side, dtype=torch.float32).sin().reshape(1, 1, 1, side)
        x = self.second(self.first(x) + places) + places
        return self.head(self.third(x).mean((2, 3)))


def test_what_is_made_of_sizes_alone_does_not_cross() -> None:
    backbone = _check(Places(), resizable=False)
    assert {"first", "second", "add_1", "third"} <= set(backbone.cut_names)
