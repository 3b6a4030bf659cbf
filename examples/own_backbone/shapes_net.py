"""A small residual network of one's own: nothing but torch, and a function that builds it."""

import torch
from torch import nn

# Shape suffix legend: B = rows, C = channels, H = height, W = width


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.around = nn.Conv2d(channels_in, channels, 1, stride=2)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Halve height and width."""
        return torch.relu(self.second(self.first(x_BCHW)) + self.around(x_BCHW))


class ShapesNet(nn.Module):
    """Takes (rows, 3, size, size), returns (rows, num_classes)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(Block(width, width), Block(width, 2 * width), Block(2 * width, 4 * width))
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the outputs of each row."""
        logits: torch.Tensor = self.classifier(self.blocks(self.start(x_BCHW)).mean((2, 3)))
        return logits


def build(width: int, num_classes: int) -> nn.Module:
    """Build the network, without weights: the manifest's `factory`. Its `arguments` arrive here by name."""
    return ShapesNet(width, num_classes)
