"""State dicts: read without running code, fitted to a module with every difference named, hashed.

The only module of the worker that calls ``torch.load``, and always with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from torch import nn
from trunkline_wire.errors import ErrorCode, WireError

StateDict = Mapping[str, torch.Tensor]
T = TypeVar("T")

MAX_NAMED = 100
"""How many tensors that do not fit are named in an error."""

_UNTRAINED_SEED = 0
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_COUNTER = "num_batches_tracked"
# Old DenseNet files: `denselayer1.norm.1.weight` where the module says `denselayer1.norm1.weight`.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$")
# Heads that are trained with and never run at inference.
_AUXILIARY = re.compile(r"^(?:AuxLogits|aux1|aux2)\.")


def read_state_dict(path: Path) -> StateDict:
    """Read a state dict from a ``.safetensors`` file, or from one that ``torch.save`` wrote.

    Raises:
        WireError: NOT_FOUND, or CORRUPT_DATA where the file is damaged or holds anything but tensors.
    """
    if not path.is_file():
        raise WireError(ErrorCode.NOT_FOUND, f"no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds on damaged files
        raise WireError(
            ErrorCode.CORRUPT_DATA,
            f"{path} is not a state dict that can be read without running code: save one with "
            "torch.save(model.state_dict(), file) or as safetensors",
        ) from error
    return _unwrap(loaded, path)


def read_safetensors(path: Path) -> StateDict:
    """Read a ``.safetensors`` file, and nothing else.

    Raises:
        WireError: NOT_FOUND, UNSUPPORTED for another kind of file, or CORRUPT_DATA.
    """
    if path.suffix != ".safetensors":
        raise WireError(
            ErrorCode.UNSUPPORTED,
            f"the weights {path.name} are not a .safetensors file: files that torch.save writes can run code when they "
            "are read. Save them with safetensors.torch.save_file(model.state_dict(), file)",
        )
    if not path.is_file():
        raise WireError(ErrorCode.NOT_FOUND, f"no weights file at {path}")
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # the reader raises many kinds on damaged files
        raise WireError(ErrorCode.CORRUPT_DATA, f"{path} is not a safetensors file, or is damaged") from error


def _unwrap(loaded: object, path: Path) -> StateDict:
    """Take a state dict out of the dictionary that training scripts put around it."""
    if isinstance(loaded, dict):
        for key in _WRAPPERS:
            if isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(one, torch.Tensor) for one in loaded.values()):
        raise WireError(ErrorCode.CORRUPT_DATA, f"{path} holds no state dict: names and tensors are expected")
    if all(name.startswith("module.") for name in loaded):
        loaded = {name.removeprefix("module."): tensor for name, tensor in loaded.items()}
    return loaded


def fit_by_position(module: nn.Module, state: StateDict, source: str) -> None:
    """Load tensors in the order in which they come, whatever their names. Every shape must agree.

    Raises:
        WireError: INCOMPATIBLE.
    """
    names = list(module.state_dict())
    if len(names) != len(state):
        raise WireError(ErrorCode.INCOMPATIBLE, f"{source} holds {len(state)} tensors; {len(names)} are expected")
    fit_by_name(module, dict(zip(names, state.values(), strict=True)), source)


def fit_by_name(module: nn.Module, state: StateDict, source: str) -> None:
    """Load a state dict that must fit exactly.

    Counters of batch normalisation may be missing, heads for training only may be left over, and the names of old
    DenseNet files are understood.

    Raises:
        WireError: INCOMPATIBLE, naming what is missing, left over or of another shape.
    """
    own = module.state_dict()
    fitted: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name, tensor in state.items():
        name = _OLD_DENSENET.sub(r"\1\2", name)
        if name in own or not _AUXILIARY.match(name):
            fitted[name] = tensor
    for name, tensor in own.items():
        if name.endswith(_COUNTER):
            fitted.setdefault(name, tensor)
    # Modules may read the version of their layout from here; a file without one has today's.
    fitted._metadata = getattr(state, "_metadata", None) or own._metadata  # type: ignore[attr-defined]
    try:
        module.load_state_dict(fitted, strict=True)
    except (RuntimeError, ValueError) as error:
        raise WireError(ErrorCode.INCOMPATIBLE, f"{source} does not fit: {_differences(own, fitted)}") from error


def is_alike(own: StateDict, other: StateDict, *, but: Iterable[str] = ()) -> bool:
    """Whether two state dicts have the same names and shapes, counters and the tensors named ``but`` left aside."""
    ignored = set(but)

    def shapes(state: StateDict) -> dict[str, torch.Size]:
        return {name: one.shape for name, one in state.items() if name not in ignored and not name.endswith(_COUNTER)}

    return shapes(own) == shapes(other)


def num_classes(own: StateDict, other: StateDict, layer: str) -> int | None:
    """Return how many classes the classifier ``layer`` of ``other`` has, where that is not what ``own`` has."""
    mine, given = own.get(f"{layer}.weight"), other.get(f"{layer}.weight")
    if mine is None or given is None or given.ndim != mine.ndim:
        return None
    if given.shape[0] == mine.shape[0] or given.shape[1:] != mine.shape[1:]:
        return None
    return int(given.shape[0])


def float32(state: StateDict) -> StateDict:
    """Widen half-precision tensors, so that equal weights hash alike however they were stored."""
    widened = OrderedDict(
        (name, tensor.float() if tensor.is_floating_point() else tensor) for name, tensor in state.items()
    )
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:  # versions of layouts, which modules read when they load
        widened._metadata = metadata  # type: ignore[attr-defined]
    return widened


def seeded(build: Callable[[], T]) -> T:
    """Build a network from one seed, so that an untrained one has the same numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_UNTRAINED_SEED)
        return build()


def _differences(own: StateDict, other: StateDict) -> str:
    """Say in what two state dicts differ, naming a few tensors of each kind."""
    shapes = [
        f"{name} ({_shape(other[name])}, expected {_shape(tensor)})"
        for name, tensor in own.items()
        if name in other and other[name].shape != tensor.shape
    ]
    kinds = {
        "missing": [name for name in own if name not in other],
        "unexpected": [name for name in other if name not in own],
        "of another shape": shapes,
    }
    return "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names) or "its layout"


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _some(names: list[str]) -> str:
    # Names come from a file: bound their length as well as their number.
    shown = ", ".join(name[:120] for name in names[:MAX_NAMED])
    return shown if len(names) <= MAX_NAMED else f"{shown} and {len(names) - MAX_NAMED} more"


def state_sha256(state: StateDict) -> str:
    """Return the hex SHA-256 over names, dtypes, shapes and values, whatever the file format or the order.

    Counters of batch normalisation do not change an output and are left out.
    """
    digest = hashlib.sha256(b"state-v1\0")
    for name in sorted(state):
        if name.endswith(_COUNTER):
            continue
        tensor = state[name].detach().cpu().contiguous()
        header = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()
        digest.update(struct.pack("<q", len(header)) + header)
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
