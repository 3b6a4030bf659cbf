"""What a sweep of 64 configurations costs beside one configuration, what dropping most early does, and growth by rows.

Digits are real; their columns are what fixed random layers make of the pixels, as wide as the last layer of a
mobile-sized backbone, in four slices, so that nothing is downloaded. A run is a call of ``run_sweep`` in this process:
no cluster, no wire. Runs of one and of 64 take turns, so that the machine's moods hit both alike; processor time says
what the neighbours' share of the machine does not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from common import digits, report, summary
from torch import Tensor
from torch.nn import functional
from trunkline_wire.fits import SweepConfig
from trunkline_wire.heads import CLASSIFICATION, MLP, REGRESSION, HeadConfig
from trunkline_wire.specs import SliceSpec
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.loop import Labels, Source, train_head
from trunkline_worker.training.softmax import fit_softmax, prepare_softmax
from trunkline_worker.training.split import FOLDS, folds, random_stream
from trunkline_worker.training.standardise import standardisation
from trunkline_worker.training.sweep import alone, run
from trunkline_worker.training.sweep.plan import PLAIN, Configuration, Trial, winner
from trunkline_worker.training.sweep.rows import Folds
from trunkline_worker.training.sweep.run import run_sweep

NUM_FOLDS = 5
SLICE_WIDTH = 320
NAMES = ("one", "two", "three", "four")
SETS = (NAMES, NAMES[:2], NAMES[2:], NAMES[3:])
STRENGTHS = tuple(float(one) for one in np.logspace(-1, -4, 16))
STRENGTHS_ALL = tuple(one * len(NAMES) * SLICE_WIDTH for one in STRENGTHS)
RATES = tuple(float(one) for one in np.logspace(-3.5, -1.5, 8))
DECAYS = tuple(float(one) for one in np.logspace(-2, -0.5, 8))
MLPS = {"head": HeadConfig(MLP, (32,)), "solver": "adamw"}
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


@dataclass(frozen=True)
class Spent:
    """Seconds on the clock, and of processors."""

    clock: float
    processor: float


class Watch:
    """Measures from when it was made."""

    def __init__(self) -> None:
        self._clock, self._processor = time.perf_counter(), time.process_time()

    def spent(self) -> Spent:
        """Return what has gone by."""
        return Spent(time.perf_counter() - self._clock, time.process_time() - self._processor)


def sweep(
    x_ND: Tensor,
    slices: Sequence[SliceSpec],
    truth: Tensor,
    configurations: Sequence[Configuration],
    seed: int = 0,
) -> tuple[Spent, list[Trial]]:
    """Return what a sweep takes, and its trials."""
    is_classes = not truth.is_floating_point()
    watch = Watch()
    trials = run_sweep(
        x_ND,
        slices,
        CLASSIFICATION if is_classes else REGRESSION,
        truth,
        truth.numpy() if is_classes else None,
        configurations,
        num_folds=NUM_FOLDS,
        seed=seed,
        score=minus_cross_entropy if is_classes else explained,
        check=lambda: None,
        on_done=lambda done: None,
    )
    return watch.spent(), trials


@contextmanager
def all_in_full() -> Iterator[None]:
    """Drop nothing early meanwhile."""
    usual, run.ALL_IN_FULL = run.ALL_IN_FULL, 10**6
    try:
        yield
    finally:
        run.ALL_IN_FULL = usual


def plain_loop(x_ND: Tensor, classes_N: Tensor, widths: Sequence[int], l2: float) -> Spent:
    """Return what it takes to train one linear configuration fold by fold, as jobs train."""
    watch = Watch()
    fold_N = torch.from_numpy(folds(classes_N.numpy(), len(x_ND), NUM_FOLDS, random_stream(0, FOLDS)))
    for fold in range(NUM_FOLDS):
        inside_N = fold_N != fold
        fitted = standardisation(x_ND[inside_N], widths)
        x_TD = (x_ND[inside_N] - fitted.mean_D) / fitted.scale_D
        fit_softmax(prepare_softmax(x_TD), classes_N[inside_N], 10, l2, on_step=lambda step, loss: None)
    return watch.spent()


def alone_loop(x_ND: Tensor, classes_N: Tensor, one: Configuration) -> Spent:
    """Return what it takes to train one configuration that learns in steps fold by fold, as jobs train."""
    fold_N = torch.from_numpy(folds(classes_N.numpy(), len(x_ND), NUM_FOLDS, random_stream(0, FOLDS)))
    inputs = (HeadInput(("columns",), (x_ND.shape[1],)),)
    work = alone.Work(one.spec(PLAIN), inputs, ((0, x_ND.shape[1]),))
    trials = alone.TrialSet(
        *((work,), x_ND, classes_N, CLASSIFICATION, 10, Folds.of(fold_N, NUM_FOLDS), 1.0, minus_cross_entropy)
    )
    watch = Watch()
    alone.run_trial(trials, 0, lambda: None)
    return watch.spent()


def whole_job(
    x_ND: Tensor, slices: Sequence[SliceSpec], classes_N: Tensor, tried: SweepConfig, **changes: Any
) -> Spent:
    """Return what a job takes that searches: its search, the winner's fits, and what the model says of itself."""
    if not tried.embeddings:
        changes |= {"embedding": "slices", "slices": tuple(one.name for one in slices)}
    spec = JobSpec("m", "d", "b", 0, sweep=tried, **changes)
    labels = Labels(tuple("0123456789"), classes_N.numpy())
    watch = Watch()
    train_head(
        [Source("b", x_ND.numpy(), tuple(slices))],
        labels,
        spec,
        on_event=lambda event: None,
        should_stop=lambda: False,
    )
    return watch.spent()


def linear_configurations(widths: dict[str, int]) -> list[Configuration]:
    """Return 64 configurations: 4 sets of slices times 16 strengths, which grow with the columns."""
    return [Configuration(one, l2 * sum(widths[name] for name in one)) for one in SETS for l2 in STRENGTHS]


def mlp_configurations(names: Sequence[str]) -> list[Configuration]:
    """Return 64 configurations: 8 learning rates times 8 decays of AdamW's."""
    return [Configuration(tuple(names), l2, (32,), learning_rate=rate) for rate in RATES for l2 in DECAYS]


def compare(
    name: str, one: Callable[[], Spent], many: Callable[[], Spent], rounds: int, count: int = 64
) -> tuple[str, ...]:
    """Return a row of the table: alternating rounds of one configuration and of many."""
    ones, manys = [], []
    for _ in range(rounds):
        ones.append(one())
        manys.append(many())
    ratios = [after.clock / before.clock for before, after in zip(ones, manys, strict=True)]
    processor = [after.processor / before.processor for before, after in zip(ones, manys, strict=True)]
    print(name, ones, manys, flush=True)
    seconds = [summary([one.clock for one in some]) for some in (ones, manys)]
    return (name, str(count), *seconds, summary(ratios), summary(processor))


def kept(x_ND: Tensor, classes_N: Tensor, configurations: Sequence[Configuration], seed: int) -> tuple[str, ...]:
    """Return a row of the table of winners: what dropping early finds beside what it would have found."""
    draw = np.random.default_rng(seed)
    rows = torch.from_numpy(draw.permutation(len(x_ND))[: int(draw.integers(200, 900))])
    x_ND, classes_N = x_ND[rows], classes_N[rows]
    _, early = sweep(x_ND, slices_of(MLP_COLUMNS, 1), classes_N, configurations, seed)
    with all_in_full():
        _, full = sweep(x_ND, slices_of(MLP_COLUMNS, 1), classes_N, configurations, seed)
    known = {one.configuration: one for one in full}
    best = max(full, key=lambda one: one.score)
    error = float(np.std(best.scores, ddof=1)) / NUM_FOLDS**0.5
    won, would = known[winner(early).configuration], winner(full)
    words = (len(x_ND), -best.score, error, -would.score, -won.score)
    print(seed, words, flush=True)
    return (f"{words[0]:,}", *(f"{one:.3f}" for one in words[1:]))


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
    mlps = [Configuration(NAMES, 0.05, (32,), learning_rate=rate) for rate in (1e-3, 3e-3, 1e-2, 3e-2)]
    seconds = [
        sweep(x_ND, slices, truth, configurations)[0].clock
        for truth, configurations in ((classes_N, linear), (targets_NM, linear), (classes_N, mlps))
    ]
    print(num_rows, seconds, flush=True)
    return (f"{num_rows:,}", *(f"{one:.2f}" for one in seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, default=True, help="how it grows with rows")
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
        ("sweep", "configurations", "one, s", "all, s", "all / one", "in processor time"),
        compare(
            "linear classification, 1,280 columns",
            lambda: sweep(x_ND, slices, classes_N, [single])[0],
            lambda: sweep(x_ND, slices, classes_N, linear)[0],
            arguments.rounds,
        ),
        compare(
            "the same, the whole job",
            lambda: whole_job(x_ND, slices, classes_N, SweepConfig(l2=STRENGTHS_ALL[8:9], embeddings=SETS[:1])),
            lambda: whole_job(x_ND, slices, classes_N, SweepConfig(l2=STRENGTHS_ALL, embeddings=SETS)),
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

    def in_full() -> Spent:
        with all_in_full():
            return sweep(pixels_ND, few, classes_N, mlps)[0]

    table += [
        compare(
            f"MLP of 32 units, {MLP_COLUMNS} columns",
            lambda: sweep(pixels_ND, few, classes_N, mlps[27:28])[0],
            lambda: sweep(pixels_ND, few, classes_N, mlps)[0],
            arguments.rounds,
        ),
        compare(
            "the same, the whole job",
            lambda: whole_job(pixels_ND, few, classes_N, SweepConfig(l2=DECAYS[3:4], learning_rate=RATES[3:4]), **MLPS),
            lambda: whole_job(pixels_ND, few, classes_N, SweepConfig(l2=DECAYS, learning_rate=RATES), **MLPS),
            arguments.rounds,
        ),
        compare(
            "the same, beside one configuration fold by fold as jobs train",
            lambda: alone_loop(pixels_ND, classes_N, mlps[27]),
            lambda: sweep(pixels_ND, few, classes_N, mlps)[0],
            1,
        ),
        compare(
            "the same, every configuration in full: nothing is dropped early",
            lambda: sweep(pixels_ND, few, classes_N, mlps[27:28])[0],
            in_full,
            1,
        ),
    ]
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
    winners = [kept(pixels_ND, classes_N, mlps, seed) for seed in range(arguments.seeds)]
    growth_table = [growth(count) for count in GROWTH_ROWS] if arguments.growth else []
    growth_words = [
        "",
        f"Growth with the rows, {GROWTH_COLUMNS} synthetic columns, 10 classes, seconds:",
        "",
        "| rows | 64 linear classifications | 64 linear regressions | 4 MLPs of 32 units |",
        "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in growth_table),
    ]
    report(
        "sweep",
        "Sweeps: 64 configurations beside one, 5 folds",
        table,
        [
            f"1,797 digits. Linear: {len(SETS)} sets of slices of 1,280, 640, 640 and 320 columns times "
            f"{len(STRENGTHS)} strengths; one configuration reads all 1,280. MLPs: 8 learning rates times 8 weight "
            "decays; all 64 are trained on the first fold for a fifth of the epochs, and the best 6 cross-validated "
            "in full, as the one configuration is. A whole job holds rows out, searches, fits what wins twice, and "
            f"measures, calibrates and looks for doubts. {arguments.rounds} rounds for the first two lines of each, "
            f"one for the others: median (least to most), ratios within a round. Threads: {torch.get_num_threads()}.",
            "",
            "What dropping early finds: cross-entropy, lower is better, of a cross-validation in which nothing was "
            "dropped, on random parts of the digits. Both winners are the simplest within one standard error of the "
            "best that they know.",
            "",
            "| rows | the best of 64 | standard error | winner of all in full | winner with dropping |",
            "|---|---|---|---|---|",
            *("| " + " | ".join(row) + " |" for row in winners),
            *(growth_words if growth_table else ()),
        ],
    )


if __name__ == "__main__":
    main()
