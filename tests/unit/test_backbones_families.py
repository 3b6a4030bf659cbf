"""Every torchvision classification network: described, cut, run, and its input sizes stated truthfully.

One of each family is compared with the uncut network at every cut as well; `test_backbones_parity.py` has the others.
"""

from __future__ import annotations

import logging

import parity
import pytest
import torch
import torchvision
from torch import nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import INPUT_CUT, Preprocessing
from trunkline_worker.backbones.backbone import Backbone, WeightsInfo, sha256_of
from trunkline_worker.backbones.catalogue import available_backbones, load_backbone
from trunkline_worker.backbones.export import sample_images

# One of each family: how wide `pooled` is, and the least number of cuts there must be. The rest of their families are
# under the marker `slow`.
ONE_PER_FAMILY = {
    "alexnet": (4096, 19),
    "convnext_tiny": (768, 39),
    "densenet121": (1024, 24),
    "efficientnet_b0": (1280, 75),
    "efficientnet_v2_s": (1280, 75),
    "googlenet": (1024, 25),
    "inception_v3": (2048, 30),
    "maxvit_t": (512, 130),
    "mnasnet0_5": (1280, 70),
    "mobilenet_v2": (1280, 70),
    "mobilenet_v3_small": (1024, 55),
    "regnet_y_400mf": (440, 35),
    "resnet18": (512, 22),
    "resnext50_32x4d": (2048, 35),
    "shufflenet_v2_x0_5": (1024, 40),
    "squeezenet1_1": (512, 29),
    "swin_t": (768, 40),
    "swin_v2_t": (768, 40),
    "vgg11_bn": (4096, 35),
    "vit_b_32": (768, 30),
    "wide_resnet50_2": (2048, 35),
}
# The one of them that takes no small pictures and has many cuts: at every cut it would take a minute.
SPREAD = {"maxvit_t": 10}
FIXED = {"maxvit_t", "vit_b_32"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=ONE_PER_FAMILY)
def network(request: pytest.FixtureRequest) -> Backbone:
    """One of each family, loaded and traced once for the tests that follow."""
    return load_backbone(request.param, allow_untrained=True)


@torch.inference_mode()
def _check(backbone: Backbone) -> None:
    name = backbone.name
    size = parity.smallest_size(backbone)
    spec = backbone.describe(size)
    images = sample_images(1, size)
    embedding = backbone.trunk(INPUT_CUT)(images)
    assert embedding.shape == (1, spec.slices[-1].stop)
    assert torch.isfinite(embedding).all()
    assert spec.slices[-1].name == "pooled"
    assert spec.cuts[0].feature_shape == (size, size, 3)
    assert spec.cuts[0].slices == tuple(one.name for one in spec.slices)
    logits = backbone.whole()(images)
    assert logits.shape == (1, 1000)
    if name not in ("inception_v3", "efficientnet_lite0"):  # torchvision counts the former's head for training too
        assert spec.num_parameters == torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]


def test_one_of_each_family(network: Backbone) -> None:
    _check(network)
    assert network.describe().slices[-1].width == ONE_PER_FAMILY[network.name][0]
    _check_other_sizes(network)


def _check_other_sizes(backbone: Backbone) -> None:
    """Compare what is said about other input sizes with what the network itself says to one."""
    own = backbone.preprocessing.input_size
    assert backbone.resizable == (backbone.name not in FIXED)
    if backbone.resizable:
        assert backbone.describe(own + 64).cuts[0].feature_shape == (own + 64, own + 64, 3)
        return
    images = torch.zeros(1, own + 64, own + 64, 3, dtype=torch.uint8)
    with pytest.raises((RuntimeError, AssertionError)), torch.inference_mode():
        backbone.trunk(INPUT_CUT)(images)
    with pytest.raises(WireError, match=f"takes pictures of {own} pixels only"):
        backbone.describe(own + 64)


def test_one_of_each_family_at_every_cut(network: Backbone) -> None:
    names = network.cut_names[1:]
    assert len(names) >= ONE_PER_FAMILY[network.name][1]
    step = SPREAD.get(network.name, 1)
    cuts = tuple(one for index, one in enumerate(names) if index % step == 0 or one in network.stage_names)
    result = parity.compare(network, parity.torchvision_reference(network.name), cuts, parity.smallest_size(network))
    assert result.error <= parity.RELATIVE_TOLERANCE


def test_a_small_network_of_the_family_of_many_cuts_at_every_cut() -> None:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return torchvision.models.MaxVit(
                input_size=(64, 64),
                stem_channels=8,
                partition_size=2,
                block_channels=[8, 16],
                block_layers=[2, 2],
                head_dim=4,
                stochastic_depth_prob=0.0,
                num_classes=5,
            ).eval()

    network = build()
    preprocessing = Preprocessing(64, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    info = WeightsInfo("random", pretrained=False)
    backbone = Backbone("small", network, preprocessing, info, sha256_of(network), resizable=False)
    assert len(backbone.cut_names) > 40
    result = parity.compare(backbone, build(), backbone.cut_names[1:], 64)
    assert result.error <= parity.RELATIVE_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", available_backbones())
def test_every_network(name: str) -> None:
    _check(load_backbone(name, allow_untrained=True))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["vit_b_32", "alexnet", "squeezenet1_1", "inception_v3"])
def test_pooled_is_what_enters_the_classifier(name: str) -> None:
    backbone = load_backbone(name, allow_untrained=True)
    size = parity.smallest_size(backbone)
    network = parity.torchvision_reference(name)
    parity.fill_zeros(*backbone.modules(), network)
    kind = nn.Conv2d if name == "squeezenet1_1" else nn.Linear
    entering: list[torch.Tensor] = []
    last = [module for module in network.modules() if isinstance(module, kind)][-1]
    last.register_forward_pre_hook(lambda _module, inputs: entering.append(inputs[0]))
    images = sample_images(2, size)
    logits = network(parity.normalised(backbone, images))
    expected = entering[0].mean((2, 3)) if entering[0].ndim == 4 else entering[0]
    pooled = backbone.trunk(INPUT_CUT)(images)[:, -expected.shape[1] :]
    assert backbone.describe(size).slices[-1].width == expected.shape[1]
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(backbone.whole()(images), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 31, 1025, 10**9])
def test_sizes_out_of_bounds_are_refused(size: int) -> None:
    with pytest.raises(WireError, match="32 to 1024") as caught:
        load_backbone("squeezenet1_1", allow_untrained=True).describe(size)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def test_a_picture_too_small_for_a_network_is_found_out_quietly_and_before_any_batch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backbone = load_backbone("inception_v3", allow_untrained=True)
    caplog.clear()
    with caplog.at_level(logging.DEBUG), pytest.raises(WireError, match="cannot take pictures of 64 pixels") as caught:
        backbone.describe(64)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
