"""State dicts: read without running code, fitted to a module with every difference named, hashed.

The only module of the worker that calls ``torch.load``, and always with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn
from trunkline_wire.errors import ErrorCode, WireError

StateDict = Mapping[str, torch.Tensor]

MAX_NAMED = 8
"""How many tensors that do not fit are named in an error."""

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
