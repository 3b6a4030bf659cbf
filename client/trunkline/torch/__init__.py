"""For those who use torch themselves: a remote trunk one can train through, bottlenecks that are learned, and views."""

from __future__ import annotations

from trunkline.errors import MissingExtraError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise MissingExtraError(
        "trunkline.torch needs torch, which is not installed", hint="Run: pip install 'trunkline[torch]'"
    ) from error

from trunkline.torch.augment import from_torchvision
from trunkline.torch.bottleneck import Bottleneck, ChannelLinear
from trunkline.torch.fit import FittedBottleneck, fit_bottleneck
from trunkline.torch.remote_trunk import RemoteTrunk

__all__ = ["Bottleneck", "ChannelLinear", "FittedBottleneck", "RemoteTrunk", "fit_bottleneck", "from_torchvision"]
