"""What a stem costs a client: its file, how long it takes to start, and pictures a second, against float32 torch.

In one run, in turn: a round of torch, one of the float32 stem, one of the int8 stem, and again, so that the machine's
moods hit all alike. Torch means: the very modules that the stem was exported from, called as they are (eager), features
contiguous, the same number of threads. The quantised stem's error is that of the embedding, see ``StemCost``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from common import digits, report, summary
from torch import nn
from trunkline_wire.preprocess import image_from_array, preprocess_image
from trunkline_wire.specs import Preprocessing
from trunkline_worker.backbones.backbone import Backbone, Normalise
from trunkline_worker.backbones.catalogue import DEFAULT_BACKBONE, load_backbone
from trunkline_worker.backbones.export import STEM_INPUT, export_stem, session_options
from trunkline_worker.backbones.int8_stem import quantise_stem
from trunkline_worker.engine.choice import embedding_error

Pictures = npt.NDArray[np.uint8]
Run = Callable[[Pictures], object]

BATCH_ROWS = 16
THREADS = (1, 2)
MAX_FILE_BYTES = 500_000
LEAST_RATIO = 4.0


def torch_stem(backbone: Backbone, cut: str) -> Run:
    """Return a call of the stem's own modules, on contiguous features."""
    stem = backbone.stem(cut)
    for module in stem.modules():
        if isinstance(module, Normalise):
            module.register_forward_hook(lambda module, arguments, features: features.contiguous())

    @torch.inference_mode()
    def run(pictures: Pictures) -> object:
        return stem(torch.from_numpy(pictures))

    return run


def open_stem(data: bytes, num_threads: int) -> Run:
    """Return a call of an exported stem, as the client makes it."""
    session = onnxruntime.InferenceSession(data, session_options(num_threads), providers=["CPUExecutionProvider"])
    return lambda pictures: session.run(None, {STEM_INPUT: pictures})[0]


def milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def start_up(data: bytes, picture: Pictures, rounds: int) -> tuple[list[float], list[float]]:
    """Return milliseconds to load a file, and of the first call after that, over and over."""
    loads, firsts = [], []
    for _ in range(rounds):
        opened: list[Run] = []
        loads.append(milliseconds(lambda opened=opened: opened.append(open_stem(data, 1))))  # type: ignore[misc]
        firsts.append(milliseconds(lambda opened=opened: opened[0](picture)))  # type: ignore[misc]
    return loads, firsts


def speeds(runs: Sequence[Run], pictures: Pictures, rounds: int) -> list[list[float]]:
    """Return pictures a second of each, one after another in every round."""
    for run in runs:
        run(pictures)
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for position, run in enumerate(runs):
            found[position].append(1000 * len(pictures) / milliseconds(lambda run=run: run(pictures)))  # type: ignore[misc]
    return found


@torch.inference_mode()
def error(backbone: Backbone, cut: str, size: int, exact: bytes, quantised: bytes, pictures: Pictures) -> float:
    """Return what the quantised stem does to the embedding."""
    spec = backbone.describe(size)
    found = spec.cut(cut)
    assert found is not None
    trunk: nn.Module = backbone.trunk(cut)
    got, expected = (trunk(torch.from_numpy(open_stem(data, 1)(pictures))) for data in (quantised, exact))
    return embedding_error(got, expected, [one for one in spec.slices if one.name in found.slices])


def picture_sets(backbone: Backbone, preprocessing: Preprocessing) -> dict[str, Pictures]:
    """Return pictures that the quantised stem was not calibrated on."""
    from sklearn.datasets import load_sample_images

    def prepared(arrays: Sequence[npt.NDArray[np.uint8]]) -> Pictures:
        return np.stack([preprocess_image(image_from_array(one), preprocessing) for one in arrays])

    return {
        "generated": backbone.samples.held_out(preprocessing, 16),
        "photographs": prepared(load_sample_images().images),
        "digits": prepared(list(digits()[0][:16])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cut", default="blocks.2")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--name", default="stem_speed", help="of the file under benchmarks/results")
    arguments = parser.parse_args()
    cut, size = arguments.cut, arguments.size
    backbone = load_backbone(DEFAULT_BACKBONE)
    preprocessing = backbone.preprocessing_at(size)
    exact = export_stem(backbone, cut, size)
    quantised = quantise_stem(exact, backbone.samples.calibration(preprocessing))
    sets = picture_sets(backbone, preprocessing)
    pictures = sets["generated"][:BATCH_ROWS]
    errors = {name: error(backbone, cut, size, exact, quantised, some) for name, some in sets.items()}
    names = ["torch, float32", "stem, float32", "stem, int8"]
    columns = [[f"{len(data) / 1000:.0f}" for data in (exact, quantised)], [], []]
    for data in (exact, quantised):
        for column, values in zip(columns[1:], start_up(data, pictures[:1], arguments.rounds), strict=True):
            column.append(f"{statistics.median(values):.1f}")
    header = ["", "file, kB", "load, ms", "first call, ms"]
    for num_threads in THREADS:
        threads = "1 thread" if num_threads == 1 else f"{num_threads} threads"
        header += [f"pictures/s, {threads}", f"to torch, {threads}"]
    table = [tuple(header)]
    rows = [[names[0], "", "", ""], *([name, *cells] for name, *cells in zip(names[1:], *columns, strict=True))]
    least = float("inf")
    eager = torch_stem(backbone, cut)
    for num_threads in THREADS:
        torch.set_num_threads(num_threads)
        runs = [eager, open_stem(exact, num_threads), open_stem(quantised, num_threads)]
        found = speeds(runs, pictures, arguments.rounds)
        for row, values in zip(rows, found, strict=True):
            ratios = [ours / theirs for ours, theirs in zip(values, found[0], strict=True)]
            row += [f"{statistics.median(values):.0f}", "1" if values is found[0] else summary(ratios)]
            if values is found[1]:
                least = min(least, statistics.median(ratios))
    table += [tuple(row) for row in rows]
    report(
        arguments.name,
        f"Stems of {DEFAULT_BACKBONE} at {cut}, {size} pixels",
        table,
        [
            f"Batches of {len(pictures)} pictures, {arguments.rounds} rounds in turn; median (least to most).",
            "Load: a session from the file's bytes. First call: one picture, one thread.",
            "Torch: the same modules, eager, contiguous features. Quote the ratios: the machine was shared.",
            "Error of the int8 stem, on pictures it was not calibrated on: "
            + ", ".join(f"{name} {value:.3f}" for name, value in errors.items())
            + ".",
            f"Wanted: a float32 file of at most {MAX_FILE_BYTES / 1e6} MB: {_met(len(exact) <= MAX_FILE_BYTES)}; the "
            f"float32 stem at least {LEAST_RATIO:.0f} times as fast as torch: {_met(least >= LEAST_RATIO)}.",
        ],
    )


def _met(is_met: bool) -> str:
    return "met" if is_met else "not met"


if __name__ == "__main__":
    main()
