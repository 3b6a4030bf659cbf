"""Runtimes for CUDA alone: graphs that are captured once per number of rows, and TensorRT where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trunkline_worker.backbones.backbone import Normalise
from trunkline_worker.engine import runtime_names as names
from trunkline_worker.engine.pinned import Staging
from trunkline_worker.engine.torch_runtimes import Recipe

# Shape suffix legend: B = rows, D = embedding columns

GRAPH_RECIPES = {
    names.GRAPH_FP32: Recipe(channels_last=True),
    names.GRAPH_BF16: Recipe(channels_last=True, dtype=torch.bfloat16),
    names.GRAPH_FP16: Recipe(channels_last=True, dtype=torch.float16),
}
TENSORRT_RECIPES = {names.TENSORRT_FP32: Recipe(), names.TENSORRT_FP16: Recipe(dtype=torch.float16)}

_WARM_UP_RUNS = 3


def why_no_tensorrt() -> str:
    """Return why TensorRT cannot be had; empty where it can."""
    return "" if importlib.util.find_spec("torch_tensorrt") else "the package torch_tensorrt is not installed"


@dataclass(frozen=True)
class _Captured:
    """A graph with the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    features: Tensor
    embedding_BD: Tensor


class CudaGraphRuntime:
    """Replays a trunk without launching its kernels one by one, which pays where they are short.

    A graph has a fixed number of rows: one is captured for each power of two when it is first needed, and a batch runs
    in the smallest that holds it. What the rows left over compute is thrown away.
    """

    def __init__(
        self,
        trunk: nn.Module,
        name: str,
        device: torch.device,
        *,
        max_rows: int,
        channels_first: bool = True,
    ) -> None:
        """Prepare; nothing is captured yet.

        Args:
            trunk: The part behind a cut, its weights on the device and as the recipe wants them.
            name: One of ``GRAPH_RECIPES``.
            device: Where it runs.
            max_rows: Most rows of a graph. Larger batches run in slices.
            channels_first: As in ``TorchRuntime``.
        """
        self.name = name
        self._trunk = trunk
        self._recipe = GRAPH_RECIPES[name]
        self._device = device
        self._max_rows = max_rows
        self._channels_first = channels_first
        self._staging = Staging(device)
        # Replays follow one another, so all graphs may use the same memory for what lies between input and output.
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[tuple[int, torch.dtype, tuple[int, ...]], _Captured] = {}

    @torch.inference_mode()
    def run(self, features: npt.NDArray[np.generic]) -> Tensor:
        """Return the embedding of a batch. See ``Runtime``."""
        starts = range(0, len(features), self._max_rows)
        parts = [self._replay(features[start : start + self._max_rows]) for start in starts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _replay(self, rows: npt.NDArray[np.generic]) -> Tensor:
        on_device = self._staging.start(rows).take()
        bucket = bucket_of(len(rows), self._max_rows)
        key = (bucket, on_device.dtype, tuple(on_device.shape[1:]))
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(bucket, on_device)
        captured.features[: len(rows)].copy_(on_device)
        captured.graph.replay()
        return captured.embedding_BD[: len(rows)].float().cpu()

    def _capture(self, bucket: int, rows: Tensor) -> _Captured:
        with torch.cuda.device(self._device):
            features = self._static_input(bucket, rows)
            features.copy_(rows[:1].expand_as(features))
            side = torch.cuda.Stream(self._device)
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):  # libraries choose algorithms and take memory in the first runs
                for _ in range(_WARM_UP_RUNS):
                    self._trunk(features)
            torch.cuda.current_stream(self._device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                embedding_BD = self._trunk(features)
        return _Captured(graph, features, embedding_BD)

    def _static_input(self, bucket: int, rows: Tensor) -> Tensor:
        shape = (bucket, *rows.shape[1:])
        if rows.dtype == torch.uint8:
            return torch.empty(shape, dtype=torch.uint8, device=self._device)
        lies_last = len(shape) == 4 and self._channels_first
        memory_format = self._recipe.memory_format if lies_last else torch.contiguous_format
        return torch.empty(shape, dtype=self._recipe.dtype, device=self._device, memory_format=memory_format)


def bucket_of(num_rows: int, max_rows: int) -> int:
    """Return the rows of the graph that a batch runs in: the next power of two, or the most there are."""
    bucket = 1
    while bucket < num_rows:
        bucket *= 2
    return min(bucket, max_rows)


def tensorrt_trunk(trunk: nn.Module, example: Tensor, recipe: Recipe, *, max_rows: int) -> Callable[[Tensor], Tensor]:
    """Compile a trunk with TensorRT for 1 to ``max_rows`` rows. Normalisation stays in torch: it reads uint8.

    Args:
        trunk: Its weights on the device and as the recipe wants them. Belongs to the result.
        example: Two rows or more, on the device.
        recipe: How.
        max_rows: Most rows at a time.
    """
    import torch_tensorrt

    first: nn.Module = nn.Identity()
    for name, child in list(trunk.named_children()):
        if isinstance(child, nn.Sequential) and isinstance(child[0], Normalise):
            first = child
            setattr(trunk, name, nn.Identity())
    shape = tuple(first(example).shape[1:])
    rows = torch_tensorrt.Input(
        min_shape=(1, *shape), opt_shape=(max_rows, *shape), max_shape=(max_rows, *shape), dtype=recipe.dtype
    )
    engine = torch_tensorrt.compile(trunk, ir="dynamo", inputs=[rows], use_explicit_typing=True)

    def run(features: Tensor) -> Tensor:
        images = first(features)
        return torch.cat([engine(part.contiguous()) for part in images.split(max_rows)])

    return run
