"""What networks of every family have in common: the layer that gives the logits."""

from __future__ import annotations

from torch import nn


def classifier_name(network: nn.Module) -> str:
    """Return the dotted name of the layer that gives the logits: the last linear one, else the last convolution."""
    for kind in (nn.Linear, nn.Conv2d):
        names = [name for name, module in network.named_modules() if isinstance(module, kind)]
        if names:
            return names[-1]
    raise ValueError(f"{type(network).__name__} has no linear layer and no convolution")
