"""What ``embedding="auto"`` gains over the last layer, draw by draw, and what its search costs.

In this process, without a cluster: digits at 96 pixels through the built-in backbone, a few labelled pictures a class,
all the others to measure on. Two made-up embeddings of 2,000 rows show the cost alone: one of the backbone's own width,
one of a network with twelve taps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from common import digits, report
from trunkline_wire.preprocess import image_from_array, preprocess_image
from trunkline_wire.specs import INPUT_CUT, SliceSpec
from trunkline_worker.backbones.catalogue import DEFAULT_BACKBONE, load_backbone
from trunkline_worker.store.records import Event, JobSpec
from trunkline_worker.training.loop import Labels, Source, TrainingResult, train_head

# Shape suffix legend: N = rows, D = columns of the embedding

INPUT_SIZE = 96
PER_CLASS = (5, 20, 50)
WIDE_CHANNELS = (64, 64, 128, 128, 256, 256, 384, 384, 512, 512, 640, 640)
SYNTHETIC_ROWS = 2000
SYNTHETIC_L2 = 1000.0
MOST_OFTEN = 3
"""Slices that the table names per setting."""


@dataclass(frozen=True)
class Run:
    """One training: its result, and seconds spent on choosing slices, on choosing the L2 strength, and in all."""

    result: TrainingResult
    select_s: float
    l2_s: float
    total_s: float


@dataclass(frozen=True)
class Cost:
    """Medians, in seconds: the search, the search with the L2 strength chosen too, and a fit with nothing to choose."""

    search_s: float
    search_l2_s: float
    fit_s: float

    def cells(self) -> tuple[str, ...]:
        """Return the table's last columns."""
        return (
            f"{1e3 * self.search_s:.0f}",
            f"{1e3 * self.fit_s:.0f}",
            f"{self.search_s / self.fit_s:.2f}",
            f"{self.search_l2_s / self.fit_s:.2f}",
        )


def embed() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], tuple[SliceSpec, ...]]:
    """Return the embedding of every digit, the labels, and the slices."""
    pictures, labels = digits()
    backbone = load_backbone(DEFAULT_BACKBONE)
    spec = backbone.describe(INPUT_SIZE)
    images = np.stack([preprocess_image(image_from_array(one), spec.preprocessing) for one in pictures])
    trunk = backbone.trunk(INPUT_CUT)
    with torch.inference_mode():
        embedding_ND = torch.cat([trunk(portion) for portion in torch.from_numpy(images).split(64)]).float()
    return embedding_ND.numpy(), labels, spec.slices


def layout(channels: Sequence[int], pooled: int) -> tuple[SliceSpec, ...]:
    """Return the slices of a network with a tap per entry of ``channels``."""
    slices, start = [], 0
    for tap, count in enumerate(channels):
        for kind, cells in (("mean", 1), ("std", 1), ("grid", 4)):
            slices.append(SliceSpec(f"stage{tap}.{kind}", start, start + cells * count))
            start += cells * count
    return (*slices, SliceSpec("pooled", start, start + pooled))


def made_up(slices: Sequence[SliceSpec]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return rows of ten classes: noise, in which every slice shows something of what tells the classes apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(SYNTHETIC_ROWS) % 10
    latent = rng.normal(size=(10, 24))[labels] + rng.normal(size=(SYNTHETIC_ROWS, 24))
    embedding_ND = rng.standard_normal(size=(SYNTHETIC_ROWS, slices[-1].stop), dtype=np.float32)
    for one in slices:
        embedding_ND[:, one.start : one.stop] += (0.06 * latent @ rng.normal(size=(24, one.width))).astype(np.float32)
    return embedding_ND, labels


def train(
    embedding_ND: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    slices: Sequence[SliceSpec],
    seed: int,
    *,
    embedding: str = "auto",
    chosen: tuple[str, ...] = (),
    l2: float = -1.0,
) -> Run:
    """Train a head and look at the clock when a phase begins or ends."""
    spec = JobSpec("m", "d", DEFAULT_BACKBONE, INPUT_SIZE, embedding=embedding, slices=chosen, l2=l2, seed=seed)
    seen: dict[str, list[float]] = {}

    def on_event(event: Event) -> None:
        seen.setdefault(event.phase, []).append(time.perf_counter())

    names = tuple(str(one) for one in range(int(labels.max()) + 1))
    started = time.perf_counter()
    result = train_head(
        [Source("b", embedding_ND, tuple(slices))],
        Labels(names, labels),
        spec,
        on_event=on_event,
        should_stop=lambda: False,
    )
    total_s = time.perf_counter() - started
    select = seen.get("select", [started])
    return Run(result, select[-1] - select[0], seen["fit"][0] - select[-1], total_s)


def accuracy(
    run: Run, embedding_ND: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], slices: Sequence[SliceSpec]
) -> float:
    """Return the fraction of rows that a head gets right."""
    head = run.result.head
    columns_ND = np.concatenate(
        [embedding_ND[:, one.start : one.stop] for one in slices if one.name in head.slices], axis=1
    )
    return float((head.predict(torch.from_numpy(columns_ND)).argmax(dim=1).numpy() == labels).mean())


def measure(
    embedding_ND: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    slices: Sequence[SliceSpec],
    rounds: int,
    *,
    l2: float = -1.0,
) -> Cost:
    """Time the search, and one fit of what it chose, in turn.

    Args:
        embedding_ND: Rows to train on.
        labels: Their classes.
        slices: Which columns are which.
        rounds: Times to do so.
        l2: Of the fit; below 0: what is chosen in the first place.
    """
    searches, searches_l2, fits = [], [], []
    first = train(embedding_ND, labels, slices, 0)
    strength = l2 if l2 >= 0 else first.result.metrics["l2"]
    for _ in range(rounds):
        chosen = train(embedding_ND, labels, slices, 0)
        fixed = train(embedding_ND, labels, slices, 0, embedding="slices", chosen=first.result.head.slices, l2=strength)
        searches.append(chosen.select_s)
        searches_l2.append(chosen.select_s + chosen.l2_s)
        fits.append(fixed.total_s)
    return Cost(statistics.median(searches), statistics.median(searches_l2), statistics.median(fits))


def spread(scores: Sequence[float]) -> str:
    """Return mean, least and most."""
    return f"{statistics.mean(scores):.4f} ({min(scores):.4f} to {max(scores):.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    embedding_ND, labels, slices = embed()
    table: list[tuple[str, ...]] = [
        (
            "rows to train on",
            "auto: mean (least to most)",
            "pooled: mean (least to most)",
            "gain, mean",
            "gain, worst draw",
            "chosen most often",
            "search, ms",
            "one fit, ms",
            "search / fit",
            "search and L2 / fit",
        )
    ]
    for per_class in PER_CLASS:
        auto, pooled, often = [], [], Counter[str]()
        for draw in range(arguments.draws):
            rng = np.random.default_rng(draw)
            picked = np.concatenate(
                [rng.permutation(np.flatnonzero(labels == digit))[:per_class] for digit in range(10)]
            )
            rest = np.setdiff1d(np.arange(len(labels)), picked)
            for scores, kind in ((auto, "auto"), (pooled, "pooled")):
                run = train(embedding_ND[picked], labels[picked], slices, draw, embedding=kind)
                scores.append(accuracy(run, embedding_ND[rest], labels[rest], slices))
                if kind == "auto":
                    often.update(run.result.head.slices)
            if draw == 0:
                cost = measure(embedding_ND[picked], labels[picked], slices, arguments.rounds)
        gains = [one - other for one, other in zip(auto, pooled, strict=True)]
        table.append(
            (
                f"digits, {per_class} a class",
                spread(auto),
                spread(pooled),
                f"{statistics.mean(gains):+.4f}",
                f"{min(gains):+.4f}",
                ", ".join(f"{name} ({count})" for name, count in often.most_common(MOST_OFTEN)),
                *cost.cells(),
            )
        )
    for these in (slices, layout(WIDE_CHANNELS, 1280)):
        rows_ND, classes = made_up(these)
        cost = measure(rows_ND, classes, these, max(1, arguments.rounds // 2), l2=SYNTHETIC_L2)
        columns = f"{these[-1].stop:,} columns in {len(these)} slices"
        table.append((f"made up, {SYNTHETIC_ROWS:,} rows, {columns}", *["-"] * 5, *cost.cells()))
    report(
        "embedding_auto",
        f"Slices chosen or the last layer: digits, {arguments.draws} draws each, accuracy on all other rows",
        table,
        [
            "Draw N takes numpy's default_rng(N). In brackets behind a slice: in how many draws it was chosen.",
            'One fit: training with embedding="slices", the slices of the search and L2 given. It fits the training '
            "split, then all rows.",
            f"Search: all candidates of both rounds, on the rows of draw 0. Medians; threads: {arguments.threads}.",
        ],
    )


if __name__ == "__main__":
    main()
