"""Transforms of torchvision as makers of views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from trunkline.errors import InvalidArgumentError


def from_torchvision(transform: Callable[[Any], Any]) -> Callable[[Image.Image, np.random.Generator], Image.Image]:
    """Return a transform as ``augment`` takes it: ``client.upload(..., views=4, augment=from_torchvision(transform))``.

    What it draws from torch's generator is drawn from the view's instead, so that equal views come out equal; the
    generator itself is left as it was. What a transform draws elsewhere is not.

    Args:
        transform: Of ``torchvision.transforms.v2``, alone or composed. Takes a picture and returns one, or a uint8
            tensor of (3, H, W): leave out what turns it into floats or normalises it.

    Raises:
        InvalidArgumentError: It cannot be called.
    """
    if not callable(transform):
        raise InvalidArgumentError(f"transform is a {type(transform).__name__}; expected one of torchvision.transforms")

    def augment(image: Image.Image, random: np.random.Generator) -> Image.Image:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(random.integers(2**63)))
            view = transform(image)
        if isinstance(view, torch.Tensor):
            return _picture(view)
        made: Image.Image = view  # whoever asked for the view checks that it is one
        return made

    return augment


def _picture(view_CHW: torch.Tensor) -> Image.Image:
    if view_CHW.dtype != torch.uint8 or view_CHW.ndim != 3 or view_CHW.shape[0] != 3:
        raise InvalidArgumentError(
            f"the transform returned a {view_CHW.dtype} and shape {tuple(view_CHW.shape)}; a picture is uint8",
            hint="Leave ToDtype and Normalize out: the backbone's preprocessing does that",
        )
    return Image.fromarray(view_CHW.permute(1, 2, 0).contiguous().cpu().numpy())
