"""Rows on their way to a GPU: through pinned memory, on a stream of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Staged:
    """Rows that are on the device, or will be. ``ready`` is when; None where they are there already."""

    rows: Tensor
    ready: torch.cuda.Event | None = None

    def take(self) -> Tensor:
        """Return the rows; what is computed on them from now on, on this thread's stream, waits until they are there.

        To be called once.
        """
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.rows.device)
            stream.wait_event(self.ready)
            # The memory belongs to the copying stream: it must not be used anew before this one is done with it.
            self.rows.record_stream(stream)
        return self.rows


@dataclass
class _Buffer:
    """Pinned memory that grows as needed, and when what was last copied out of it has left."""

    memory: Tensor
    left: torch.cuda.Event | None = None


class Staging:
    """Two pinned buffers, in turn. Used by one caller at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers = [_Buffer(torch.empty(0, dtype=torch.uint8)) for _ in range(2)]
        self._next = 0

    def start(self, rows: npt.NDArray[np.generic]) -> Staged:
        """Copy rows into pinned memory and begin to send them to the device."""
        buffer = self._buffers[self._next]
        self._next = 1 - self._next
        if buffer.left is not None:
            buffer.left.synchronize()
        if buffer.memory.nbytes < rows.nbytes:
            buffer.memory = torch.empty(rows.nbytes, dtype=torch.uint8, pin_memory=True)
        host = buffer.memory[: rows.nbytes].view(_DTYPES[rows.dtype.name]).view(rows.shape)
        np.copyto(host.numpy(), rows)
        with torch.cuda.stream(self._stream):
            on_device = host.to(self._device, non_blocking=True)
            buffer.left = self._stream.record_event()
        return Staged(on_device, buffer.left)


_DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}
