"""How the networks of each family are taken apart."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models import EfficientNet, MaxVit, ResNet, SqueezeNet, VisionTransformer

from trunkline_worker.backbones.backbone import Architecture, Stage
from trunkline_worker.backbones.embedding import POOLED

# Bound to one input size: their position embeddings or partitions are laid out when they are built.
_FIXED_SIZE = (VisionTransformer, MaxVit)


def take_apart_timm_efficientnet(network: Any) -> Architecture:
    """Cut timm's EfficientNet at the end of every stage of blocks."""
    first, *blocks = network.blocks
    stages = [Stage("blocks.0", nn.Sequential(network.conv_stem, network.bn1, first))]
    stages += [Stage(f"blocks.{index}", block) for index, block in enumerate(blocks, start=1)]
    stages.append(Stage(POOLED, nn.Sequential(network.conv_head, network.bn2, network.global_pool)))
    return Architecture(tuple(stages), network.classifier, resizable=True)


def take_apart(network: nn.Module) -> Architecture:
    """Cut a torchvision classification network: at its stages where we know them, else nowhere."""
    if isinstance(network, EfficientNet):
        return _efficientnet(network)
    if isinstance(network, ResNet):
        return _resnet(network)
    if isinstance(network, SqueezeNet):
        # Its classifier is a convolution: what enters it is a feature map.
        classifier = nn.Sequential(network.classifier, nn.Flatten())
        return Architecture((Stage(POOLED, network.features),), classifier, resizable=True)
    return _uncut(network)


def _efficientnet(network: EfficientNet) -> Architecture:
    # The last convolution belongs to the last stage: `pooled` is its mean, and no cut is wanted behind it.
    *features, last = network.features
    stages = [Stage(f"features.{index}", module) for index, module in enumerate(features)]
    stages.append(Stage(POOLED, nn.Sequential(last, network.avgpool, nn.Flatten())))
    return Architecture(tuple(stages), network.classifier, resizable=True)


def _resnet(network: ResNet) -> Architecture:
    stages = [Stage("maxpool", nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool))]
    stages += [Stage(name, getattr(network, name)) for name in ("layer1", "layer2", "layer3", "layer4")]
    stages.append(Stage(POOLED, nn.Sequential(network.avgpool, nn.Flatten())))
    return Architecture(tuple(stages), network.fc, resizable=True)


def _uncut(network: nn.Module) -> Architecture:
    """Take the last linear layer off and keep the rest whole."""
    name = classifier_name(network)
    classifier = network.get_submodule(name)
    network.set_submodule(name, nn.Identity())
    return Architecture((Stage(POOLED, network),), classifier, resizable=not isinstance(network, _FIXED_SIZE))


def classifier_name(network: nn.Module) -> str:
    """Return the dotted name of the layer that gives the logits: the last linear one, else the last convolution."""
    for kind in (nn.Linear, nn.Conv2d):
        names = [name for name, module in network.named_modules() if isinstance(module, kind)]
        if names:
            return names[-1]
    raise ValueError(f"{type(network).__name__} has no linear layer and no convolution")
