"""What training says of how far a head may be believed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn import metrics
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from trunkline_wire import conformal
from trunkline_wire.fits import LossConfig
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import SliceSpec
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.loop import Labels, Source, TrainingResult, train_head
from trunkline_worker.training.split import HOLD_OUT, hold_out, random_stream
from trunkline_worker.training.trust import headline
from trunkline_worker.training.trust.headline import headline_intervals

SPEC = JobSpec(model="m", dataset="d", backbone="b", input_size=0, embedding="pooled", l2=0.1, validation_fraction=0.3)
NAMES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def train(
    x: npt.NDArray[np.float32], labels: Labels, row_ids: tuple[bytes, ...] = (), **changes: Any
) -> TrainingResult:
    return train_head(
        [Source("b", x, (SliceSpec("pooled", 0, x.shape[1]),))],
        labels,
        replace(SPEC, **changes),
        row_ids=row_ids,
        on_event=lambda event: None,
        should_stop=lambda: False,
    )


def classes(num_rows: int, seed: int, gap: float = 1.5) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    draw = np.random.default_rng(seed)
    truth = draw.permutation(np.arange(num_rows) % 3)
    x = draw.normal(size=(num_rows, 5)).astype(np.float32)
    x[:, :3] += gap * np.eye(3, dtype=np.float32)[truth]
    return x, truth


def numbers(num_rows: int, seed: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(num_rows, 5)).astype(np.float32)
    targets = np.stack([x @ np.arange(5) * 30, x[:, 0] - 4], axis=1) + draw.normal(size=(num_rows, 2)) * [20.0, 0.5]
    return x, targets.astype(np.float32)


def test_sets_hold_the_truth_as_often_as_was_asked_for() -> None:
    for coverage in (0.8, 0.95):
        hits = []
        for seed in range(20):
            x, truth = classes(400, seed)
            result = train(x, Labels(NAMES, truth))
            assert result.conformal is not None
            assert result.conformal.num_rows == result.metrics["num_validation_rows"]
            fresh, theirs = classes(500, seed + 1000)
            said = result.head.predict(torch.from_numpy(fresh)).numpy()
            edge = conformal.threshold(result.conformal.scores, result.conformal.num_rows, coverage)
            hits.append(conformal.sets(said, edge)[np.arange(500), theirs].mean())
        # 20 thresholds of 120 rows each: the mean lies this near in all but a few of a thousand such tests.
        assert coverage - 0.025 < np.mean(hits) < coverage + 0.035


def test_intervals_hold_the_truth_as_often_as_was_asked_for() -> None:
    hits = []
    for seed in range(20):
        x, targets = numbers(300, seed)
        result = train(x, Labels((), None, targets))
        assert result.conformal is not None
        fresh, theirs = numbers(500, seed + 1000)
        said = result.head.predict(torch.from_numpy(fresh)).numpy()
        edge = conformal.threshold(result.conformal.scores, result.conformal.num_rows, 0.9)
        low, high = conformal.intervals(said, edge, np.array(result.conformal.scales))
        hits.append(((low <= theirs) & (theirs <= high)).all(axis=1).mean())
    assert 0.87 < np.mean(hits) < 0.935


@pytest.mark.parametrize("order", [(), NAMES], ids=["classes", "in order"])
def test_probabilities_are_brought_to_scale(order: tuple[str, ...]) -> None:
    x, truth = classes(1500, 0, gap=1.0)
    draw = np.random.default_rng(1)
    # Columns of noise, hardly a penalty and few rows to train on: a head that is far too sure.
    x = np.concatenate([x, draw.normal(size=(1500, 150)).astype(np.float32)], axis=1)
    spec = {"l2": 1e-3, "validation_fraction": 0.8, "refit": False, "loss": LossConfig(class_order=order)}
    plain = train(x, Labels(NAMES, truth), calibrate=False, **spec)
    scaled = train(x, Labels(NAMES, truth), **spec)
    temperature = scaled.metrics["temperature"]
    assert temperature > 1.5
    assert scaled.metrics["ece"] < 0.5 * scaled.metrics["ece_uncalibrated"]
    assert scaled.metrics["cross_entropy"] < plain.metrics["cross_entropy"]
    if not order:  # the likeliest class stays what it was
        assert scaled.metrics["accuracy"] == plain.metrics["accuracy"]
    torch.testing.assert_close(scaled.head.head.output.weight * temperature, plain.head.head.output.weight)
    assert "temperature" not in plain.metrics


def test_copies_among_the_held_out_rows_are_told() -> None:
    x, truth = classes(120, 3)
    training, held_out = hold_out(truth, 120, 0.3, random_stream(SPEC.seed, HOLD_OUT))
    ids = [bytes([row]) for row in range(120)]
    clean = train(x, Labels(NAMES, truth), tuple(ids))
    assert not any("same content" in one for one in clean.warnings)
    ids[held_out[0]] = ids[training[0]]
    told = train(x, Labels(NAMES, truth), tuple(ids))
    assert any("1 of 36 held-out rows have the same content as a training row" in one for one in told.warnings)
    x[held_out[1]] = x[training[1]]
    told = train(x, Labels(NAMES, truth))
    assert any("exactly the embedding of a training row" in one for one in told.warnings)


def test_wrong_labels_too_few_rows_and_unequal_classes_are_told() -> None:
    x, truth = classes(300, 4, gap=6.0)
    assert train(x, Labels(NAMES, truth)).warnings == ()
    wrong = truth.copy()
    wrong[:30] = (wrong[:30] + 1) % 3
    (doubt,) = (one for one in train(x, Labels(NAMES, wrong)).warnings if "look wrong" in one)
    assert 20 <= int(doubt.split()[0]) <= 32
    assert "of 300 labels" in doubt
    few = train(*_first(x, truth, 20))
    assert any("may lie anywhere" in one for one in few.warnings)
    rare = np.flatnonzero((truth != 2) | (np.cumsum(truth == 2) <= 5))
    assert any("class_weights='balanced'" in one for one in train(x[rare], Labels(NAMES, truth[rare])).warnings)
    none = train(x, Labels(NAMES, truth), validation_fraction=0.0)
    assert none.conformal is None
    assert "ece" not in none.metrics


def test_wrong_labels_of_held_out_rows_are_found_by_the_head_itself() -> None:
    x, truth = classes(2400, 6, gap=6.0)
    wrong = truth.copy()
    _, held_out = hold_out(truth, 2400, 0.3, random_stream(SPEC.seed, HOLD_OUT))
    turned = {int(row) for row in held_out[::20]}
    wrong[sorted(turned)] = (wrong[sorted(turned)] + 1) % 3
    for l2 in (0.1, -1.0):
        # Which rows are held out depends on the labels given: some of those turned are trained on now.
        result = train(x, Labels(NAMES, wrong), l2=l2)
        assert result.evaluation is not None
        _, held_out = hold_out(wrong, 2400, 0.3, random_stream(SPEC.seed, HOLD_OUT))
        found = {one.row for one in result.evaluation.suspects}
        there = turned & set(held_out.tolist())
        assert len(there) >= 5
        assert len(there & found) >= 0.8 * len(there)
        assert len(found - turned) <= 5
        margins = [one.margin for one in result.evaluation.suspects]
        assert margins == sorted(margins, reverse=True)


def test_wine_is_told_apart_as_well_as_by_scikit_learn() -> None:
    """Its columns are in units of their own: proline in hundreds, hue around one."""
    x, truth = load_wine(return_X_y=True)
    ours, theirs = [], []
    for seed in range(5):
        result = train(x.astype(np.float32), Labels(NAMES, truth), seed=seed, l2=-1.0, validation_fraction=0.25)
        training, held_out = hold_out(truth, len(x), 0.25, random_stream(seed, HOLD_OUT))
        own = make_pipeline(StandardScaler(), LogisticRegression()).fit(x[training], truth[training])
        ours.append(result.metrics["accuracy"])
        theirs.append(own.score(x[held_out], truth[held_out]))
    assert np.mean(ours) >= np.mean(theirs) - 0.003


def _first(x: npt.NDArray[np.float32], truth: npt.NDArray[np.int64], count: int) -> tuple[Any, Labels]:
    picked = np.concatenate([np.flatnonzero(truth == one)[: count // 3] for one in range(3)])
    return x[picked], Labels(NAMES, truth[picked])


@pytest.mark.parametrize("task", ["classification", "multi_label", "regression"])
def test_headline_scores_on_each_resample_are_scikit_learns(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One resample that takes every row once: the interval is the score itself."""
    draw = np.random.default_rng(0)
    monkeypatch.setattr(
        headline, "_resampled", lambda sums, counts, generator: (counts @ sums)[None].repeat(1000, axis=0)
    )
    answers = draw.dirichlet(np.ones(4), size=200)
    said = answers.argmax(axis=1)
    if task == "classification":
        truth: npt.NDArray[Any] = draw.integers(0, 3, size=200)  # the last class has no row
        expected = {
            "accuracy": metrics.accuracy_score(truth, said),
            "balanced_accuracy": metrics.recall_score(truth, said, labels=[0, 1, 2], average="macro"),
            "f1_macro": metrics.f1_score(truth, said, average="macro", zero_division=0),
        }
    elif task == "multi_label":
        truth = (draw.random(size=(200, 4)) < 0.4).astype(np.float64)
        expected = {
            "subset_accuracy": metrics.accuracy_score(truth, answers > 0.5),
            "f1_micro": metrics.f1_score(truth, answers > 0.5, average="micro"),
            "f1_macro": metrics.f1_score(truth, answers > 0.5, average="macro"),
        }
    else:
        truth = answers * 3 + draw.normal(size=(200, 4)) + 1000
        expected = {
            "rmse": metrics.root_mean_squared_error(truth, answers),
            "mae": metrics.mean_absolute_error(truth, answers),
            "r2": metrics.r2_score(truth, answers),
        }
    found = headline_intervals(task, answers, truth, draw)
    assert set(found) == set(expected)
    for name, (low, high) in found.items():
        assert low == pytest.approx(expected[name], rel=1e-6), name
        assert high == low


def test_intervals_cover_and_shrink() -> None:
    draw = np.random.default_rng(0)
    widths = {}
    for num_rows in (100, 400):
        inside = 0
        for _ in range(100):
            right = draw.random(num_rows) < 0.8
            answers = np.stack([right, ~right], axis=1).astype(np.float64)
            low, high = headline_intervals("classification", answers, np.zeros(num_rows, np.int64), draw)["accuracy"]
            inside += low <= 0.8 <= high
            widths[num_rows] = high - low
        assert inside >= 87
    assert widths[400] < 0.7 * widths[100]
    assert headline_intervals("classification", np.ones((1, 2)), np.zeros(1, np.int64), draw) == {}


def test_equal_jobs_are_assessed_alike() -> None:
    x, truth = classes(200, 5)
    head = HeadConfig("mlp", (8,))
    one, other = (train(x, Labels(NAMES, truth), head=head, solver="adamw", epochs=5) for _ in range(2))
    assert one.metrics == other.metrics
    assert one.conformal == other.conformal
    assert one.warnings == other.warnings
