"""Workers that learn together: one alone, or several whose gradients are averaged."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Team(Protocol):
    """The workers of a run, seen from one of them.

    Attributes:
        rank: Which one this is, from 0.
        size: How many there are.
        device: Where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    def wrap(self, module: nn.Module, *, share_buffers: bool) -> nn.Module:
        """Return the module so that gradients are averaged over the workers, which all start from the first one's."""

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over the workers."""


class Alone:
    """The only worker."""

    rank = 0
    size = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Compute on a device."""
        self.device = torch.device(device)

    def wrap(self, module: nn.Module, *, share_buffers: bool) -> nn.Module:
        """Return the module as it is."""
        return module

    def total(self, value: Tensor) -> Tensor:
        """Return the value."""
        return value


class TorchTeam:
    """Workers in a process group of torch's, which must have been set up."""

    def __init__(self, device: torch.device | str) -> None:
        """Compute on a device."""
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()
        self.device = torch.device(device)

    def wrap(self, module: nn.Module, *, share_buffers: bool) -> nn.Module:
        """Wrap it in torch's own. With ``share_buffers`` all have those of the first one."""
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=share_buffers)

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over the workers."""
        value = value.to(self.device).clone()
        torch.distributed.all_reduce(value)
        return value
