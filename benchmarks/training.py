"""What training costs and gives beside scikit-learn, in this process, on the same rows.

A head is trained as a job trains it, without the cluster around it: penalty by cross-validation, rows held out, a fit,
another on all rows, calibration and doubts. scikit-learn does a single fit of ``LogisticRegression`` (or what suits the
labels) on the same training rows, standardised likewise. The times are of three amounts of work: one fit at a known
penalty and nothing else, which is what scikit-learn does; a job with the penalty given; a job that chooses it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn
import threadpoolctl
import torch
from common import report, summary
from embedding_auto import embed
from sklearn import datasets, linear_model, metrics, multiclass, preprocessing
from trunkline_wire import conformal
from trunkline_wire.specs import POOLED, SliceSpec
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training import softmax
from trunkline_worker.training.loop import Labels, Source, TrainingResult, train_head
from trunkline_worker.training.split import HOLD_OUT, hold_out, random_stream
from trunkline_worker.training.standardise import standardisation

SPEC = JobSpec(model="m", dataset="d", backbone="b", input_size=0, embedding="pooled", validation_fraction=0.25)
PARTS = ("agreement", "time", "growth", "coverage")
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


def fit_ours(problem: Problem, seed: int, strength: float) -> tuple[float, float]:
    """Return the held-out score of one fit and nothing else, and its seconds, standardising included."""
    training, held_out = split(problem, seed)
    indices = np.asarray(problem.labels.class_indices, np.int64)
    raw, truth = torch.from_numpy(problem.x[training]), torch.from_numpy(indices[training])
    started = time.perf_counter()
    fitted = standardisation(raw, [raw.shape[1]])
    design = softmax.prepare_softmax((raw - fitted.mean_D) / fitted.scale_D)
    num_classes = len(problem.labels.class_names)
    solved = softmax.fit_softmax(design, truth, num_classes, strength, on_step=lambda step, loss: None)
    seconds = time.perf_counter() - started
    fresh = (torch.from_numpy(problem.x[held_out]) - fitted.mean_D) / fitted.scale_D
    said = (fresh.to(solved.weights_DK) @ solved.weights_DK + solved.bias_K).argmax(dim=1).numpy()
    return score_of(problem, said, indices[held_out]), seconds


def fit_path(problem: Problem, seed: int) -> float:
    """Return the seconds of scikit-learn where it chooses the penalty too: its own ten strengths, five folds."""
    training, _ = split(problem, seed)
    scaler = preprocessing.StandardScaler().fit(problem.x[training])
    scaled = scaler.transform(problem.x[training])
    path = linear_model.LogisticRegressionCV(
        l1_ratios=(0,), max_iter=1000, scoring="neg_log_loss", use_legacy_attributes=False
    )
    started = time.perf_counter()
    path.fit(scaled, truth_of(problem.labels)[training])
    return time.perf_counter() - started


def timed(problem: Problem, rounds: int, strength: float, *, with_path: bool) -> tuple[str, ...]:
    """Return a row of the table of times. Ratios are of what ran right after each other."""
    columns: dict[str, list[float]] = {one: [] for one in ("theirs", "fit", "given", "chosen", "path")}
    ours, jobs, default = [], [], []
    for seed in range(rounds):
        score, their_s = fit_theirs(problem, seed, strength)
        columns["theirs"].append(their_s)
        own, seconds = fit_ours(problem, seed, strength)
        columns["fit"].append(seconds / their_s)
        ours.append(own)
        default.append(score)
        for name, l2 in (("given", strength), ("chosen", -1.0)):
            started = time.perf_counter()
            result = train(problem, seed, l2=l2)
            columns[name].append((time.perf_counter() - started) / their_s)
        jobs.append(metric_of(result))
        if with_path:
            columns["path"].append(columns["chosen"][-1] * their_s / fit_path(problem, seed))
        print(problem.name, {name: values[-1:] for name, values in columns.items()}, flush=True)
    return (
        f"{problem.name}, C = {1 / strength:g}",
        *(summary(values) if values else "" for values in columns.values()),
        *(f"{statistics.mean(one):.4f}" for one in (ours, jobs, default)),
    )


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


def embedded_digits() -> Problem:
    """Return digits as the last layer of the built-in backbone sees them."""
    embedding_ND, labels, slices = embed()
    (last,) = (one for one in slices if one.name == POOLED)
    x = np.ascontiguousarray(embedding_ND[:, last.start : last.stop])
    return classes(f"digits' embeddings, {len(x):,} x {x.shape[1]:,}", x, labels)


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


def report_agreement(seeds: Sequence[int]) -> None:
    """Held-out scores."""
    report(
        "training_agreement",
        "Training beside scikit-learn: held-out scores and calibration",
        agreement(seeds),
        [f"Means over {len(seeds)} splits, a quarter of the rows held out. ECE: expected calibration error, 15 bins."],
    )


def report_time(notes: Sequence[str], rounds: int, *, is_quick: bool) -> None:
    """Seconds."""
    digits = classes("digits, 1,797 x 64", *datasets.load_digits(return_X_y=True))
    table: list[tuple[str, ...]] = [
        (
            "data",
            "scikit-learn, s",
            "one fit, over it",
            "job, penalty given",
            "job, penalty chosen",
            "over LogisticRegressionCV",
            "accuracy, one fit",
            "job, penalty chosen",
            "scikit-learn",
        )
    ]
    for problem in (digits, embedded_digits()):
        table += [timed(problem, rounds, strength, with_path=strength == 1.0) for strength in (1.0, 10.0)]
    if not is_quick:
        medium = synthetic(5_000, 1280, 10)
        table += [timed(medium, min(rounds, 2), strength, with_path=False) for strength in (1.0, 40.0)]
        table.append(timed(synthetic(50_000, 1280, 10), 1, 1.0, with_path=False))
    report(
        "training_time",
        "Training beside scikit-learn: seconds",
        table,
        [
            "scikit-learn is one `LogisticRegression` at this C on the training rows, three quarters of all. One fit "
            "is the same at the same C. A job fits twice, the second time on all rows, measures, calibrates, draws "
            "intervals and looks for wrong labels and copies; the last but one column of ratios is of jobs that choose "
            "their penalty as well, the last one compares these with `LogisticRegressionCV`, ten strengths and five "
            "folds. Ratios are median (least to most). Accuracies are means over the same splits; those of one "
            "fit and of scikit-learn are at the row's C. Its default is 1.",
            "At C = 1 the wide rows can be learnt by heart, and where scikit-learn's search stops early it has learnt "
            "less of the noise: with `tol=1e-6` it scores what an exact fit does.",
            *notes,
        ],
    )


def report_growth(notes: Sequence[str], *, is_quick: bool) -> None:
    """How the seconds grow."""
    sizes = (1_000, 10_000) if is_quick else (1_000, 10_000, 100_000)
    counts = (10, 100) if is_quick else (10, 100, 1_000)
    grown = [("rows x columns, classes", "seconds", "accuracy")]
    grown += growth(lambda size: synthetic(size, 256, 10), sizes)
    grown += growth(lambda count: synthetic(20_000, 256, count), counts)
    report("training_growth", "How the cost of training grows", grown, notes)


def report_coverage() -> None:
    """Conformal sets."""
    report(
        "conformal_coverage",
        "Sets of classes: how often they hold the truth",
        coverage(range(20)),
        ["Digits, pixels; 600 rows to train on, a quarter of them held out; 1,197 fresh rows; 20 seeds."],
    )


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"What to measure: {', '.join(PARTS)}.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="Of both, so that they share them alike.")
    parser.add_argument("--note", default="", help="What else to say of the machine.")
    parser.add_argument("--quick", action="store_true", help="Small data only: to see that it works.")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: not known; choose from {', '.join(PARTS)}")
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(arguments.threads)
    versions = ", ".join(f"{one.__name__} {one.__version__}" for one in (np, sklearn, torch))
    notes = [f"Threads: {arguments.threads} each. {versions}.{' ' + arguments.note if arguments.note else ''}"]
    with threadpoolctl.threadpool_limits(arguments.threads):
        train(classes("warm-up", *datasets.load_iris(return_X_y=True)), 0)
        if "agreement" in arguments.parts:
            report_agreement(range(arguments.seeds))
        if "time" in arguments.parts:
            report_time(notes, arguments.seeds, is_quick=arguments.quick)
        if "growth" in arguments.parts:
            report_growth(notes, is_quick=arguments.quick)
        if "coverage" in arguments.parts:
            report_coverage()


if __name__ == "__main__":
    main()
