"""The real thing, small: digits through the built-in backbone, a few labelled images per class."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from trunkline_wire.preprocess import image_from_array, preprocess_image
from trunkline_wire.specs import INPUT_CUT, SliceSpec
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.loop import Labels, Source, train_head

INPUT_SIZE = 96
PIXELS = (SliceSpec("pooled", 0, 64),)


Embedded = tuple[np.ndarray, tuple[SliceSpec, ...]]


@pytest.fixture(scope="module")
def embedded() -> Embedded:
    """Return the embedding of every digit, and its slices."""
    backbone = load_backbone("efficientnet_lite0")
    spec = backbone.describe(INPUT_SIZE)
    pictures = (load_digits().images * (255 / 16)).round().astype(np.uint8)
    images = np.stack([preprocess_image(image_from_array(one), spec.preprocessing) for one in pictures])
    trunk = backbone.trunk(INPUT_CUT)
    with torch.inference_mode():
        embedding = torch.cat([trunk(portion) for portion in torch.from_numpy(images).split(64)]).float().numpy()
    assert embedding.shape == (len(pictures), spec.slices[-1].stop)
    return embedding, spec.slices


@pytest.mark.slow
@pytest.mark.parametrize(("per_class", "at_least", "above_pixels"), [(5, 0.88, 0.08), (20, 0.965, 0.03)])
def test_auto_beats_raw_pixels_and_the_last_layer_on_digits(
    embedded: Embedded, per_class: int, at_least: float, above_pixels: float
) -> None:
    digits = load_digits()
    embedding, all_slices = embedded
    scores: dict[str, list[float]] = {"auto": [], "pooled": [], "pixels": []}
    for seed in range(5):
        draw = np.random.default_rng(seed)
        order = draw.permutation(len(embedding))
        labelled = np.concatenate([order[digits.target[order] == one][:per_class] for one in range(10)])
        rest = np.setdiff1d(order, labelled)
        labels = Labels(tuple("0123456789"), digits.target[labelled])
        pixels = digits.data.astype(np.float32)
        for name, rows, slices in (
            ("auto", embedding, all_slices),
            ("pooled", embedding, all_slices),
            ("pixels", pixels, PIXELS),
        ):
            job = JobSpec("m", "d", "b", INPUT_SIZE, embedding="auto" if name == "auto" else "pooled", seed=seed)
            head = train_head(
                [Source("b", rows[labelled], slices)],
                labels,
                job,
                on_event=lambda event: None,
                should_stop=lambda: False,
            ).head
            columns = np.concatenate([np.arange(one.start, one.stop) for one in slices if one.name in head.slices])
            answer = head.predict(torch.from_numpy(rows[rest][:, columns])).argmax(dim=1).numpy()
            scores[name].append(float((answer == digits.target[rest]).mean()))
    auto, pooled, raw = (float(np.mean(scores[name])) for name in ("auto", "pooled", "pixels"))
    assert auto >= at_least, scores
    assert auto >= raw + above_pixels, scores
    assert auto >= pooled + 0.08, scores
    assert all(one >= other - 0.005 for one, other in zip(scores["auto"], scores["pooled"], strict=True)), scores
