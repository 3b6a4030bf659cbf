"""What a sweep of 64 configurations costs beside one configuration, and how it grows with the rows.

Digits are real; their columns are what fixed random layers make of the pixels, as wide as the last layer of a
mobile-sized backbone, in four slices, so that nothing is downloaded. A run is a call of ``run_sweep`` in this process:
no cluster, no wire. Runs of one and of 64 take turns, so that the machine's moods hit both alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from common import digits, report, summary
from torch import Tensor
from torch.nn import functional
from trunkline_wire.heads import CLASSIFICATION, REGRESSION
from trunkline_wire.specs import SliceSpec
from trunkline_worker.training.softmax import fit_softmax, prepare
from trunkline_worker.training.split import FOLDS, folds, random_stream
from trunkline_worker.training.standardise import standardisation
from trunkline_worker.training.sweep.plan import Configuration, Trial
from trunkline_worker.training.sweep.run import run_sweep

NUM_FOLDS = 5
SLICE_WIDTH = 320
NAMES = ("one", "two", "three", "four")
SETS = (NAMES, NAMES[:2], NAMES[2:], NAMES[3:])
STRENGTHS = tuple(float(one) for one in np.logspace(-1, -4, 16))
GROWTH_ROWS = (1_000, 10_000, 100_000)
GROWTH_COLUMNS = 64
MLP_COLUMNS = 64


def random_layers(pixels_ND: Tensor) -> Tensor:
    """Return four slices of columns: behind one, two, three and four random layers."""
    draw = torch.Generator().manual_seed(0)
    x_ND = pixels_ND / pixels_ND.std()
    slices = []
    for _ in NAMES:
        weights = torch.randn(x_ND.shape[1], SLICE_WIDTH, generator=draw) * (2 / x_ND.shape[1]) ** 0.5
        x_ND = torch.relu((x_ND - x_ND.mean(dim=0)) @ weights)
        slices.append(x_ND)
    return torch.cat(slices, dim=1)


def accuracy(outputs: Tensor, truth: Tensor) -> float:
    return float((outputs.argmax(dim=1) == truth).double().mean())


def minus_cross_entropy(outputs: Tensor, truth: Tensor) -> float:
    return -float(functional.cross_entropy(outputs.double(), truth))


def explained(outputs: Tensor, truth: Tensor) -> float:
    return 1.0 - float((outputs - truth).square().sum() / (truth - truth.mean(dim=0)).square().sum())


def slices_of(width: int, count: int) -> tuple[SliceSpec, ...]:
    return tuple(SliceSpec(name, at * width, (at + 1) * width) for at, name in enumerate(NAMES[:count]))


def sweep(
    x_ND: Tensor,
    slices: Sequence[SliceSpec],
    truth: Tensor,
    configurations: Sequence[Configuration],
) -> tuple[float, list[Trial]]:
    """Return how long a sweep takes, in seconds, and its trials."""
    is_classes = not truth.is_floating_point()
    started = time.perf_counter()
    trials = run_sweep(
        x_ND,
        slices,
        CLASSIFICATION if is_classes else REGRESSION,
        truth,
        truth.numpy() if is_classes else None,
        configurations,
        num_folds=NUM_FOLDS,
        seed=0,
        score=minus_cross_entropy if is_classes else explained,
        check=lambda: None,
        on_done=lambda done: None,
    )
    return time.perf_counter() - started, trials


def plain_loop(x_ND: Tensor, classes_N: Tensor, widths: Sequence[int], l2: float) -> float:
    """Return how long it takes to train one linear configuration fold by fold, as jobs train, in seconds."""
    started = time.perf_counter()
    fold_N = torch.from_numpy(folds(classes_N.numpy(), len(x_ND), NUM_FOLDS, random_stream(0, FOLDS)))
    for fold in range(NUM_FOLDS):
        inside_N = fold_N != fold
        fitted = standardisation(x_ND[inside_N], widths)
        x_TD = (x_ND[inside_N] - fitted.mean_D) / fitted.scale_D
        fit_softmax(prepare(x_TD), classes_N[inside_N], 10, l2, on_step=lambda step, loss: None)
    return time.perf_counter() - started


def linear_configurations(widths: dict[str, int]) -> list[Configuration]:
    """Return 64 configurations: 4 sets of slices times 16 strengths, which grow with the columns."""
    return [Configuration(one, l2 * sum(widths[name] for name in one)) for one in SETS for l2 in STRENGTHS]


def mlp_configurations(names: Sequence[str]) -> list[Configuration]:
    """Return 64 configurations: 8 learning rates times 8 strengths."""
    rates, strengths = np.logspace(-3.5, -2, 8), np.logspace(-1, 1.5, 8)
    return [
        Configuration(tuple(names), float(l2), (32,), learning_rate=float(rate)) for rate in rates for l2 in strengths
    ]


def compare(
    name: str, one: Callable[[], float], many: Callable[[], float], rounds: int, count: int = 64
) -> tuple[str, ...]:
    """Return a row of the table: alternating rounds of one configuration and of many."""
    ones, manys = [], []
    for _ in range(rounds):
        ones.append(one())
        manys.append(many())
    ratios = [after / before for before, after in zip(ones, manys, strict=True)]
    print(name, ones, manys, flush=True)
    return (name, str(count), summary(ones), summary(manys), summary(ratios))


def growth(num_rows: int) -> tuple[str, ...]:
    """Return a row of the table of growth: synthetic rows around class centres."""
    draw = torch.Generator().manual_seed(0)
    classes_N = torch.arange(num_rows) % 10
    centres = 0.5 * torch.randn(10, GROWTH_COLUMNS, generator=draw)
    x_ND = torch.randn(num_rows, GROWTH_COLUMNS, generator=draw) + centres[classes_N]
    slices = slices_of(GROWTH_COLUMNS // 4, 4)
    widths = {one.name: one.width for one in slices}
    linear = linear_configurations(widths)
    targets_NM = x_ND[:, :2] + torch.randn(num_rows, 2, generator=draw)
    mlps = [Configuration(NAMES, 1.0, (32,), learning_rate=rate) for rate in (1e-3, 3e-3, 1e-2, 3e-2)]
    seconds = [
        sweep(x_ND, slices, truth, configurations)[0]
        for truth, configurations in ((classes_N, linear), (targets_NM, linear), (classes_N, mlps))
    ]
    print(num_rows, seconds, flush=True)
    return (f"{num_rows:,}", *(f"{one:.2f}" for one in seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    pictures, labels = digits()
    pixels_ND = torch.from_numpy(pictures.reshape(len(pictures), -1).astype(np.float32))
    classes_N = torch.from_numpy(labels.astype(np.int64))
    x_ND, slices = random_layers(pixels_ND), slices_of(SLICE_WIDTH, 4)
    widths = {one.name: one.width for one in slices}
    linear = linear_configurations(widths)
    single = linear[8]
    sweep(x_ND, slices, classes_N, [single])  # warms up
    table = [
        ("sweep", "configurations", "one, s", "all, s", "all / one"),
        compare(
            "linear classification, 1,280 columns",
            lambda: sweep(x_ND, slices, classes_N, [single])[0],
            lambda: sweep(x_ND, slices, classes_N, linear)[0],
            arguments.rounds,
        ),
        compare(
            "the same, beside one configuration fold by fold as jobs train",
            lambda: plain_loop(x_ND, classes_N, list(widths.values()), single.l2),
            lambda: sweep(x_ND, slices, classes_N, linear)[0],
            1,
        ),
        compare(
            "linear regression, 1,280 columns",
            lambda: sweep(x_ND, slices, pixels_ND[:, 20:22], [single])[0],
            lambda: sweep(x_ND, slices, pixels_ND[:, 20:22], linear)[0],
            1,
        ),
    ]
    few, mlps = slices_of(MLP_COLUMNS, 1), mlp_configurations(NAMES[:1])
    table.append(
        compare(
            f"MLP of 32 units, {MLP_COLUMNS} columns",
            lambda: sweep(pixels_ND, few, classes_N, mlps[27:28])[0],
            lambda: sweep(pixels_ND, few, classes_N, mlps)[0],
            1,
        )
    )
    wide = [replace(one, slices=NAMES) for one in mlps[::8]]
    table.append(
        compare(
            "MLP of 32 units, 1,280 columns",
            lambda: sweep(x_ND, slices, classes_N, wide[3:4])[0],
            lambda: sweep(x_ND, slices, classes_N, wide)[0],
            1,
            len(wide),
        )
    )
    growth_table = [growth(count) for count in GROWTH_ROWS]
    report(
        "sweep",
        "Sweeps: 64 configurations beside one, 5 folds",
        table,
        [
            f"1,797 digits. Linear: {len(SETS)} sets of slices of 1,280, 640, 640 and 320 columns times "
            f"{len(STRENGTHS)} strengths; one configuration reads all 1,280. {arguments.rounds} rounds for the first "
            "line, one for the others: median (least to most), ratios within a round.",
            "",
            f"Growth with the rows, {GROWTH_COLUMNS} synthetic columns, 10 classes, seconds:",
            "",
            "| rows | 64 linear classifications | 64 linear regressions | 4 MLPs of 32 units |",
            "|---|---|---|---|",
            *("| " + " | ".join(row) + " |" for row in growth_table),
        ],
    )


if __name__ == "__main__":
    main()
