"""Outlier scores: how well digits are told from what is none, and what asking costs, through a real cluster.

A model of 600 digits is asked about other digits, and about letters, noise, digits with black and white exchanged and
generated pictures. AUROC is that of the distance; beside it stands the share that is called unusual at 0.99.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import numpy.typing as npt
import trunkline
from common import digits, embedded_cluster, report
from PIL import Image, ImageDraw, ImageFont
from sklearn.metrics import roc_auc_score
from trunkline_worker.backbones.leaves import dead_leaves

Pictures = npt.NDArray[np.uint8]

TRAINED, SHOWN = 600, 300
LETTERS = "ABCDEFGHJKLMNPQRTUVWXYZ"  # without I, O and S, which are digits as well


def letters(count: int) -> Pictures:
    """Return letters of several sizes and places, white on black, 8x8 like the digits."""
    generator = np.random.default_rng(0)
    drawn = []
    for number in range(count):
        picture = Image.new("L", (64, 64))
        place = (32 + int(generator.integers(-4, 5)), 32 + int(generator.integers(-4, 5)))
        font = ImageFont.load_default(size=int(generator.integers(44, 60)))
        ImageDraw.Draw(picture).text(place, LETTERS[number % len(LETTERS)], fill=255, font=font, anchor="mm")
        drawn.append(np.asarray(picture.rotate(float(generator.uniform(-10, 10))).resize((8, 8), Image.Resampling.BOX)))
    return np.stack(drawn)


def generated(count: int) -> Pictures:
    """Return generated pictures, grey and 8x8 like the digits."""
    small = (
        Image.fromarray(dead_leaves(one)).convert("L").resize((8, 8), Image.Resampling.BOX) for one in range(count)
    )
    return np.stack([np.asarray(one) for one in small])


def cost(model: trunkline.Model, features: npt.NDArray[np.generic], rounds: int) -> tuple[float, float]:
    """Return the median seconds of a prediction of features at hand without outlier scores and with, in turns."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * rounds + 2):
        asked = number % 2 == 1
        start = time.perf_counter()
        model.predict_features(features, outliers=asked, progress=False)
        if number >= 2:  # the first of each loads files
            times[asked].append(time.perf_counter() - start)
    return statistics.median(times[False]), statistics.median(times[True])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    pictures, labels = digits()
    order = np.random.default_rng(0).permutation(len(labels))
    chosen, new = order[:TRAINED], pictures[order[TRAINED : TRAINED + SHOWN]]
    others = {
        "letters": letters(SHOWN),
        "inverted digits": 255 - new,
        "generated pictures": generated(SHOWN),
        "noise": np.random.default_rng(1).integers(0, 256, size=new.shape, dtype=np.uint8),
    }
    table: list[tuple[str, ...]] = [("rows", 'AUROC, "auto"', "unusual", "AUROC, last layer", "unusual")]
    notes = []
    with embedded_cluster() as cluster, cluster.connect() as client:
        stem = client.stem("efficientnet_lite0", cut="blocks.2", input_size=96)
        data = client.upload(pictures[chosen], labels[chosen], name="digits", stem=stem)
        models = [
            client.train(data, name=name, embedding=name).result(progress=False)  # type: ignore[arg-type]
            for name in ("auto", "pooled")
        ]
        usual = [model.predict(new, stem=stem, outliers=True, progress=False) for model in models]
        false_alarms = [f"{float(one.unusual(0.99).mean()):.3f}" for one in usual]
        table.append(("other digits", "", false_alarms[0], "", false_alarms[1]))
        for name, rows in others.items():
            cells = []
            for model, known in zip(models, usual, strict=True):
                found = model.predict(rows, stem=stem, outliers=True, progress=False)
                assert found.outlier_distances is not None and known.outlier_distances is not None
                truth = np.repeat([0, 1], [len(known), len(found)])
                auroc = roc_auc_score(truth, np.concatenate([known.outlier_distances, found.outlier_distances]))
                cells += [f"{auroc:.4f}", f"{float(found.unusual(0.99).mean()):.3f}"]
            table.append((name, *cells))
        features = stem(new)
        for model in models:
            without, with_scores = cost(model, features, arguments.rounds)
            notes.append(
                f"{SHOWN} rows at `blocks.2`, `embedding={model.name!r}`: {without:.3f} s without, {with_scores:.3f} s "
                f"with scores, {with_scores / without:.3f} times as long (medians of {arguments.rounds}, in turns)."
            )
    notes.append(f"{TRAINED} digits to train on, a fifth of them held out; {SHOWN} rows of each kind, 8x8, at 96 px.")
    report("outliers", "Outlier scores: digits against what is none, and what asking costs", table, notes)


if __name__ == "__main__":
    main()
