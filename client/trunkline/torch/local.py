"""Local models that are torch modules."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trunkline._local_rows import ARRAYS, PictureInput
from trunkline.errors import InvalidArgumentError, UnsupportedError


class TorchRunner:
    """Runs a module in evaluation mode, without gradients, where its parameters are.

    Attributes:
        sha256: Over weights, structure and code. See ``module_sha256``.
        inputs: What goes in, in words.
    """

    def __init__(self, module: nn.Module, picture: PictureInput | None) -> None:
        """Hash the module as it is now.

        Args:
            module: The module.
            picture: How pictures enter; None for rows as they are.
        """
        self._module = module
        self._picture = picture
        self.sha256 = module_sha256(module)
        self.inputs = ARRAYS if picture is None else picture.describe("planes")

    def __call__(self, rows: npt.NDArray[Any]) -> Any:
        """Return the output for a batch of rows, (B, ...). Floats go in with the precision of the parameters."""
        module = self._module
        if self._picture is not None:
            rows = self._picture.planes(rows)
        own = next((one for one in (*module.parameters(), *module.buffers()) if one.is_floating_point()), None)
        x = torch.from_numpy(np.ascontiguousarray(rows))
        if own is not None:
            x = x.to(own.device, own.dtype if x.is_floating_point() else None)
        was_training = {one: one.training for one in module.modules()}
        module.eval()
        try:
            with torch.inference_mode():
                outputs = module(x)
        finally:
            for one, flag in was_training.items():
                one.training = flag
        if not isinstance(outputs, Tensor):
            raise UnsupportedError(
                f"{type(module).__name__} returns a {type(outputs).__name__}; a local model returns one tensor",
                hint="Wrap it in a module or function that returns the one that is meant",
            )
        return (outputs.float() if outputs.is_floating_point() else outputs).cpu().numpy()


def module_sha256(module: nn.Module) -> str:
    """Return the hex SHA-256 of what decides what a module computes, as far as that can be seen.

    That is the class and the printed settings of every part, the source of every class that is not torch's own, and
    the type, shape and bytes of everything in the state dict.

    Raises:
        InvalidArgumentError: Its state holds something else than tensors.
    """
    digest = hashlib.sha256(b"torch-v1")
    sources: dict[str, str] = {}
    for name, part in module.named_modules():
        kind = type(part)
        qualified = f"{kind.__module__}.{kind.__qualname__}"
        _add(digest, name, qualified, part.extra_repr())
        if kind.__module__.partition(".")[0] != "torch":
            sources[qualified] = _source(kind)
    for qualified in sorted(sources):
        _add(digest, qualified, sources[qualified])
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise InvalidArgumentError(
                f"{name!r} in the state of {type(module).__name__} is a {type(value).__name__}, which cannot be hashed",
                hint="Wrap the module in a function, and give version=",
            )
        _add(digest, name, str(value.dtype), str(tuple(value.shape)))
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed in at a prompt, or made by a compiler
        return ""


def _add(digest: Any, *texts: str) -> None:
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
