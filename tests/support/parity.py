"""Compares a backbone, cut anywhere, with the network it was made from."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn
from trunkline_wire.errors import WireError
from trunkline_wire.specs import INPUT_CUT
from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.export import sample_images

# float32, the same kernels on the same numbers: only the order of the additions may differ.
RELATIVE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Parity:
    """What was compared: the largest difference over the largest value, of logits and of the embedding."""

    num_cuts: int
    error: float


def torchvision_reference(name: str) -> nn.Module:
    """Build the network that the catalogue builds where there are no weights."""
    options: dict[str, object] = {}
    if name in ("inception_v3", "googlenet"):
        options = {"aux_logits": False, "init_weights": False, "transform_input": True}
    if name.startswith("vit_"):
        options = {"image_size": torchvision.models.get_model_weights(name).DEFAULT.transforms.keywords["crop_size"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torchvision.models.get_model(name, weights=None, **options).eval()


def smallest_size(backbone: Backbone) -> int:
    """Return a small input size that the network takes."""
    if not backbone.resizable:
        return backbone.preprocessing.input_size
    for size in (64, 80, 96, 128):
        try:
            backbone.describe(size)
        except WireError:
            continue
        return size
    raise AssertionError("takes no small picture")


def normalised(backbone: Backbone, images_BHWC: Tensor) -> Tensor:
    """Do what torchvision's ToTensor and Normalize do."""
    mean = torch.tensor(backbone.preprocessing.mean)[:, None, None]
    std = torch.tensor(backbone.preprocessing.std)[:, None, None]
    return (images_BHWC.permute(0, 3, 1, 2).float() / 255 - mean) / std


def fill_zeros(*modules: nn.Module) -> None:
    """Give weights that start as zeros, as the heads of vision transformers do, the same values everywhere."""
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and not parameter.any():
                generator = torch.Generator().manual_seed(len(name))
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)


@torch.inference_mode()
def compare(backbone: Backbone, reference: nn.Module, cuts: tuple[str, ...], size: int) -> Parity:
    """Compare logits and embedding at the cuts with those of the uncut network.

    Raises:
        AssertionError: Shapes, columns or slices are not what the backbone's description says.
    """
    fill_zeros(*backbone.modules(), reference)
    spec = backbone.describe(size)
    images = sample_images(2 if spec.macs < 2e9 else 1, size)
    expected = reference(normalised(backbone, images))
    assert float(expected.std()) > 0
    full = backbone.trunk(INPUT_CUT)(images)
    assert full.shape == (len(images), spec.slices[-1].stop)
    worst = _difference(backbone.whole()(images), expected)
    last = spec.cuts[-1]
    classifier = backbone.rest(last.name) if len(last.feature_shape) == 1 else None
    for name in cuts:
        cut = spec.cut(name)
        assert cut is not None
        features = backbone.stem(name)(images)
        assert features.shape[1:] == cut.feature_shape
        assert features.dtype == torch.float32
        before = features.clone()
        behind = backbone.trunk(name)(features)
        # Where the last cut is the vector that the trunk ends in, the way on from there gives the logits: the network
        # behind the cut need not run twice.
        pooled = behind[:, -spec.slices[-1].width :]
        logits = backbone.rest(name)(features) if classifier is None else classifier(pooled)
        worst = max(worst, _difference(logits, expected))
        assert torch.equal(features, before), f"{name}: a part changed the features it was given"
        assert behind.shape[1] == sum(one.width for one in spec.slices if one.name in cut.slices)
        for one in spec.slices:  # slice by slice: a wide one must not hide a narrow one
            if one.name in cut.slices:
                first = one.start - (full.shape[1] - behind.shape[1])
                got = behind[:, first : first + one.width]
                worst = max(worst, _difference(got, full[:, one.start : one.stop]))
    return Parity(len(cuts), worst)


def _difference(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    assert got.dtype == torch.float32
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def reference_embedding(backbone: Backbone, reference: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Tap a network with hooks and pool with torch's own pooling: slice name to its columns."""
    reference = copy.deepcopy(reference)
    taps: dict[str, Tensor] = {}
    for name in backbone.stage_names:
        reference.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: taps.__setitem__(name, output.clone())
        )
    with torch.inference_mode():
        reference(normalised(backbone, images))
    columns = {}
    for name, x in taps.items():
        columns[f"{name}.mean"] = x.mean((2, 3))
        columns[f"{name}.std"] = x.std((2, 3), correction=0)
        columns[f"{name}.grid"] = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
    return columns
