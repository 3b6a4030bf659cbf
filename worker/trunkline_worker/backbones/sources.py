"""What the sources of networks have in common."""

from __future__ import annotations

import torchvision

from trunkline_worker.backbones.backbone import WeightsInfo

UNTRAINED = WeightsInfo("untrained: random numbers", pretrained=False)
"""Says that there were no weights."""


def imagenet_names() -> tuple[str, ...]:
    """Return the names of the 1000 classes of ImageNet-1k, in their usual order."""
    return tuple(torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"])
