"""Runtimes by name: which of them this machine has, and how each is made."""

from __future__ import annotations

import re
from importlib import metadata

import torch
from trunkline_wire.errors import WireError
from trunkline_wire.specs import CutSpec

from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.engine import cuda_runtimes, openvino_runtime
from trunkline_worker.engine import runtime_names as names
from trunkline_worker.engine.cuda_runtimes import GRAPH_RECIPES, TENSORRT_RECIPES, CudaGraphRuntime
from trunkline_worker.engine.onnx_runtime import OnnxRowsRuntime, OnnxRuntime
from trunkline_worker.engine.openvino_runtime import OpenVinoRowsRuntime, OpenVinoRuntime
from trunkline_worker.engine.runtimes import Runtime, has_fast_bf16, has_fast_fp16, rows_at
from trunkline_worker.engine.torch_runtimes import RECIPES, Recipe, TorchRuntime, Weights, torch_runtime

LIBRARIES = ("onnxruntime", "openvino", "torch", "torch_tensorrt")

_PATH = re.compile(r"(?:/[\w.+@-]+){2,}/?")
_REASON_CHARS = 200


class Builder:
    """Makes runtimes of one backbone on one device, in the thread that will run them."""

    def __init__(
        self, placed: Backbone, *, device: torch.device, num_threads: int, most_rows: int, use_onnx: bool = True
    ) -> None:
        """Prepare.

        Args:
            placed: On the device.
            device: Where trunks run.
            num_threads: Of the CPU, for one batch.
            most_rows: Most rows of 224 px in a batch.
            use_onnx: Whether to use what reads an exported trunk.
        """
        self._placed = placed
        self._device = device
        self._num_threads = num_threads
        self._most_rows = most_rows
        self._use_onnx = use_onnx
        self._weights = Weights()

    def why_not(self, name: str) -> str:
        """Return why a runtime cannot be had on this machine, whatever the trunk; empty where it may work."""
        on_cuda = self._device.type == "cuda"
        if name in names.FROM_ONNX:
            if on_cuda:
                return "it runs on the CPU only"
            if not self._use_onnx:
                return "runtimes that need an export are switched off"
            if name in names.ROWWISE and self._num_threads == 1:
                return "there is one thread: rows cannot run side by side"
            return "" if name in (names.ONNX_FP32, names.ONNX_FP32_ROWS) else openvino_runtime.why_not(name)
        if name in GRAPH_RECIPES or name in TENSORRT_RECIPES:
            if not on_cuda:
                return "it runs on CUDA only"
            if name in TENSORRT_RECIPES:
                return cuda_runtimes.why_no_tensorrt()
        recipe = _recipe(name)
        precisions = {recipe.dtype, recipe.autocast}
        if torch.bfloat16 in precisions and not has_fast_bf16(self._device):
            return "this processor only emulates bfloat16"
        if torch.float16 in precisions and not has_fast_fp16(self._device):
            return "this processor only emulates float16"
        return ""

    def build(self, name: str, cut: CutSpec, input_size: int, whole: str = "", onnx: bytes | None = None) -> Runtime:
        """Make a runtime.

        Args:
            name: Which; one that ``why_not`` says nothing against.
            cut: Where the features enter.
            input_size: Of the rows, in pixels.
            whole: The slice that the trunk ends in, if not in the embedding. See ``Backbone.trunk``.
            onnx: The exported trunk, for those that read it.

        Raises:
            Exception: Whatever its library raises.
        """
        if name in names.FROM_ONNX:
            assert onnx is not None
            if name == names.ONNX_FP32:
                return OnnxRuntime(onnx, num_threads=self._num_threads)
            if name == names.ONNX_FP32_ROWS:
                return OnnxRowsRuntime(onnx, num_threads=self._num_threads)
            make = OpenVinoRowsRuntime if name in names.ROWWISE else OpenVinoRuntime
            return make(onnx, name, num_threads=self._num_threads)
        if name in RECIPES:
            return torch_runtime(self._placed, cut, name, self._device, whole=whole, weights=self._weights)
        channels_first = cut.channel_axis == 0
        recipe, max_rows = _recipe(name), rows_at(self._most_rows, input_size)
        trunk = self._weights.converted(self._placed.trunk(cut.name, whole), recipe)
        if name in GRAPH_RECIPES:
            return CudaGraphRuntime(trunk, name, self._device, max_rows=max_rows, channels_first=channels_first)
        is_picture = cut.channel_axis == 2 and len(cut.feature_shape) == 3 and cut.name == "input"
        example = torch.zeros(
            (2, *cut.feature_shape), dtype=torch.uint8 if is_picture else recipe.dtype, device=self._device
        )
        compiled = cuda_runtimes.tensorrt_trunk(trunk, example, recipe, max_rows=max_rows)
        return TorchRuntime(compiled, name, self._device, recipe=recipe, channels_first=channels_first)


def _recipe(name: str) -> Recipe:
    return {**RECIPES, **GRAPH_RECIPES, **TENSORRT_RECIPES}[name]


def libraries() -> tuple[tuple[str, str], ...]:
    """Return the libraries that runtimes are made of, as far as they are installed, and their versions."""
    found = []
    for name in LIBRARIES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)


def reason_of(error: BaseException) -> str:
    """Return in one line why a runtime cannot be used, without paths of this machine: users see it."""
    text = error.message if isinstance(error, WireError) else str(error)
    line = next((one.strip() for one in text.splitlines() if one.strip()), "")
    line = _PATH.sub("...", line)[:_REASON_CHARS]
    return line if isinstance(error, WireError) else f"{type(error).__name__}: {line}".rstrip(": ")
