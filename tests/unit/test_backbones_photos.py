"""The built-in weights see what is in a photograph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights
from trunkline_wire.preprocess import preprocess_image
from trunkline_worker.backbones.catalogue import load_backbone

datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)  # beside other processes a pool of spinning threads is slower than one


@torch.inference_mode()
def test_the_photographs_of_scikit_learn_are_recognised() -> None:
    backbone = load_backbone("efficientnet_lite0")
    photographs = datasets.load_sample_images().images  # a Chinese temple, a flower
    images = np.stack([preprocess_image(Image.fromarray(one), backbone.preprocessing) for one in photographs])
    probabilities = backbone.whole()(torch.from_numpy(images)).softmax(1)
    names = ResNet18_Weights.DEFAULT.meta["categories"]
    top = [[names[index] for index in row.topk(5).indices] for row in probabilities]
    assert top[0][0] == "palace"
    assert top[1][0] == "daisy"
