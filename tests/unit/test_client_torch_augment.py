"""Transforms of torchvision as makers of views."""

import numpy as np
import pytest
import torch
import trunkline
import trunkline.torch
from PIL import Image
from torchvision.transforms import v2
from trunkline._views import with_views
from trunkline.images import pictures

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3)).astype(np.uint8))
TRANSFORM = v2.Compose([v2.RandomResizedCrop(24), v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3)])


def views_of(transform, seed=0):
    rows = with_views(pictures([IMAGE]), 4, trunkline.torch.from_torchvision(transform), seed)
    return [np.asarray(one.decoded()) for one in rows[1:]]


def test_equal_views_come_out_equal_and_others_differ():
    first, again, other = views_of(TRANSFORM), views_of(TRANSFORM), views_of(TRANSFORM, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({one.tobytes() for one in [*first, *other]}) == 6
    assert first[0].shape == (24, 24, 3)


def test_torchs_own_generator_is_left_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    views_of(TRANSFORM)
    assert torch.equal(torch.rand(3), expected)


def test_pictures_may_come_out_as_tensors_of_bytes():
    as_tensors = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.PILToTensor()])
    assert np.array_equal(views_of(as_tensors)[0], np.asarray(IMAGE)[:, ::-1])
    with pytest.raises(trunkline.InvalidArgumentError, match=r"float32 and shape \(3, 40, 30\)") as caught:
        views_of(v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]))
    assert "Normalize" in caught.value.hint
    with pytest.raises(trunkline.InvalidArgumentError, match="augment returned a NoneType, which is no picture"):
        views_of(lambda image: None)
    with pytest.raises(trunkline.InvalidArgumentError, match="transform is a str"):
        trunkline.torch.from_torchvision("flip")
