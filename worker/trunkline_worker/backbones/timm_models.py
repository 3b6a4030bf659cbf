"""timm's networks by name: ``timm/resnet18``, or with the tag of certain weights, ``timm/resnet18.a1_in1k``."""

from __future__ import annotations

import difflib
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import Preprocessing

from trunkline_worker.backbones.backbone import Backbone, WeightsInfo, sha256_of
from trunkline_worker.backbones.hub import Repo, cached_file, cached_repo_file, fetch, fetch_repo_file
from trunkline_worker.backbones.quiet import quiet
from trunkline_worker.backbones.samples import Samples
from trunkline_worker.backbones.sources import UNTRAINED, imagenet_names
from trunkline_worker.backbones.weights import (
    StateDict,
    fit_by_name,
    float32,
    is_alike,
    num_classes,
    read_state_dict,
    seeded,
)

# timm is imported where it is used: it takes seconds, and only who wants one of its networks pays.

logger = logging.getLogger(__name__)

PREFIX = "timm/"
"""What names of timm's networks begin with here."""

_INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
_IMAGENET_CLASSES = 1000
_CONVERTERS = ("checkpoint_filter_fn", "_filter_fn")
_NUM_SUGGESTIONS = 4


@dataclass(frozen=True)
class TracingRules:
    """What tracing must not look into."""

    leaves: tuple[type[nn.Module], ...]
    functions: tuple[Callable[..., Any], ...]


def tracing_rules() -> TracingRules:
    """Return the modules and functions of timm that must be traced as one."""
    from timm.models import get_notrace_functions, get_notrace_modules

    functions = (one for one in get_notrace_functions() if callable(one))
    return TracingRules(tuple(get_notrace_modules()), tuple(functions))


def load_timm(
    name: str, weights: str | None, *, allow_untrained: bool, allow_download: bool, samples: Samples
) -> Backbone:
    """Build a network of timm and load its weights. See ``catalogue.load_backbone``.

    Raises:
        WireError: As ``load_backbone``; UNSUPPORTED for a network that takes something else than square pictures.
    """
    model = name.removeprefix(PREFIX)
    _check_known(model)
    network = _build(model)
    config: Mapping[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    preprocessing = _preprocessing(name, config)
    found = _find_weights(name, weights, config, allow_untrained=allow_untrained, allow_download=allow_download)
    class_names: tuple[str, ...] = ()
    if found is None:
        logger.warning("backbone %s has random weights: none are in the caches", name)
    else:
        network = _fit(model, network, float32(read_state_dict(found.path)), found.path.name)
        if found.is_own and config.get("num_classes") == _IMAGENET_CLASSES:
            class_names = imagenet_names()
    rules = tracing_rules()
    return Backbone(
        name,
        network,
        preprocessing,
        WeightsInfo(found.text, pretrained=True) if found is not None else UNTRAINED,
        sha256_of(network),
        resizable=not config.get("fixed_input_size", False),
        leaves=rules.leaves,
        functions=rules.functions,
        class_names=class_names,
        samples=samples,
    )


def _check_known(model: str) -> None:
    import timm

    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        raise WireError(
            ErrorCode.NOT_FOUND,
            f"timm {timm.__version__} has no model {architecture[:80]!r}."
            f"{_suggestion(architecture, timm.list_models())} timm.list_models() lists them all",
        )
    tags = [one.partition(".")[2] for one in timm.list_models(f"{architecture}.*", include_tags=True)]
    if tag and tag not in tags:
        raise WireError(
            ErrorCode.NOT_FOUND,
            f"timm {timm.__version__} has no weights {tag[:80]!r} of {architecture}."
            f"{_suggestion(tag, tags) or _listed(tags)}",
        )


def _suggestion(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name[:80], known, n=_NUM_SUGGESTIONS, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _listed(tags: Sequence[str]) -> str:
    shown = ", ".join(tags[: 2 * _NUM_SUGGESTIONS])
    return f" It has: {shown}{' and others' if len(tags) > 2 * _NUM_SUGGESTIONS else ''}" if tags else " It has none"


def _build(model: str, **options: Any) -> nn.Module:
    import timm

    try:
        with quiet("timm"):
            network: nn.Module = seeded(lambda: timm.create_model(model, pretrained=False, **options))
    except Exception as error:  # whatever the network's own code raises, such as for a package that is not installed
        raise WireError(
            ErrorCode.UNSUPPORTED, f"timm cannot build {model[:80]!r}: {type(error).__name__}: {error}"[:400]
        ) from error
    return network


def _preprocessing(name: str, config: Mapping[str, Any]) -> Preprocessing:
    """Return how timm prepares pictures for a network.

    Raises:
        WireError: UNSUPPORTED.
    """
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise WireError(
            ErrorCode.UNSUPPORTED,
            f"{name} takes {height} x {width} pixels of {channels} channels; square pictures of 3 channels are served",
        )
    if config["interpolation"] not in _INTERPOLATIONS:
        raise WireError(
            ErrorCode.UNSUPPORTED,
            f"{name} resizes by {config['interpolation']!r}; known are {', '.join(_INTERPOLATIONS)}",
        )
    red, green, blue = config["mean"]
    red_std, green_std, blue_std = config["std"]
    # timm rounds the resized side down; above 1 it pads, where the whole picture is used here.
    resized = max(height, math.floor(height / config["crop_pct"]))
    return Preprocessing(
        input_size=height,
        crop_fraction=height / resized,
        interpolation=config["interpolation"],
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
    )


@dataclass(frozen=True)
class _Found:
    """A file of weights. ``is_own``: it is the one that timm names for the network."""

    path: Path
    text: str
    is_own: bool


def _find_weights(
    name: str, weights: str | None, config: Mapping[str, Any], *, allow_untrained: bool, allow_download: bool
) -> _Found | None:
    """Return the file to load, fetched where that is allowed and needed; None where random numbers will do."""
    if weights is not None:
        path = Path(weights)
        return _Found(path, f"file {path.name}", is_own=False)
    repo = Repo.parse(config["hf_hub_id"]) if config.get("hf_hub_id") else None
    url = _url(config)
    in_hub = cached_repo_file(repo) if repo is not None else None
    in_torch = cached_file(url) if url is not None and cached_file(url).is_file() else None
    if in_hub is None and in_torch is None and not allow_untrained:
        if repo is not None:
            in_hub = fetch_repo_file(name, repo, allowed=allow_download)
        elif url is not None:
            in_torch = cached_file(url)
            fetch(name, url, in_torch, allowed=allow_download)
        else:
            raise WireError(
                ErrorCode.NOT_FOUND,
                f"timm has no weights of {name}:{_suggested_tags(config)} name a local file with --weights FILE, or "
                "accept random weights with --allow-untrained",
            )
    tagged = ".".join(filter(None, (config.get("architecture"), config.get("tag"))))
    if in_hub is not None and repo is not None:
        commit = in_hub.parent.name[:8]
        return _Found(in_hub, f"timm {tagged}, from the Hugging Face hub: {repo.id} at {commit}", is_own=True)
    if in_torch is not None:
        return _Found(in_torch, f"timm {tagged}, from {in_torch.name}", is_own=True)
    return None


def _url(config: Mapping[str, Any]) -> str | None:
    """Return the address of a file with a state dict, if there is one; arrays of other frameworks are none."""
    url = config.get("url")
    if isinstance(url, (tuple, list)):
        url = url[0]
    return url if url and not url.endswith(".npz") else None


def _suggested_tags(config: Mapping[str, Any]) -> str:
    import timm

    trained = timm.list_pretrained(f"{config.get('architecture')}.*")[:_NUM_SUGGESTIONS]
    return f" choose those of {' or '.join(PREFIX + one for one in trained)}," if trained else ""


def _fit(model: str, network: nn.Module, state: StateDict, source: str) -> nn.Module:
    """Load weights into a network, or into one like it with as many classes as the weights are for.

    Raises:
        WireError: INCOMPATIBLE, naming every tensor that does not fit.
    """
    config: Mapping[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    named = config.get("classifier") or ()
    classifiers = (named,) if isinstance(named, str) else tuple(named)
    own = network.state_dict()
    ignored = [f"{layer}.{kind}" for layer in classifiers for kind in ("weight", "bias")]
    if not is_alike(own, state, but=ignored):
        state = _converted(model, network, state)
    for layer in classifiers:
        given = num_classes(own, state, layer)
        if given is not None:
            network = _build(model, num_classes=given)
            break
    fit_by_name(network, state, source)
    return network


def _converted(model: str, network: nn.Module, state: StateDict) -> StateDict:
    """Bring the names of another implementation to timm's, by the converter in the model's own file."""
    import timm

    builder = timm.model_entrypoint(model.partition(".")[0])
    for module in (builder.__module__, type(network).__module__):
        for converter in _CONVERTERS:
            convert = getattr(sys.modules[module], converter, None)
            if convert is None:
                continue
            try:
                converted: StateDict = convert(dict(state), network)
            except Exception as error:  # it was written for certain files, and says nothing about others
                logger.info("timm's %s of %s does not understand these weights: %s", converter, module, error)
                continue
            return float32(converted)
    return state
