"""ONNX Runtime on the CPU, in float32.

Its threads do not spin while they wait for work. Spinning is faster by some percent as long as nothing else runs, and
that is how runtimes are measured; but beside the gateway, the event loop and other replicas, which share the cores, it
takes theirs away. So it is a decision and not something to measure.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

from trunkline_worker.backbones.export import session_options
from trunkline_worker.engine.runtime_names import ONNX_FP32, ONNX_FP32_ROWS
from trunkline_worker.engine.runtimes import TRUNK_INPUT, TRUNK_OUTPUT, are_few, to_dense

# Shape suffix legend: B = rows, D = embedding columns


class OnnxRuntime:
    """A trunk that ``export_module`` wrote."""

    name = ONNX_FP32

    def __init__(self, data: bytes, *, num_threads: int) -> None:
        """Load a file that ``check_onnx`` has passed."""
        self._session = _session(data, num_threads)

    def run(self, features: npt.NDArray[np.generic]) -> Tensor:
        """Return the embedding of a batch. See ``Runtime``."""
        return torch.from_numpy(_embedding(self._session, to_dense(features)))


class OnnxRowsRuntime:
    """The same file, each row by itself on one thread, as many rows side by side as there are threads.

    So few rows that half of the threads would idle run as one batch on all of them: that is over sooner, though it
    costs more, and nothing else waits when batches are that small.
    """

    name = ONNX_FP32_ROWS

    def __init__(self, data: bytes, *, num_threads: int) -> None:
        """Load a file that ``check_onnx`` has passed."""
        self._num_threads = num_threads
        self._rowwise = _session(data, 1)
        self._whole = _session(data, num_threads)
        self._pool = ThreadPoolExecutor(num_threads - 1, thread_name_prefix="trunkline-rows")

    def run(self, features: npt.NDArray[np.generic]) -> Tensor:
        """Return the embedding of a batch. See ``Runtime``."""
        features = to_dense(features)
        num_rows = len(features)
        if are_few(num_rows, self._num_threads):
            return torch.from_numpy(_embedding(self._whole, features))
        rows: list[npt.NDArray[np.float32] | None] = [None] * num_rows
        left = itertools.count()

        def work() -> None:
            while (row := next(left)) < num_rows:
                rows[row] = _embedding(self._rowwise, features[row : row + 1])

        helpers = [self._pool.submit(work) for _ in range(min(self._num_threads, num_rows) - 1)]
        try:
            work()
        finally:
            errors = [one.exception() for one in helpers]
        for error in errors:
            if error is not None:
                raise error
        return torch.from_numpy(np.concatenate([one for one in rows if one is not None]))

    def __del__(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False)


def _session(data: bytes, num_threads: int) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(data, session_options(num_threads), providers=["CPUExecutionProvider"])


def _embedding(session: onnxruntime.InferenceSession, features: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    (embedding_BD,) = session.run([TRUNK_OUTPUT], {TRUNK_INPUT: features})
    return embedding_BD
