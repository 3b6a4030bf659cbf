"""What is added to frozen weights, of low rank, so that little has to be trained and kept.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". Of a 1x1 convolution, which is a linear
layer at every place, as of a linear layer. Written with torch's parametrizations: layers keep their classes and names,
so that a traced graph stays true.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_WEIGHT = "weight"


class LowRank(nn.Module):
    """Adds ``up @ down`` to a weight. ``up`` starts at zero: nothing changes before the first step.

    Shape:
        weight: (O, I), or (O, I, 1, 1); returns the same.
    """

    def __init__(self, outputs: int, inputs: int, rank: int) -> None:
        """Make the factors; ``draw`` sets the first of them."""
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def draw(self, generator: torch.Generator) -> None:
        """Draw ``down`` as a layer is drawn that keeps the variance."""
        bound = math.sqrt(3.0 / self.down.shape[1])
        with torch.no_grad():
            self.down.copy_(torch.rand(self.down.shape, generator=generator).mul_(2 * bound).sub_(bound))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum."""
        return weight + (self.up @ self.down).view_as(weight)


def takes_lora(module: nn.Module) -> bool:
    """Whether a layer is linear at every place: a linear layer, or a 1x1 convolution of all channels."""
    if isinstance(module, nn.Linear):
        return True
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


def add_lora(network: nn.Module, rank: int) -> list[LowRank]:
    """Add factors to every layer that takes them, of at most that rank, and return them by depth."""
    added = []
    for module in list(network.modules()):
        if takes_lora(module):
            weight = getattr(module, _WEIGHT)
            outputs, inputs = weight.shape[:2]
            one = LowRank(outputs, inputs, min(rank, outputs, inputs)).to(weight.device)
            parametrize.register_parametrization(module, _WEIGHT, one)
            added.append(one)
    return added


def merge_lora(network: nn.Module) -> None:
    """Put the sums in the weights' place: nothing is left to be added at every call."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module, _WEIGHT):
            parametrize.remove_parametrizations(module, _WEIGHT, leave_parametrized=True)
