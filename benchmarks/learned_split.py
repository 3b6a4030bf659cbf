"""When does a learned split beat sending the JPEG? Accuracy against bytes a picture, on real pictures of 96 px.

Every way brings the same pictures to the cluster: as JPEG files, as features at two cuts, and as the codes of
bottlenecks that are fitted at these cuts to unlabelled pictures. Heads are trained on what arrives, as a job trains
them, and measured on what arrives.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import trunkline
from common import RESULTS, digits, embedded_cluster, machine
from PIL import Image
from plots import Series, scatter
from trunkline.torch import fit_bottleneck
from trunkline_wire.preprocess import decode_image, preprocess_image
from trunkline_wire.quantise import row_bytes
from trunkline_wire.specs import BackboneSpec, SliceSpec
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.loop import Labels, Source, train_head

# Shape suffix legend: N = pictures, H = height, W = width, C = channels, D = embedding columns

BACKBONE = "efficientnet_lite0"
SIZE = 96
CUTS = ("blocks.2", "blocks.4")
CODECS = ("int8", "int4")
WIDTHS = (2, 4, 8, 16)
QUALITIES = (95, 75, 50, 25, 10, 5)
SMALL_SIZE = 48
SMALL_QUALITIES = (75, 50, 25, 10)
LEARNING_RATE = 2e-2
"""Ten times the default: in so few steps it brings the loss lower."""

SCALE_BYTES = 8
"""What int8 and int4 add to a row for each channel."""

BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096)
LEVEL = 0.01
"""A smaller difference between accuracies is none: another draw of some hundred test pictures moves them as much."""

PHOTOGRAPH_SIDE = 640
CROP_SIDES = (96, 160)
PLOTS = Path(__file__).parent.parent / "docs" / "images"

SHIPPED = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
"""Photographs in the wheel of scikit-image; its others would be downloaded."""


@dataclass(frozen=True)
class Task:
    """Pictures to learn from, of which a draw labels some a class, and pictures to be right on."""

    name: str
    title: str
    about: str
    pool: Sequence[Image.Image]
    pool_labels: npt.NDArray[np.int64]
    test: Sequence[Image.Image]
    test_labels: npt.NDArray[np.int64]
    per_class: int

    @property
    def num_classes(self) -> int:
        """How many there are."""
        return int(self.pool_labels.max()) + 1


@dataclass(frozen=True)
class Way:
    """One way to get pictures to the cluster, and how it went.

    Attributes:
        family: What it is joined with in the plot.
        name: Of the point there.
        detail: Of the row in the table.
        num_bytes: A picture, with everything that is needed to read it.
        bare_bytes: A picture, without the tables that every JPEG file repeats. Others have none.
        error: Largest relative change of a slice of the embedding, on test pictures.
        scores: Accuracy of each draw.
        width: Channels of the code; 0: there is no bottleneck.
    """

    family: str
    name: str
    detail: str
    num_bytes: float
    bare_bytes: float
    error: float
    scores: tuple[float, ...]
    width: int = 0

    @property
    def accuracy(self) -> float:
        """Mean of the draws."""
        return statistics.mean(self.scores)

    @property
    def is_jpeg(self) -> bool:
        """Whether pictures travel as JPEG."""
        return self.family.startswith("JPEG")

    @property
    def is_bottleneck(self) -> bool:
        """Whether codes travel."""
        return self.width > 0

    @property
    def score(self) -> str:
        """Mean, least and most of the draws."""
        return f"{self.accuracy:.3f} ({min(self.scores):.3f} to {max(self.scores):.3f})"


def digits_task(pool_rows: int, test_rows: int) -> Task:
    pictures, labels = digits()
    order = np.random.default_rng(0).permutation(len(labels))
    pool, test = order[:pool_rows], order[pool_rows : pool_rows + test_rows]
    images = [Image.fromarray(one) for one in pictures]
    return Task(
        "digits",
        "Digits",
        "scikit-learn's digits: which of the ten it is. They are 8 x 8 pixels enlarged, which would fit into 64 bytes; "
        "nothing here makes use of that",
        [images[one] for one in pool],
        labels[pool],
        [images[one] for one in test],
        labels[test],
        20,
    )


def photographs() -> list[Image.Image]:
    """Return scikit-learn's two photographs, and those that the wheel of scikit-image holds if it is installed."""
    from sklearn.datasets import load_sample_images

    found = [Image.fromarray(one) for one in load_sample_images().images]
    try:
        folder = Path(str(import_module("skimage").__file__)).parent / "data"
    except ImportError:
        print("scikit-image is not installed: the photographs are scikit-learn's two alone", flush=True)
    else:
        found += [Image.open(folder / name).convert("RGB") for name in SHIPPED if (folder / name).exists()]
    for one in found:
        one.thumbnail((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE), Image.Resampling.LANCZOS)
    return found


def photographs_task(pool_rows: int, test_rows: int) -> Task:
    """Return patches of the left halves to learn from, and of the right halves to be right on."""
    random = np.random.default_rng(0)
    found = photographs()
    halves: tuple[list[Image.Image], list[Image.Image]] = ([], [])
    counts = (math.ceil(pool_rows / len(found)), math.ceil(test_rows / len(found)))
    for photograph in found:
        middle = photograph.width // 2
        for side, (patches, count) in enumerate(zip(halves, counts, strict=True)):
            half = photograph.crop((side * middle, 0, (side + 1) * middle, photograph.height))
            patches += [_patch(half, random) for _ in range(count)]
    pool_labels, test_labels = (np.repeat(np.arange(len(found)), count) for count in counts)
    return Task(
        "photographs",
        "Patches of photographs",
        f"patches of {CROP_SIDES[0]} to {CROP_SIDES[1]} px, learned from the left halves of {len(found)} photographs: "
        "which photograph's right half a patch is from",
        halves[0],
        pool_labels,
        halves[1],
        test_labels,
        min(10, counts[0]),
    )


def _patch(photograph: Image.Image, random: np.random.Generator) -> Image.Image:
    side = int(random.integers(CROP_SIDES[0], min(CROP_SIDES[1], *photograph.size) + 1))
    left = int(random.integers(0, photograph.width - side + 1))
    top = int(random.integers(0, photograph.height - side + 1))
    return photograph.crop((left, top, left + side, top + side))


class Bench:
    """A client, and what it takes to measure a task's ways."""

    def __init__(self, client: trunkline.Client, task: Task, draws: int, epochs: int) -> None:
        self._client = client
        self._task = task
        self._draws = draws
        self._epochs = epochs
        self._spec: BackboneSpec = client.describe(BACKBONE, input_size=SIZE)
        self._images = [*task.pool, *task.test]
        self._pixels = np.stack([preprocess_image(one, self._spec.preprocessing) for one in self._images])
        self._exact_ND = self._read_pixels(self._pixels)

    def pixels(self) -> Way:
        """Send the pixels as they are."""
        size = float(SIZE * SIZE * 3)
        return self._way("pixels", "pixels", "pixels", size, size, self._exact_ND)

    def jpeg(self, quality: int, side: int) -> Way:
        """Send JPEG files of the pixels that the network reads, brought to a side before."""
        smaller = [_resized(Image.fromarray(one), side) for one in self._pixels]
        files = [jpeg_file(one, quality, optimize=True) for one in smaller]
        bare = statistics.mean(len(jpeg_file(one, quality, streamtype=2)) for one in smaller)
        arrived = np.stack([np.asarray(_resized(decode_image(one), SIZE)) for one in files])
        size = statistics.mean(map(len, files))
        family = "JPEG" if side == SIZE else f"JPEG of {side} px"
        detail = f"{family}, quality {quality}"
        return self._way(family, f"q{quality}", detail, size, min(bare, size), self._read_pixels(arrived))

    def plain(self, cut: str, codec: str) -> Way:
        """Send features at a cut."""
        stem = self._client.stem(BACKBONE, cut=cut, input_size=SIZE, codec=codec)
        found = self._spec.cut(cut)
        assert found is not None
        size = row_bytes(found.feature_shape, codec, found.channel_axis)
        embedding_ND = self._client.extract(self._images, stem=stem, progress=False)
        detail = f"`{cut}`, all {found.feature_shape[found.channel_axis]}, {codec}"
        return self._way(f"{cut}, {codec}", "all", detail, size, size, embedding_ND)

    def bottleneck(self, cut: str, codec: str, width: int) -> Way:
        """Fit a bottleneck to the pool without its labels, and send its codes."""
        fitted = fit_bottleneck(
            self._client,
            self._task.pool,
            backbone=BACKBONE,
            cut=cut,
            code_channels=width,
            codec=codec,
            input_size=SIZE,
            epochs=self._epochs,
            learning_rate=LEARNING_RATE,
            progress=False,
        )
        embedding_ND = self._client.extract(self._images, stem=fitted.install(self._client), progress=False)
        size = fitted.row_bytes
        detail = f"`{cut}`, {width} channels, {codec}"
        return replace(self._way(f"{cut}, {codec}", str(width), detail, size, size, embedding_ND), width=width)

    def _read_pixels(self, pixels_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Send pixels that are at the network's size already, so that the cluster does not crop a second time."""
        space = self._spec.space(self._spec.cuts[0])
        return self._client.extract_features(pixels_NHWC, space=space, progress=False)

    def _way(
        self, family: str, name: str, detail: str, size: float, bare: float, embedding_ND: npt.NDArray[np.float32]
    ) -> Way:
        # The columns that are left behind a cut are the last ones.
        first = self._exact_ND.shape[1] - embedding_ND.shape[1]
        slices = [
            SliceSpec(one.name, one.start - first, one.stop - first) for one in self._spec.slices if one.start >= first
        ]
        scores = tuple(self._accuracy(embedding_ND, slices, draw) for draw in range(self._draws))
        return Way(family, name, detail, size, bare, self._error(embedding_ND, slices), scores)

    def _error(self, embedding_ND: npt.NDArray[np.float32], slices: Sequence[SliceSpec]) -> float:
        """Return the largest relative change over the slices that every cut has."""
        common = self._spec.cut(CUTS[-1])
        assert common is not None
        start, first = len(self._task.pool), self._exact_ND.shape[1] - embedding_ND.shape[1]
        got_ND, exact_ND = embedding_ND[start:], self._exact_ND[start:, first:]
        return max(
            float(np.linalg.norm((got_ND - exact_ND)[:, one.start : one.stop]))
            / float(np.linalg.norm(exact_ND[:, one.start : one.stop]))
            for one in slices
            if one.name in common.slices
        )

    def _accuracy(self, embedding_ND: npt.NDArray[np.float32], slices: Sequence[SliceSpec], draw: int) -> float:
        """Train a head on a few labelled pictures of the pool, and return its accuracy on the test pictures."""
        task = self._task
        random = np.random.default_rng(draw)
        chosen = np.concatenate(
            [
                random.permutation(np.flatnonzero(task.pool_labels == one))[: task.per_class]
                for one in range(task.num_classes)
            ]
        )
        result = train_head(
            [Source(BACKBONE, embedding_ND[chosen], tuple(slices))],
            Labels(tuple(map(str, range(task.num_classes))), task.pool_labels[chosen].astype(np.uint32), None),
            JobSpec(model="m", dataset="d", backbone=BACKBONE, input_size=SIZE, embedding="auto"),
            on_event=lambda event: None,
            should_stop=lambda: False,
        )
        test_ND = embedding_ND[len(task.pool) :]
        wanted = [one for one in slices if one.name in result.head.slices]
        columns_ND = np.concatenate([test_ND[:, one.start : one.stop] for one in wanted], axis=1)
        outputs_NK = result.head.predict(torch.from_numpy(columns_ND)).numpy()
        return float((outputs_NK.argmax(1) == task.test_labels).mean())


def _resized(image: Image.Image, side: int) -> Image.Image:
    return image if image.width == side else image.resize((side, side), Image.Resampling.BICUBIC)


def jpeg_file(image: Image.Image, quality: int, *, optimize: bool = False, streamtype: int = 0) -> bytes:
    """Encode a picture; one without colour as JPEG encodes grey."""
    bands = image.split()
    grey = all(one.tobytes() == bands[0].tobytes() for one in bands)
    file = io.BytesIO()
    (bands[0] if grey else image).save(file, "JPEG", quality=quality, optimize=optimize, streamtype=streamtype)
    return file.getvalue()


def measure(client: trunkline.Client, task: Task, draws: int, epochs: int) -> list[Way]:
    """Measure every way."""
    bench = Bench(client, task, draws, epochs)
    ways: list[Way] = []
    started = time.perf_counter()

    def keep(way: Way) -> None:
        ways.append(way)
        print(f"{time.perf_counter() - started:6.0f} s  {task.name}: {way}", flush=True)

    keep(bench.pixels())
    for side, qualities in ((SIZE, QUALITIES), (SMALL_SIZE, SMALL_QUALITIES)):
        for quality in qualities:
            keep(bench.jpeg(quality, side))
    for cut in CUTS:
        for codec in CODECS:
            keep(bench.plain(cut, codec))
            for width in reversed(WIDTHS):
                keep(bench.bottleneck(cut, codec, width))
    return ways


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table. The first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]


def rival(way: Way, ways: Sequence[Way]) -> str:
    """Return the smallest bottleneck that is no less accurate than a JPEG, if it is smaller."""
    found = [one for one in ways if one.is_bottleneck and one.accuracy >= way.accuracy]
    smallest = min(found, key=lambda one: one.num_bytes, default=None)
    if smallest is None:
        return "none is as accurate"
    if smallest.num_bytes >= way.num_bytes:
        return f"none: the smallest has {smallest.num_bytes:.0f} bytes"
    without = "" if smallest.num_bytes < way.bare_bytes else "; not without tables"
    return f"{smallest.detail}: {smallest.num_bytes:.0f} bytes{without}"


def way_lines(ways: Sequence[Way]) -> list[str]:
    header = ["way", "bytes", "without tables", "embedding error", "accuracy", "smaller bottleneck, no less accurate"]
    return table(
        [
            header,
            *[
                [
                    way.detail,
                    f"{way.num_bytes:.0f}",
                    f"{way.bare_bytes:.0f}" if way.is_jpeg else "",
                    f"{way.error:.3f}",
                    way.score,
                    rival(way, ways) if way.is_jpeg else "",
                ]
                for way in ways
            ],
        ]
    )


def best(ways: Sequence[Way], budget: float, *, bare: bool = False) -> Way | None:
    """Return the most accurate of those within a budget."""
    within = [one for one in ways if (one.bare_bytes if bare else one.num_bytes) <= budget]
    return max(within, key=lambda one: one.accuracy, default=None)


def verdict(ours: Way | None, theirs: Way | None) -> str:
    """Say who is ahead."""
    if ours is None or theirs is None:
        return "neither fits" if ours is theirs else "bottleneck: no JPEG fits" if ours else "JPEG"
    gap = ours.accuracy - theirs.accuracy
    return "level" if abs(gap) < LEVEL else f"bottleneck, by {gap:.3f}" if gap > 0 else f"JPEG, by {-gap:.3f}"


def budget_lines(ways: Sequence[Way]) -> list[str]:
    narrow, jpegs = [one for one in ways if one.is_bottleneck], [one for one in ways if one.is_jpeg]
    rows = [["budget", "bottleneck", "JPEG file", "ahead", "JPEG without tables", "ahead"]]
    outcomes: tuple[dict[str, list[str]], ...] = ({}, {})
    for budget in BUDGETS:
        ours = best(narrow, budget)
        row = [f"{budget} bytes", _cell(ours)]
        for bare, outcome in zip((False, True), outcomes, strict=True):
            theirs = best(jpegs, budget, bare=bare)
            row += [_cell(theirs), verdict(ours, theirs)]
            outcome.setdefault(row[-1].split(",")[0].split(":")[0], []).append(str(budget))
        rows.append(row)
    said = []
    for what, outcome in zip(("JPEG files", "JPEG without its tables"), outcomes, strict=True):
        phrases = {
            "bottleneck": "the bottleneck is ahead at budgets of {} bytes",
            "level": "they are level at {}",
            "JPEG": "JPEG is ahead at {}",
            "neither fits": "neither fits into {}",
        }
        parts = [text.format(", ".join(outcome[key])) for key, text in phrases.items() if key in outcome]
        said.append(f"- Against {what}: {'; '.join(parts)}.")
    return [*table(rows), *said]


def _cell(way: Way | None) -> str:
    return f"{way.accuracy:.3f}, {way.detail}" if way else "none fits"


def reason_lines(ways: Sequence[Way]) -> list[str]:
    """Say what the figures show about where a bottleneck loses."""
    narrow = [one for one in ways if one.is_bottleneck]
    by_detail = {one.detail: one for one in narrow}
    pairs = [(one, by_detail[one.detail.replace("int8", "int4")]) for one in narrow if "int8" in one.detail]
    worst = max(pairs, key=lambda pair: pair[1].error - pair[0].error)
    change = statistics.mean(four.accuracy - eight.accuracy for eight, four in pairs)
    plain = next(one for one in ways if one.family == pairs[0][1].family and one.name == "all")
    least = min(one.error for one in narrow)
    top = max(narrow, key=lambda one: one.accuracy)
    pixels = next(one for one in ways if one.name == "pixels")
    lines = [
        f"- From int8 to int4 the error of a bottleneck grows by {worst[1].error - worst[0].error:.3f} at most, and "
        f"accuracy changes by {change:+.3f} on average. All channels of `{CUTS[0]}` in int4 have an error of "
        f"{plain.error:.3f}, the bottlenecks {least:.3f} to {max(one.error for one in narrow):.3f}"
        + (": what costs is the channels that are left out, not the codec." if least > plain.error else "."),
        f"- The most accurate bottleneck is {top.detail}, {top.num_bytes:.0f} bytes: {top.accuracy:.3f}; pixels: "
        f"{pixels.accuracy:.3f}.",
    ]
    beaten = [one for one in ways if one.is_jpeg and _is_beaten(one, narrow, one.num_bytes)]
    bare = [one for one in beaten if _is_beaten(one, narrow, one.bare_bytes)]
    num_jpegs = sum(one.is_jpeg for one in ways)
    lines.append(
        f"- Of {num_jpegs} JPEG settings, {len(beaten)} are beaten as files by a bottleneck of fewer bytes and no "
        f"lower mean accuracy, {len(bare)} also without their tables; this counts differences that are level above."
    )
    shares = {one.family: SCALE_BYTES * one.width / one.num_bytes for one in narrow}
    parts = "; ".join(f"{share:.0%} at {family}" for family, share in shares.items())
    return [*lines, f"- Share of scales and offsets in the bytes of a code: {parts}."]


def _is_beaten(way: Way, narrow: Sequence[Way], num_bytes: float) -> bool:
    return any(one.num_bytes < num_bytes and one.accuracy >= way.accuracy for one in narrow)


def plot(task: Task, ways: Sequence[Way]) -> str:
    """Draw int4 and JPEG, and return the file's name."""
    jpegs = ("JPEG", f"JPEG of {SMALL_SIZE} px")
    series = [
        Series(
            f"{name}{suffix}",
            [(getattr(one, size), one.accuracy, one.name) for one in ways if one.family == name],
            named=not suffix,
        )
        for name in jpegs
        for suffix, size in (("", "num_bytes"), (", no tables", "bare_bytes"))
    ]
    for cut in CUTS:
        chosen = sorted((one for one in ways if one.family == f"{cut}, int4"), key=lambda one: one.num_bytes)
        series.append(Series(f"{cut}, int4", [(one.num_bytes, one.accuracy, one.name) for one in chosen]))
    name = f"learned-split-{task.name}.svg"
    scatter(
        PLOTS / name,
        f"{task.title} at {SIZE} px. N: code channels, all: no bottleneck, qN: JPEG quality",
        "bytes a picture",
        f"accuracy, mean of {len(ways[0].scores)} draws",
        series,
    )
    return name


def task_lines(task: Task, ways: Sequence[Way]) -> list[str]:
    return [
        f"## {task.title}",
        "",
        f"{task.about[0].upper()}{task.about[1:]}. {task.per_class} labelled pictures a class, {task.num_classes} "
        f"classes, {len(task.test)} test pictures, bottlenecks fitted to {len(task.pool)} pictures without labels.",
        "",
        *way_lines(ways),
        "The most accurate within a budget:",
        "",
        *budget_lines(ways),
        *reason_lines(ways),
        "",
        f"![Accuracy against bytes](../../docs/images/{plot(task, ways)})",
        "",
    ]


def method_lines(draws: int, epochs: int) -> list[str]:
    return [
        f"{BACKBONE}, pictures of {SIZE} px. Accuracy: mean (least to most) of {draws} draws of the labelled "
        'pictures, heads with `embedding="auto"` trained as a job trains them, in the benchmark itself. Bottlenecks: '
        f"{epochs} epochs of `fit_bottleneck`, learning rate {LEARNING_RATE}.",
        "",
        f"- **Bytes** of features and codes are those of a row before zstd, {SCALE_BYTES} of them a channel for "
        "scale and offset. Bytes of JPEG are the mean of files with Huffman tables of their own, which are smaller "
        "than Pillow's default.",
        "- **Without tables** is an abbreviated JPEG stream with the standard tables: what is left if both sides agree "
        "on the tables beforehand. Tables are some 570 bytes of a colour file as Pillow writes it by default.",
        "- **JPEG** holds just the pixels that the network reads, so no byte goes into a margin that is cropped; heads "
        f"are trained and measured on pictures that went through it. That of {SMALL_SIZE} px is enlarged on arrival.",
        f"- **Embedding error** is the largest relative change of a slice behind `{CUTS[-1]}`, on the test pictures, "
        "for every way alike.",
        f"- **Ahead** by less than {LEVEL} is called level. The best of a budget is picked on the test pictures, for "
        "JPEG and bottlenecks alike. Where no JPEG fits, none that was measured does: one of fewer pixels would.",
        "- **A bottleneck has limits**: it mixes the channels of one place, and its codes have a fixed size. JPEG also "
        "uses what neighbouring places have in common, and spends few bytes on an empty picture.",
        "- **The plots** leave int8 out.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--pool", type=int, default=400)
    parser.add_argument("--test", type=int, default=400)
    arguments = parser.parse_args()
    # The cluster has threads of its own.
    torch.set_num_threads(1)
    lines = ["# A learned split against JPEG: accuracy and bytes", "", f"Machine: {machine()}.", ""]
    lines += method_lines(arguments.draws, arguments.epochs)
    with embedded_cluster() as cluster, cluster.connect() as client:
        for task in (photographs_task(arguments.pool, arguments.test), digits_task(arguments.pool, arguments.test)):
            lines += task_lines(task, measure(client, task, arguments.draws, arguments.epochs))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "learned_split.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
