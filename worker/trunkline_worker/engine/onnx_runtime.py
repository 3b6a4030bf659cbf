"""ONNX Runtime on the CPU, in float32.

Its threads do not spin while they wait for work. Spinning is faster by some percent as long as nothing else runs, and
that is how runtimes are measured; but beside the gateway, the event loop and other replicas, which share the cores, it
takes theirs away. So it is a decision and not something to measure.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

from trunkline_worker.backbones.export import session_options
from trunkline_worker.engine.runtime_names import ONNX_FP32
from trunkline_worker.engine.runtimes import TRUNK_INPUT, TRUNK_OUTPUT

# Shape suffix legend: B = rows, D = embedding columns


class OnnxRuntime:
    """A trunk that ``export_module`` wrote."""

    name = ONNX_FP32

    def __init__(self, data: bytes, *, num_threads: int) -> None:
        """Load a file that ``check_onnx`` has passed."""
        options = session_options(num_threads)
        self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(self, features: npt.NDArray[np.generic]) -> Tensor:
        """Return the embedding of a batch. See ``Runtime``."""
        if features.dtype == np.float16:
            features = features.astype(np.float32)
        (embedding_BD,) = self._session.run([TRUNK_OUTPUT], {TRUNK_INPUT: np.ascontiguousarray(features)})
        return torch.from_numpy(embedding_BD)
