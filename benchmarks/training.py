"""What training costs and gives beside scikit-learn, in this process, on the same rows.

A head is trained as a job trains it, without the cluster around it: penalty by cross-validation, rows held out, a fit,
another on all rows, calibration and doubts. scikit-learn does a single fit of ``LogisticRegression`` (or what suits the
labels) on the same training rows, standardised likewise.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from common import report, summary
from sklearn import datasets, linear_model, metrics, multiclass, preprocessing
from trunkline_wire import conformal
from trunkline_wire.specs import SliceSpec
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.loop import Labels, Source, TrainingResult, train_head
from trunkline_worker.training.split import HOLD_OUT, hold_out, random_stream

SPEC = JobSpec(model="m", dataset="d", backbone="b", input_size=0, embedding="pooled", validation_fraction=0.25)
Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Problem:
    """Rows and what they are."""

    name: str
    x: Rows
    labels: Labels


def classes(name: str, x: Any, y: Any) -> Problem:
    """Return a problem of classes."""
    names, indices = np.unique(y, return_inverse=True)
    return Problem(name, np.asarray(x, np.float32), Labels(tuple(map(str, names)), indices.astype(np.int64)))


def numbers(y: Any) -> Labels:
    """Return labels that are numbers."""
    return Labels((), None, y.astype(np.float32))


def problems() -> list[Problem]:
    """Return what ships with scikit-learn, or is drawn by it."""
    several_x, several_y = datasets.make_multilabel_classification(1000, 40, n_classes=6, random_state=0)
    line_x, line_y = datasets.make_regression(800, 60, n_informative=20, n_targets=3, noise=20.0, random_state=0)
    drawn = datasets.make_classification(2000, 100, n_informative=20, n_classes=5, random_state=0)
    diabetes = datasets.load_diabetes()
    return [
        classes("iris", *datasets.load_iris(return_X_y=True)),
        classes("wine", *datasets.load_wine(return_X_y=True)),
        classes("breast cancer", *datasets.load_breast_cancer(return_X_y=True)),
        classes("digits", *datasets.load_digits(return_X_y=True)),
        classes("make_classification, 2,000 x 100", *drawn),
        Problem(
            "make_multilabel_classification, 1,000 x 40",
            several_x.astype(np.float32),
            Labels(tuple("abcdef"), None, several_y.astype(np.float32)),
        ),
        Problem("diabetes", diabetes.data.astype(np.float32), numbers(diabetes.target[:, None])),
        Problem("make_regression, 800 x 60", line_x.astype(np.float32), numbers(line_y)),
    ]


def train(problem: Problem, seed: int, **changes: Any) -> TrainingResult:
    """Train as a job does."""
    source = Source("b", problem.x, (SliceSpec("pooled", 0, problem.x.shape[1]),))
    spec = replace(SPEC, seed=seed, **changes)
    return train_head([source], problem.labels, spec, on_event=lambda event: None, should_stop=lambda: False)


def truth_of(labels: Labels) -> Any:
    """Return what scikit-learn learns from."""
    return labels.class_indices if labels.targets is None else labels.targets


def split(problem: Problem, seed: int) -> tuple[Any, Any]:
    """Return the rows that ``train`` fits on, and those that it holds out."""
    indices = problem.labels.class_indices
    own = None if indices is None else np.asarray(indices, np.int64)
    return hold_out(own, len(problem.x), SPEC.validation_fraction, random_stream(seed, HOLD_OUT))


def theirs(problem: Problem, strength: float | None) -> Any:
    """Return scikit-learn's model for a problem, at a strength or at its default."""
    if not problem.labels.class_names:
        return linear_model.Ridge(alpha=1.0 if strength is None else strength)
    own = linear_model.LogisticRegression(C=1.0 if strength is None else 1.0 / strength, max_iter=1000)
    return multiclass.OneVsRestClassifier(own) if problem.labels.targets is not None else own


def score_of(problem: Problem, said: Any, truth: Any) -> float:
    """Return accuracy, micro F1 or r2."""
    if not problem.labels.class_names:
        return float(metrics.r2_score(truth, said))
    if problem.labels.targets is not None:
        return float(metrics.f1_score(truth, said, average="micro"))
    return float(metrics.accuracy_score(truth, said))


def fit_theirs(problem: Problem, seed: int, strength: float | None) -> tuple[float, float]:
    """Return the held-out score of scikit-learn, and its seconds, standardising included."""
    training, held_out = split(problem, seed)
    truth = truth_of(problem.labels)
    started = time.perf_counter()
    scaler = preprocessing.StandardScaler().fit(problem.x[training])
    model = theirs(problem, strength).fit(scaler.transform(problem.x[training]), truth[training])
    seconds = time.perf_counter() - started
    return score_of(problem, model.predict(scaler.transform(problem.x[held_out])), truth[held_out]), seconds


def metric_of(result: TrainingResult) -> float:
    """Return the same score of a training."""
    return next(result.metrics[name] for name in ("accuracy", "f1_micro", "r2") if name in result.metrics)


def agreement(seeds: Sequence[int]) -> list[tuple[str, ...]]:
    """Return the table of held-out scores: ours, scikit-learn's, and scikit-learn's at the strength we chose."""
    table: list[tuple[str, ...]] = [
        ("data", "score", "ours", "scikit-learn", "scikit-learn, our strength", "ECE before", "after")
    ]
    for problem in problems():
        ours, default, same, before, after = [], [], [], [], []
        for seed in seeds:
            result = train(problem, seed)
            ours.append(metric_of(result))
            default.append(fit_theirs(problem, seed, None)[0])
            same.append(fit_theirs(problem, seed, result.metrics["l2"])[0])
            if "ece" in result.metrics:
                before.append(result.metrics["ece_uncalibrated"])
                after.append(result.metrics["ece"])
        kind = "r2" if not problem.labels.class_names else "accuracy" if problem.labels.targets is None else "micro F1"
        means = [f"{statistics.mean(one):.4f}" if one else "" for one in (ours, default, same, before, after)]
        table.append((problem.name, kind, *means))
    return table


def timed(problem: Problem, rounds: int) -> tuple[str, ...]:
    """Return a row of the table of times."""
    ratios, fixed, ours, default = [], [], [], []
    for seed in range(rounds):
        started = time.perf_counter()
        result = train(problem, seed)
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        train(problem, seed, l2=1.0)
        known = time.perf_counter() - started
        score, their_s = fit_theirs(problem, seed, None)
        ratios.append(seconds / their_s)
        fixed.append(known / their_s)
        ours.append(metric_of(result))
        default.append(score)
    accuracies = (f"{statistics.mean(ours):.4f}", f"{statistics.mean(default):.4f}")
    return problem.name, f"{their_s:.2f}", summary(ratios), summary(fixed), *accuracies


def synthetic(num_rows: int, num_columns: int, num_classes: int, seed: int = 0) -> Problem:
    """Return classes that overlap, as embeddings do: a low-dimensional signal in columns that go together."""
    draw = np.random.default_rng(seed)
    y = draw.permutation(np.arange(num_rows) % num_classes)
    hidden = draw.normal(size=(num_classes, 32)).astype(np.float32)[y] + 1.5 * draw.normal(size=(num_rows, 32)).astype(
        np.float32
    )
    mixing = draw.normal(size=(32, num_columns)).astype(np.float32) / 6
    x = np.maximum(hidden @ mixing + 0.5 * draw.normal(size=(num_rows, num_columns)).astype(np.float32), 0)
    return classes(f"{num_rows:,} x {num_columns:,}, {num_classes} classes", x, y)


def growth(make: Callable[[int], Problem], sizes: Sequence[int]) -> list[tuple[str, ...]]:
    """Return rows of the table of cost growth."""
    rows = []
    for size in sizes:
        problem = make(size)
        started = time.perf_counter()
        result = train(problem, 0)
        rows.append((problem.name, f"{time.perf_counter() - started:.2f}", f"{metric_of(result):.3f}"))
    return rows


def coverage(seeds: Sequence[int]) -> list[tuple[str, ...]]:
    """Return how often sets of digits hold the truth on rows that training never saw."""
    x, y = datasets.load_digits(return_X_y=True)
    hits: dict[float, list[float]] = {0.8: [], 0.9: [], 0.95: []}
    sizes: dict[float, list[float]] = {one: [] for one in hits}
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(y))
        seen, fresh = order[:600], order[600:]
        result = train(classes("digits", x[seen], y[seen]), seed)
        said = result.head.predict(torch.from_numpy(x[fresh].astype(np.float32))).numpy()
        assert result.conformal is not None
        for asked in hits:
            edge = conformal.threshold(result.conformal.scores, result.conformal.num_rows, asked)
            inside = conformal.sets(said, edge)
            hits[asked].append(float(inside[np.arange(len(fresh)), y[fresh]].mean()))
            sizes[asked].append(float(inside.sum(axis=1).mean()))
    return [("asked for", "held the truth", "classes a set")] + [
        (f"{asked:.2f}", summary(hits[asked]), f"{statistics.mean(sizes[asked]):.2f}") for asked in hits
    ]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="Small data only: to see that it works.")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    seeds = range(arguments.seeds)
    train(classes("warm-up", *datasets.load_iris(return_X_y=True)), 0)
    report(
        "training_agreement",
        "Training beside scikit-learn: held-out scores and calibration",
        agreement(seeds),
        [f"Means over {len(seeds)} splits, a quarter of the rows held out. ECE: expected calibration error, 15 bins."],
    )
    digits = classes("digits, 1,797 x 64", *datasets.load_digits(return_X_y=True))
    large = synthetic(5_000 if arguments.quick else 50_000, 1280, 10)
    table: list[tuple[str, ...]] = [
        (
            "data",
            "scikit-learn, s",
            "job over scikit-learn",
            "the same, penalty given",
            "accuracy, ours",
            "scikit-learn",
        )
    ]
    table += [timed(digits, 5), timed(large, 1 if arguments.quick else 2)]
    report(
        "training_time",
        "Training beside scikit-learn: seconds",
        table,
        [
            "A job chooses its penalty, fits twice, calibrates and looks for doubts; scikit-learn is one "
            "`LogisticRegression(C=1)` on the same training rows. Ratios are median (least to most).",
            f"{torch.get_num_threads()} threads each.",
        ],
    )
    sizes = (1_000, 10_000) if arguments.quick else (1_000, 10_000, 100_000)
    counts = (10, 100) if arguments.quick else (10, 100, 1_000)
    grown = [("rows x columns, classes", "seconds", "accuracy")]
    grown += growth(lambda size: synthetic(size, 256, 10), sizes)
    grown += growth(lambda count: synthetic(20_000, 256, count), counts)
    report("training_growth", "How the cost of training grows", grown)
    report(
        "conformal_coverage",
        "Sets of classes: how often they hold the truth",
        coverage(range(20)),
        ["Digits, pixels; 600 rows to train on, a quarter of them held out; 1,197 fresh rows; 20 seeds."],
    )


if __name__ == "__main__":
    main()
