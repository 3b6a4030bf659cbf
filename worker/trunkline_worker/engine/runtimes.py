"""What runs a trunk, and on which device. All runtimes take numpy and give float32 torch."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError

# Shape suffix legend: B = rows, D = embedding columns

TRUNK_INPUT = "features"
TRUNK_OUTPUT = "embedding"

REFERENCE_SIZE = 224
"""Input size in pixels that numbers of rows are stated for."""

_MAX_ROWS = {"cpu": 32, "cuda": 256}
_MAX_GROWTH = 4
_MEASURED = {"cpu": (8, 32), "cuda": (32, 256)}


class Runtime(Protocol):
    """A trunk behind one cut, ready to run. Built in the thread that calls it, and called from no other."""

    @property
    def name(self) -> str:
        """What is used, such as ``torch-bf16``."""

    def run(self, features: npt.NDArray[np.generic]) -> Tensor:
        """Return the embedding of a batch.

        Shape:
            features: (B, ...) float32 or float16, or (B, H, W, 3) uint8 images; returns (B, D), float32, CPU.

        Raises:
            WireError: WORKER_OOM.
        """


def to_torch(features: npt.NDArray[np.generic]) -> Tensor:
    """Return rows as a tensor, in the same memory where torch accepts that."""
    # Rows decoded from a message share its memory and are read-only, which torch does not accept.
    if not features.flags.writeable or not features.flags.c_contiguous:
        features = features.copy(order="C")
    return torch.from_numpy(features)


def to_dense(features: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Return rows as exported trunks take them: side by side in memory, float32 in place of float16."""
    return np.ascontiguousarray(features.astype(np.float32) if features.dtype == np.float16 else features)


def are_few(num_rows: int, num_threads: int) -> bool:
    """Whether rows, each on one thread, would leave half of the threads or more without work."""
    return 2 * num_rows <= num_threads


def find_device(name: str) -> torch.device:
    """Return a device by name; ``auto`` is a GPU where there is one.

    Raises:
        WireError: INVALID_ARGUMENT for one that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WireError(
            ErrorCode.INVALID_ARGUMENT, f"{name[:40]!r} is not a device: auto, cpu, cuda, cuda:1 ..."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise WireError(
            ErrorCode.INVALID_ARGUMENT, f"there is no {name}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware. Elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _cpu_has("avx512_bf16", "amx_bf16", "bf16")


def has_fast_fp16(device: torch.device) -> bool:
    """Whether a device multiplies float16 in hardware."""
    return device.type == "cuda" or _cpu_has("avx512_fp16", "amx_fp16", "fp16_arith")


def _cpu_has(*capabilities: str) -> bool:
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return False
    found = torch.cpu.get_capabilities()
    return any(bool(found.get(one)) for one in capabilities)


def max_rows_of(device: torch.device) -> int:
    """Return the most rows of ``REFERENCE_SIZE`` pixels in a batch where nobody says otherwise."""
    return _MAX_ROWS.get(device.type, _MAX_ROWS["cpu"])


def rows_at(rows: int, input_size: int) -> int:
    """Scale the rows of a batch so that its pixels stay the same, within bounds.

    Args:
        rows: At ``REFERENCE_SIZE`` pixels.
        input_size: Of the rows, in pixels.
    """
    scaled = int(rows * (REFERENCE_SIZE / input_size) ** 2)
    return min(max(scaled, 1), _MAX_GROWTH * rows)


def batch_sizes(device: torch.device, most_rows: int, input_size: int) -> tuple[int, ...]:
    """Return the rows of a batch at which runtimes are measured, rising.

    Args:
        device: Where they run.
        most_rows: Most rows of ``REFERENCE_SIZE`` pixels that a batch may have.
        input_size: Of the rows, in pixels.
    """
    sizes = {rows_at(one, input_size) for one in (*_MEASURED.get(device.type, _MEASURED["cpu"]), most_rows)}
    return tuple(sorted({1, *(one for one in sizes if one <= rows_at(most_rows, input_size))}))
