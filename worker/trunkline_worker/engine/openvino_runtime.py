"""OpenVINO on the CPU, where the package is installed: the exported trunk, exact or in half precision."""

from __future__ import annotations

import functools
import importlib.util
import io
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trunkline_worker.engine import runtime_names as names
from trunkline_worker.engine.runtimes import TRUNK_INPUT

# Shape suffix legend: B = rows, D = embedding columns

_HINTS = {names.OPENVINO_FP32: "f32", names.OPENVINO_BF16: "bf16", names.OPENVINO_FP16: "f16"}
_CAPABILITIES = {names.OPENVINO_FP32: "FP32", names.OPENVINO_BF16: "BF16", names.OPENVINO_FP16: "FP16"}


def why_not(name: str) -> str:
    """Return why a runtime cannot be had on this machine; empty where it can."""
    if importlib.util.find_spec("openvino") is None:
        return "the package openvino is not installed"
    capability = _CAPABILITIES[name]
    return "" if capability in _capabilities() else f"OpenVINO does not compute in {capability} on this processor"


@functools.cache
def _capabilities() -> tuple[str, ...]:
    return tuple(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


@functools.cache
def _core() -> Any:
    import openvino  # takes a while, and not everybody has it

    return openvino.Core()


class OpenVinoRuntime:
    """A trunk that ``export_module`` wrote, compiled for any number of rows."""

    def __init__(self, data: bytes, name: str, *, num_threads: int) -> None:
        """Load a file that ``check_onnx`` has passed."""
        self.name = name
        core = _core()
        options = {
            # Said aloud: left to itself it takes bfloat16 where the processor has it.
            "INFERENCE_PRECISION_HINT": _HINTS[name],
            "EXECUTION_MODE_HINT": "ACCURACY" if name == names.OPENVINO_FP32 else "PERFORMANCE",
            # One batch at a time on all threads: batches are made before they come here.
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": num_threads,
            # Two replicas that pin their threads would pin them to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        self._request = core.compile_model(core.read_model(io.BytesIO(data)), "CPU", options).create_infer_request()

    def run(self, features: npt.NDArray[np.generic]) -> Tensor:
        """Return the embedding of a batch. See ``Runtime``."""
        if features.dtype == np.float16:
            features = features.astype(np.float32)
        # Results are copied: the request writes the next ones to the same place.
        results = self._request.infer(
            {TRUNK_INPUT: np.ascontiguousarray(features)}, share_inputs=True, share_outputs=False
        )
        return torch.from_numpy(results[0])
