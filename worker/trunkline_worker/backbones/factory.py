"""The code of a backbone of one's own: found beside its manifest, and called without the network."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import nn
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.backbones.manifest import Manifest
from trunkline_worker.backbones.offline import NetworkUsedError, offline
from trunkline_worker.backbones.weights import seeded

_MAX_QUOTED = 300


def build_network(manifest: Manifest) -> nn.Module:
    """Import the factory and call it, without the network.

    Raises:
        WireError: INVALID_ARGUMENT or NOT_FOUND.
    """
    with offline() as tried:
        try:
            factory = _import(manifest, manifest.factory, "factory")
            if not callable(factory):
                raise _bad_factory(manifest, f"is {kind_of(factory)}, which cannot be called")
            network = seeded(lambda: factory(**manifest.arguments))
        except NetworkUsedError:
            network = None
        except WireError:
            if not tried:
                raise
        except (Exception, SystemExit) as error:
            if not tried:
                raise _bad_factory(manifest, f"raised {quoted(error)}") from error
    if tried:
        raise _bad_factory(
            manifest,
            f"tried to reach {tried[0]} over the network: weights come from the file {manifest.weights.name}. Let it "
            "build the network without pretrained weights (often pretrained=False or weights=None)",
        )
    if not isinstance(network, nn.Module):
        raise _bad_factory(manifest, f"returned {kind_of(network)}; a torch.nn.Module is expected")
    return network


def import_leaf(manifest: Manifest, reference: str) -> type[nn.Module]:
    """Return the class of modules that ``package.module:Class`` names.

    Raises:
        WireError: INVALID_ARGUMENT or NOT_FOUND.
    """
    found = _import(manifest, reference, "leaf")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise WireError(
            ErrorCode.INVALID_ARGUMENT,
            f"{manifest.file}: the leaf {reference} is {kind_of(found)}, no class of modules",
        )
    return found


def quoted(error: BaseException) -> str:
    """Return the kind and the message of an error, on one line and of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_MAX_QUOTED]}"


def kind_of(value: object) -> str:
    """Return what a value is, in words."""
    name = type(value).__name__
    if isinstance(value, type(sys)):
        return f"the module {value.__name__}"
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _bad_factory(manifest: Manifest, what: str) -> WireError:
    return WireError(ErrorCode.INVALID_ARGUMENT, f"the factory {manifest.factory} of {manifest.name} {what}")


def _import(manifest: Manifest, reference: str, key: str) -> Any:
    """Return what ``package.module:name`` names, the manifest's folder searched first.

    Raises:
        WireError: INVALID_ARGUMENT or NOT_FOUND.
    """
    module_name, _, attributes = reference.partition(":")
    if not manifest.path.is_dir():
        raise WireError(ErrorCode.NOT_FOUND, f"{manifest.file}: the path {manifest.path} is not a folder")
    folder = str(manifest.path.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # it stays: networks may import more when they run
        importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise WireError(
            ErrorCode.INVALID_ARGUMENT,
            f"{manifest.file}: the {key} {reference} cannot be imported from {folder} or from what is installed: "
            f"{quoted(error)}",
        ) from error
    _check_origin(module_name, Path(folder))
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                f"{manifest.file}: the {key} {reference} is not there: {kind_of(found)} has no {attribute!r}",
            )
        found = getattr(found, attribute)
    return found


def _check_origin(module_name: str, folder: Path) -> None:
    """Refuse a module of another place that hides the one beside the manifest.

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    top = module_name.partition(".")[0]
    beside = [folder / f"{top}.py", folder / top / "__init__.py"]
    origin = getattr(sys.modules[top], "__file__", None)
    if any(one.is_file() for one in beside) and Path(origin or "/").resolve() not in beside:
        raise WireError(
            ErrorCode.INVALID_ARGUMENT,
            f"the module {top!r} in {folder} is hidden by another of that name ({origin or 'built in'}): rename it",
        )
