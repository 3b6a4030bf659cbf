"""What changed views and mixup gain on few labelled pictures, draw by draw.

In this process, without a cluster: digits at 96 pixels through the built-in backbone, 20 labelled pictures a class, all
the others to measure on, alone or as the mean over views of theirs. Views are made as ``client.upload`` makes them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import trunkline
from common import digits, report
from trunkline._views import with_views
from trunkline.images import pictures
from trunkline_wire.fits import OptimiserConfig
from trunkline_wire.heads import MLP, HeadConfig
from trunkline_wire.specs import INPUT_CUT, SliceSpec
from trunkline_worker.backbones.catalogue import DEFAULT_BACKBONE, load_backbone
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.loop import Labels, Source, train_head

# Shape suffix legend: N = pictures, V = views, D = columns of the embedding, K = classes

INPUT_SIZE = 96
PER_CLASS = 20
VIEWS = 4
AUGMENT = trunkline.Augment(flip=0, rotate=10)
_MLP = {"head": HeadConfig(MLP, (128,)), "solver": "adamw", "epochs": 40}
HEADS = {"linear": {}, "MLP": _MLP, "MLP, mixup 0.2": {**_MLP, "optimiser": OptimiserConfig(mixup=0.2)}}


def embed(count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], tuple[SliceSpec, ...]]:
    """Return the embedding of the first digits and their views, (N, V, D), the labels, and the slices."""
    images, labels = (one[:count] for one in digits())
    backbone = load_backbone(DEFAULT_BACKBONE)
    spec = backbone.describe(INPUT_SIZE)
    rows = with_views(pictures(images), VIEWS, AUGMENT, 0)
    trunk = backbone.trunk(INPUT_CUT)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            pixels = np.stack([one.preprocessed(spec.preprocessing) for one in rows[start : start + 64]])
            parts.append(trunk(torch.from_numpy(pixels)).float())
    return torch.cat(parts).numpy().reshape(len(images), VIEWS, -1), labels, spec.slices


def accuracies(
    embedding_NVD: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    slices: Sequence[SliceSpec],
    draw: int,
    views: int,
    embedding: str,
    changes: dict[str, object],
) -> tuple[float, float]:
    """Train on one draw, and return the accuracy on the others: of the pictures alone, and of the mean over views."""
    order = np.random.default_rng(draw).permutation(len(labels))
    labelled = np.concatenate([order[labels[order] == one][:PER_CLASS] for one in range(10)])
    rest = np.setdiff1d(order, labelled)
    rows_ND = embedding_NVD[labelled, :views].reshape(len(labelled) * views, -1)
    spec = JobSpec("m", "d", DEFAULT_BACKBONE, INPUT_SIZE, embedding=embedding, seed=draw, **changes)  # type: ignore[arg-type]
    head = train_head(
        [Source("b", rows_ND, tuple(slices))],
        Labels(tuple("0123456789"), labels[labelled].repeat(views)),
        spec,
        num_views=views,
        on_event=lambda event: None,
        should_stop=lambda: False,
    ).head
    columns = np.concatenate([np.arange(one.start, one.stop) for one in slices if one.name in head.slices])
    said_NVK = head.predict(torch.from_numpy(embedding_NVD[rest][:, :, columns].reshape(len(rest) * VIEWS, -1)))
    said_NVK = said_NVK.reshape(len(rest), VIEWS, -1).numpy()
    alone, mean = said_NVK[:, 0].argmax(axis=1), said_NVK.mean(axis=1).argmax(axis=1)
    return float((alone == labels[rest]).mean()), float((mean == labels[rest]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=1797)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    embedding_NVD, labels, slices = embed(arguments.pictures)
    table: list[tuple[str, ...]] = [
        (
            *("embedding", "head", "views to train on", "pictures alone: mean (least to most)"),
            *("gain over 1 view", "better in", f"mean over {VIEWS} views"),
        )
    ]
    for (name, changes), embedding in itertools.product(HEADS.items(), ("pooled", "auto")):
        first: list[float] = []
        for views in (1, VIEWS):
            pairs = [
                accuracies(embedding_NVD, labels, slices, draw, views, embedding, changes)
                for draw in range(arguments.draws)
            ]
            alone, mean = [one for one, _ in pairs], [one for _, one in pairs]
            first = first or alone
            gains = [one - other for one, other in zip(alone, first, strict=True)]
            table.append(
                (
                    *(embedding, name, str(views)),
                    f"{statistics.mean(alone):.4f} ({min(alone):.4f} to {max(alone):.4f})",
                    f"{statistics.mean(gains):+.4f}" if views > 1 else "-",
                    f"{sum(one > 0 for one in gains)} of {len(gains)} draws" if views > 1 else "-",
                    f"{statistics.mean(mean):.4f}",
                )
            )
            print(*table[-1], sep=" | ", flush=True)
    report(
        "views",
        f"Views and mixup: {len(labels)} digits, {PER_CLASS} a class, {arguments.draws} draws, accuracy on all others",
        table,
        [
            f"Draw N takes numpy's default_rng(N). {VIEWS} views: the picture and {VIEWS - 1} made by {AUGMENT}.",
            "The mean over views: of the probabilities, with the same changes, however the head was trained.",
        ],
    )


if __name__ == "__main__":
    main()
