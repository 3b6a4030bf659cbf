"""Backbones of a few hundred numbers, untrained: features of every rank, and some that overflow."""

import itertools
from collections import OrderedDict

import torch
from torch import nn
from trunkline_wire.specs import Preprocessing
from trunkline_worker.backbones.backbone import Backbone, WeightsInfo, sha256_of
from trunkline_worker.backbones.samples import BUNDLED

SIZE = 32


class _Places(nn.Module):
    """Rows of (C, H, W), then (H, W, C), then (T, C), then one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(4)))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.norm(self.patch(x).permute(0, 2, 3, 1)))
        return self.head(x.flatten(1, 2).mean(1))


class _Large(nn.Module):
    """Features beyond what float16 holds at ``first``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2)
        self.shrink = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, 3, 2)
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            self.first.weight *= 1e7
            self.shrink.running_var.fill_(1e12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.shrink(self.first(x)).relu()).relu()
        return self.head(x.mean((2, 3)))


class _Deep(nn.Sequential):
    """Ends, at its own input size, in a map of one place."""

    def __init__(self) -> None:
        sides = [3, 8, 8, 8, 8, 8]
        layers = [nn.Conv2d(inside, outside, 3, 2, 1) for inside, outside in itertools.pairwise(sides)]
        names = ["first", "second", "third", "fourth", "last"]
        super().__init__(OrderedDict(zip(names, layers, strict=True)))
        self.mean, self.flat, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)


class Tokens(nn.Module):
    """A vision transformer in small, which reads its class token: 17 tokens at ``patch`` and behind each layer."""

    def __init__(self, width: int = 16, num_layers: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.patch = nn.Identity()
        options = {"dim_feedforward": 32, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.layers = nn.Sequential(*(nn.TransformerEncoderLayer(width, 2, **options) for _ in range(num_layers)))
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.head(self.layers(self.patch(x))[:, 0])


def small_backbone(kind: str = "places", samples=BUNDLED) -> Backbone:
    """Make one: ``places`` (``patch``, ``norm``, ``blocks.3``, ``flatten``, ``mean`` ...), ``large``, ``deep`` or
    ``tokens`` (``layers.0`` to ``layers.3``).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = {"places": _Places, "large": _Large, "deep": _Deep, "tokens": Tokens}[kind]()
    preprocessing = Preprocessing(SIZE, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    info = WeightsInfo("random", pretrained=False)
    return Backbone(kind, network, preprocessing, info, sha256_of(network), samples=samples)
