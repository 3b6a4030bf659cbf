"""Torch: eager in several layouts and precisions, or compiled."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import INPUT_CUT, CutSpec

from trunkline_worker.backbones.backbone import Backbone, Normalise
from trunkline_worker.engine import runtime_names as names
from trunkline_worker.engine.pinned import Staged, Staging
from trunkline_worker.engine.runtimes import to_torch

# Shape suffix legend: B = rows, D = embedding columns


@dataclass(frozen=True)
class Recipe:
    """How torch computes.

    Attributes:
        channels_last: Whether weights and features of convolutions lie channels last in memory.
        dtype: Of weights and features.
        autocast: What torch multiplies in where it deems that safe; None for ``dtype`` everywhere.
        compiled: By ``torch.compile``, for any number of rows.
    """

    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    compiled: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of tensors of four axes."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


RECIPES = {
    names.TORCH_FP32: Recipe(),
    names.TORCH_FP32_LAST: Recipe(channels_last=True),
    names.TORCH_BF16: Recipe(channels_last=True, autocast=torch.bfloat16),
    names.TORCH_FP16: Recipe(channels_last=True, autocast=torch.float16),
    names.TORCH_BF16_PURE: Recipe(channels_last=True, dtype=torch.bfloat16),
    names.TORCH_FP16_PURE: Recipe(channels_last=True, dtype=torch.float16),
    names.COMPILE_FP32: Recipe(channels_last=True, compiled=True),
    names.COMPILE_BF16: Recipe(channels_last=True, dtype=torch.bfloat16, compiled=True),
    names.COMPILE_FP16: Recipe(channels_last=True, dtype=torch.float16, compiled=True),
}


class Weights:
    """The weights of one backbone in other layouts and precisions.

    Trunks that want the same share them; what no trunk holds any more is gone. Used from one thread.
    """

    def __init__(self) -> None:
        self._made: weakref.WeakValueDictionary[tuple[int, torch.dtype, bool], Tensor] = weakref.WeakValueDictionary()

    def converted(self, trunk: nn.Module, recipe: Recipe) -> nn.Module:
        """Return a trunk with its weights as a recipe wants them. Normalisation stays in float32.

        Args:
            trunk: Of a backbone that lives on: its tensors are told apart by identity.
            recipe: What is wanted.
        """
        kept = [one for part in trunk.modules() if isinstance(part, Normalise) for one in part.buffers()]
        memo: dict[int, object] = {id(one): one for one in kept}
        for tensor in (*trunk.parameters(), *trunk.buffers()):
            if id(tensor) not in memo:
                memo[id(tensor)] = self._converted(tensor, recipe)
        # A copy of the modules; every tensor in them is in the memo already.
        converted: nn.Module = copy.deepcopy(trunk, memo)
        for name, child in list(converted.named_children()):
            if isinstance(child, Normalise):
                setattr(converted, name, nn.Sequential(child, _LaidOut(recipe)))
        return converted.eval()

    def _converted(self, tensor: Tensor, recipe: Recipe) -> Tensor:
        key = (id(tensor), recipe.dtype, recipe.channels_last)
        made = self._made.get(key)
        if made is None:
            made = tensor.detach()
            if tensor.is_floating_point():
                made = made.to(recipe.dtype)
            if tensor.ndim == 4:
                made = made.contiguous(memory_format=recipe.memory_format)
            if made.data_ptr() == tensor.data_ptr():
                return tensor
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=False)
            self._made[key] = made
        return made


class _LaidOut(nn.Module):
    """Brings what normalisation returns, float32 and channels last, to the layout and precision of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.dtype = recipe.dtype
        self.memory_format = recipe.memory_format

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.to(self.dtype).contiguous(memory_format=self.memory_format)


class TorchRuntime:
    """Torch on one device. On a GPU rows go there through pinned memory, see ``stage``."""

    def __init__(
        self,
        trunk: Callable[[Tensor], Tensor],
        name: str,
        device: torch.device,
        *,
        recipe: Recipe | None = None,
        channels_first: bool = True,
    ) -> None:
        """Wrap a trunk whose weights are on the device and as the recipe wants them.

        Args:
            trunk: The part behind a cut.
            name: One of ``RECIPES``.
            device: Where it runs.
            recipe: How. None: what the name stands for.
            channels_first: Whether features of three axes are (C, H, W), whose memory is then laid out as the recipe
                says. Those with their channels elsewhere are left as they come.
        """
        self.name = name
        self._recipe = recipe or RECIPES[name]
        self._device = device
        self._channels_first = channels_first
        # Not with `freezing`, which folds weights into the program: for a free number of rows it made programs that
        # were up to three times slower on CPUs, and it keeps the weights twice.
        self._trunk: Callable[[Tensor], Tensor] = torch.compile(trunk) if self._recipe.compiled else trunk
        self._staging = Staging(device) if device.type == "cuda" else None

    @property
    def stages_ahead(self) -> bool:
        """Whether rows travel, so that the next batch's may do so while one is computed."""
        return self._staging is not None

    def run(self, features: npt.NDArray[np.generic], staged: Staged | None = None) -> Tensor:
        """Return the embedding of a batch. See ``Runtime``.

        Args:
            features: The batch.
            staged: What ``stage`` returned for it; None to stage it now.
        """
        try:
            return self.run_staged(self.stage(features) if staged is None else staged)
        except torch.OutOfMemoryError as error:
            out_of_memory = error
        # Outside of the handler, where the traceback no longer holds on to the tensors of the failed attempt.
        out_of_memory.__traceback__ = None
        return self._run_halves(features)

    @torch.inference_mode()  # a compiled trunk tells tensors made in this mode from others, and compiles for each
    def stage(self, features: npt.NDArray[np.generic]) -> Staged:
        """Begin to bring rows to the device, and return before they are there.

        From any thread, one call at a time: the rows of the next batch travel while ``run_staged`` computes this one.
        At most two batches may be on their way.
        """
        if self._staging is None:
            return Staged(to_torch(features))
        return self._staging.start(features)

    @torch.inference_mode()
    def run_staged(self, staged: Staged) -> Tensor:
        """Return the embedding of rows that ``stage`` was given, once.

        Raises:
            torch.OutOfMemoryError: They do not fit beside the weights; ``run`` tries halves.
        """
        features = self._laid_out(staged.take())
        num_rows = len(features)
        if self._recipe.compiled:
            if num_rows == 1:  # a compiler makes a program of its own for 1: a row alone runs twice instead
                features = torch.cat([features, features])
            torch._dynamo.mark_dynamic(features, 0)
        autocast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self._recipe.autocast is not None:
            autocast = torch.autocast(self._device.type, dtype=self._recipe.autocast)
        with autocast:
            embedding_BD = self._trunk(features)
        return embedding_BD[:num_rows].float().cpu()

    def _laid_out(self, features: Tensor) -> Tensor:
        if features.dtype == torch.uint8:
            return features
        features = features.to(self._recipe.dtype)
        if features.ndim == 4 and self._channels_first:
            features = features.contiguous(memory_format=self._recipe.memory_format)
        return features

    def _run_halves(self, features: npt.NDArray[np.generic]) -> Tensor:
        torch.cuda.empty_cache()
        half = len(features) // 2
        if half == 0:
            raise WireError(
                ErrorCode.WORKER_OOM,
                f"one row of shape {features.shape[1:]} does not fit the memory of {self._device}; use a smaller "
                "input size",
            )
        return torch.cat([self.run(features[:half]), self.run(features[half:])])


def place(backbone: Backbone, device: torch.device) -> Backbone:
    """Return the backbone on a device, laid out as PyTorch does by default: itself on the CPU, a copy elsewhere."""
    placed = backbone if device.type == "cpu" else copy.deepcopy(backbone)
    for module in placed.modules():
        module.to(device).to(memory_format=torch.contiguous_format)
    return placed


def torch_runtime(
    placed: Backbone,
    cut: CutSpec,
    name: str,
    device: torch.device,
    *,
    whole: str = "",
    weights: Weights | None = None,
) -> TorchRuntime:
    """Return the trunk behind a cut in torch.

    Args:
        placed: On the device, see ``place``.
        cut: Where the features enter.
        name: One of ``RECIPES``.
        device: Where it runs.
        whole: The slice that it ends in, if not in the embedding. See ``Backbone.trunk``.
        weights: Shares converted weights with other runtimes.
    """
    trunk = (weights or Weights()).converted(placed.trunk(cut.name, whole), RECIPES[name])
    return TorchRuntime(trunk, name, device, channels_first=cut.channel_axis == 0)


@torch.inference_mode()
def exact_features(
    placed: Backbone, cut: str, images_BHWC: npt.NDArray[np.uint8], device: torch.device
) -> npt.NDArray[np.generic]:
    """Return what the exact stem makes of pictures, float32; at ``input`` the pictures themselves.

    Args:
        placed: On the device, see ``place``.
        cut: Where the stem ends.
        images_BHWC: (B, H, W, 3), at the input size.
        device: Where it runs.
    """
    if cut == INPUT_CUT:
        return images_BHWC
    features: npt.NDArray[np.generic] = placed.stem(cut)(to_torch(images_BHWC).to(device)).cpu().contiguous().numpy()
    return features
