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
from trunkline_worker.engine.runtimes import TRUNK_INPUT, are_few, to_dense

# Shape suffix legend: B = rows, D = embedding columns

_HINTS = {
    names.OPENVINO_FP32: "f32",
    names.OPENVINO_BF16: "bf16",
    names.OPENVINO_FP16: "f16",
    names.OPENVINO_FP32_ROWS: "f32",
    names.OPENVINO_BF16_ROWS: "bf16",
}
_CAPABILITIES = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}


def why_not(name: str) -> str:
    """Return why a runtime cannot be had on this machine; empty where it can."""
    if importlib.util.find_spec("openvino") is None:
        return "the package openvino is not installed"
    capability = _CAPABILITIES[_HINTS[name]]
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
        # One batch at a time on all threads: batches are made before they come here.
        self._request = _compiled(data, name, num_threads=num_threads, num_streams=1).create_infer_request()

    def run(self, features: npt.NDArray[np.generic]) -> Tensor:
        """Return the embedding of a batch. See ``Runtime``."""
        # Results are copied: the request writes the next ones to the same place.
        results = self._request.infer({TRUNK_INPUT: to_dense(features)}, share_inputs=True, share_outputs=False)
        return torch.from_numpy(results[0])


class OpenVinoRowsRuntime:
    """The same, each row by itself on one thread, as many rows side by side as there are threads.

    Few rows run as one batch: see ``OnnxRowsRuntime``.
    """

    def __init__(self, data: bytes, name: str, *, num_threads: int) -> None:
        """Load a file that ``check_onnx`` has passed."""
        import openvino

        self.name = name
        compiled = _compiled(data, name, num_threads=num_threads, num_streams=num_threads)
        self._queue = openvino.AsyncInferQueue(compiled, num_threads)
        self._num_threads = num_threads
        self._whole = OpenVinoRuntime(data, name, num_threads=num_threads)

    def run(self, features: npt.NDArray[np.generic]) -> Tensor:
        """Return the embedding of a batch. See ``Runtime``."""
        features = to_dense(features)
        if are_few(len(features), self._num_threads):
            return self._whole.run(features)
        rows: list[npt.NDArray[np.float32] | None] = [None] * len(features)

        def keep(request: Any, row: int) -> None:
            rows[row] = request.get_output_tensor(0).data.copy()

        self._queue.set_callback(keep)
        for row in range(len(features)):
            self._queue.start_async({TRUNK_INPUT: features[row : row + 1]}, row, share_inputs=True)
        self._queue.wait_all()
        return torch.from_numpy(np.concatenate([one for one in rows if one is not None]))


def _compiled(data: bytes, name: str, *, num_threads: int, num_streams: int) -> Any:
    options = {
        # Said aloud: left to itself it takes bfloat16 where the processor has it.
        "INFERENCE_PRECISION_HINT": _HINTS[name],
        "EXECUTION_MODE_HINT": "ACCURACY" if _HINTS[name] == "f32" else "PERFORMANCE",
        "PERFORMANCE_HINT": "LATENCY" if num_streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": num_streams,
        "INFERENCE_NUM_THREADS": num_threads,
        # Two replicas that pin their threads would pin them to the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    core = _core()
    return core.compile_model(core.read_model(io.BytesIO(data)), "CPU", options)
