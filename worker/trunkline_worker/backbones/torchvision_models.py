"""torchvision's classification networks by name: ``resnet18``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torchvision
from torch import nn
from torchvision.models import MaxVit, VisionTransformer
from trunkline_wire.specs import Preprocessing

from trunkline_worker.backbones.backbone import Backbone, WeightsInfo, sha256_of
from trunkline_worker.backbones.families import classifier_name
from trunkline_worker.backbones.hub import cached_file, fetch
from trunkline_worker.backbones.samples import Samples
from trunkline_worker.backbones.sources import UNTRAINED
from trunkline_worker.backbones.weights import StateDict, fit_by_name, float32, num_classes, read_state_dict, seeded

logger = logging.getLogger(__name__)

# Bound to one input size: their position embeddings or partitions are laid out when they are built.
_FIXED_SIZE = (VisionTransformer, MaxVit)


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classification networks."""
    return list(torchvision.models.list_models(module=torchvision.models))


def load_torchvision(
    name: str, weights: str | None, *, allow_untrained: bool, allow_download: bool, samples: Samples
) -> Backbone:
    """Build a network of torchvision and load its weights. See ``catalogue.load_backbone``.

    Raises:
        WireError: As ``load_backbone``.
    """
    members = torchvision.models.get_model_weights(name)
    member = _member(members, weights)
    options = _options(name, member)
    if weights is not None and weights not in members.__members__:
        path = Path(weights)
        state: StateDict | None = read_state_dict(path)
        info = WeightsInfo(f"file {path.name}", pretrained=True)
    else:
        path = cached_file(member.url)
        if not path.is_file() and not allow_untrained:
            fetch(name, member.url, path, allowed=allow_download)
        state = read_state_dict(path) if path.is_file() else None
        info = WeightsInfo(f"torchvision {member}", pretrained=True)
    network = _build(name, options)
    class_names: tuple[str, ...] = ()
    if state is None:
        logger.warning("backbone %s has random weights: no file at %s", name, path)
        info = UNTRAINED
    else:
        state = float32(state)
        given = num_classes(network.state_dict(), state, classifier_name(network))
        if given is not None:
            network = _build(name, {**options, "num_classes": given})
        fit_by_name(network, state, path.name)
        if path.name == Path(member.url).name:
            class_names = tuple(member.meta["categories"])
    return Backbone(
        name,
        network,
        _preprocessing(member),
        info,
        sha256_of(network),
        resizable=not isinstance(network, _FIXED_SIZE),
        class_names=class_names,
        samples=samples,
    )


def _member(members: Any, weights: str | None) -> Any:
    """Return the entry of torchvision's enumeration that says how pictures are prepared."""
    if weights in members.__members__:
        return members[weights]
    if weights is not None:
        file_name = Path(weights).name
        for member in members:
            if Path(member.url).name == file_name:
                return member
    return members.DEFAULT


def _options(name: str, member: Any) -> dict[str, Any]:
    """Return the arguments that torchvision passes when it builds a network for those weights."""
    options: dict[str, Any] = {"weights": None}
    if name.startswith("vit_"):
        options["image_size"] = member.transforms.keywords["crop_size"]
    if name in ("inception_v3", "googlenet"):
        # Without the heads that only training uses, and with the shift to the scale their weights were trained on.
        options.update(aux_logits=False, transform_input=True, init_weights=False)
    return options


def _build(name: str, options: dict[str, Any]) -> nn.Module:
    builder = torchvision.models.get_model_builder(name)
    network: nn.Module = seeded(lambda: builder(**options))
    return network


def _preprocessing(member: Any) -> Preprocessing:
    transforms = member.transforms()
    (crop,), (resize,) = transforms.crop_size, transforms.resize_size
    red, green, blue = transforms.mean
    red_std, green_std, blue_std = transforms.std
    return Preprocessing(
        input_size=crop,
        crop_fraction=crop / resize,
        interpolation=transforms.interpolation.value,
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
    )
