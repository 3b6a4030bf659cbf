"""ONNX Runtime: whether it is there, and sessions that leave cores to others."""

from __future__ import annotations

import importlib.util
from typing import Any

from trunkline.errors import InvalidArgumentError, MissingExtraError


def check_threads(threads: int | None) -> None:
    """Check a number of threads.

    Raises:
        InvalidArgumentError: It is none.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InvalidArgumentError(f"threads is {threads!r}; expected a whole number, 1 or more")


def has_onnxruntime() -> bool:
    """Whether ONNX Runtime is installed, without loading it."""
    return importlib.util.find_spec("onnxruntime") is not None


def require_onnxruntime(what: str = "a stem") -> None:
    """Check that ONNX Runtime is installed.

    Raises:
        MissingExtraError: It is not.
    """
    if not has_onnxruntime():
        raise MissingExtraError(
            f"{what} needs ONNX Runtime, which is not installed", hint="Run: pip install 'trunkline[stem]'"
        )


def open_session(data: bytes, threads: int | None) -> Any:
    """Load a checked file. ONNX Runtime's exceptions share no base.

    Args:
        data: The file.
        threads: Threads that the network runs on. None leaves ONNX Runtime the choice.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # A thread that waits for work must not burn a core that is somebody else's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if threads is not None:
        # The calling thread counts: with 1 there is no other.
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
