import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import LossConfig
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import SliceSpec
from trunkline_worker.heads.artefact import head_from_bytes, head_to_bytes
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head
from trunkline_worker.store.records import Event, JobSpec
from trunkline_worker.training.choose import choose_l2
from trunkline_worker.training.fit import Fit, Rows, fit_head
from trunkline_worker.training.learner import Schedule
from trunkline_worker.training.loop import Labels, Source, TrainingCancelled, TrainingResult, train_head
from trunkline_worker.training.minibatch import Split, fit_minibatches
from trunkline_worker.training.objective import Objective
from trunkline_worker.training.progress import Progress
from trunkline_worker.training.split import HOLD_OUT, hold_out, random_stream

SLICES = (SliceSpec("a/mean", 0, 4), SliceSpec("a/grid", 4, 20), SliceSpec("pooled", 20, 30))
NAMES = ("cat", "dog", "hen")
SPEC = JobSpec(model="m", dataset="d", backbone="b", input_size=0, seed=7)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def rows_and_labels(num_rows: int = 90, seed: int = 0) -> tuple[np.ndarray, Labels]:
    """Return rows whose class shows in `a/grid` only."""
    draw = np.random.default_rng(seed)
    classes = draw.permutation(np.arange(num_rows) % 3)
    x = draw.normal(size=(num_rows, 30)).astype(np.float32) * 5 + 3
    centres = np.random.default_rng(99).normal(size=(3, 16))
    x[:, 4:20] += 6 * centres[classes].astype(np.float32)
    return x, Labels(NAMES, classes.astype(np.uint32))


def numbers(num_rows: int = 90) -> tuple[np.ndarray, Labels]:
    x, _ = rows_and_labels(num_rows)
    weights = np.random.default_rng(3).normal(size=(16, 2)).astype(np.float32)
    return x, Labels((), None, 40 * x[:, 4:20] @ weights + 1000)


def train(spec: JobSpec, x: np.ndarray, labels: Labels) -> tuple[TrainingResult, list[Event]]:
    events: list[Event] = []
    return train_head([Source("b", x, SLICES)], labels, spec, on_event=events.append, should_stop=lambda: False), events


def accuracy(result: TrainingResult, seed: int = 1) -> float:
    """Return the accuracy on rows that no training saw."""
    x, labels = rows_and_labels(300, seed)
    columns = np.concatenate([np.arange(one.start, one.stop) for one in SLICES if one.name in result.head.slices])
    answer = result.head.predict(torch.from_numpy(x[:, columns])).argmax(dim=1).numpy()
    return float((answer == labels.class_indices).mean())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"refit": False},
        {"validation_fraction": 0.0},
        {"l2": 5.0},
        {"solver": "adamw", "epochs": 30},
        {"head": HeadConfig("mlp", (16,), dropout=0.3, batch_norm=True), "solver": "adamw", "epochs": 30},
    ],
)
def test_a_classifier_learns_and_equal_jobs_give_equal_bytes(changes: dict) -> None:
    x, labels = rows_and_labels()
    spec = replace(SPEC, **changes)
    result, events = train(spec, x, labels)
    assert "a/grid" in result.head.slices
    assert accuracy(result) > 0.9
    assert result.head.class_names == NAMES
    assert result.metrics["num_rows"] == 90
    assert ("accuracy" in result.metrics) == (spec.validation_fraction > 0)
    assert all(np.isfinite(one) for one in result.metrics.values())
    if spec.l2 >= 0:
        assert result.metrics["l2"] == spec.l2
    assert result.candidates[0].slices == result.head.slices
    data = head_to_bytes(result.head)
    assert head_to_bytes(head_from_bytes(data)) == data
    again, _ = train(spec, x.copy(), labels)
    assert hashlib.sha256(head_to_bytes(again.head)).digest() == hashlib.sha256(data).digest()
    assert again.metrics == result.metrics
    assert 2 < len(events) <= 60
    assert {one.phase for one in events} == {"select", "fit", "assess"}
    for phase in ("select", "fit", "assess"):
        progress = [one.progress for one in events if one.phase == phase]
        assert progress == sorted(progress)
        assert (progress[0], progress[-1]) == (0.0, 1.0)


def test_another_seed_gives_another_head() -> None:
    x, labels = rows_and_labels()
    one, other = (train(replace(SPEC, seed=seed), x, labels)[0] for seed in (1, 2))
    assert head_to_bytes(one.head) != head_to_bytes(other.head)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"validation_fraction": 0.0},
        {"l2": 1.0, "embedding": "slices", "slices": ("pooled", "a/grid")},
        {"solver": "adamw", "epochs": 120},
        {"head": HeadConfig("mlp", (256,)), "solver": "adamw", "epochs": 120},
    ],
)
def test_regression_learns(changes: dict) -> None:
    x, labels = numbers()
    result, _ = train(replace(SPEC, **changes), x, labels)
    assert result.head.task == "regression"
    assert result.head.num_outputs == 2
    kind = changes.get("head", HeadConfig()).kind
    assert result.metrics.get("r2", 1.0) > (0.7 if kind == "mlp" else 0.95)
    columns = np.concatenate([np.arange(one.start, one.stop) for one in SLICES if one.name in result.head.slices])
    off = result.head.predict(torch.from_numpy(x[:, columns])).numpy() - labels.targets
    assert np.abs(off).mean() < 0.2 * labels.targets.std()


def test_what_is_held_out_is_not_seen() -> None:
    """The scores are those of a head fitted on the training split alone: with labels at random they are chance."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(120, 30)).astype(np.float32)
    labels = Labels(("a", "b"), draw.integers(0, 2, size=120))
    result, _ = train(replace(SPEC, embedding="pooled", l2=1e-3, validation_fraction=0.5), x, labels)
    assert result.metrics["accuracy"] < 0.7
    assert result.metrics["num_validation_rows"] in (59, 60, 61)


def test_standardisation_is_fitted_on_the_training_split_then_on_all() -> None:
    x, labels = rows_and_labels()
    spec = replace(SPEC, embedding="pooled", l2=1.0)
    refitted, _ = train(spec, x, labels)
    np.testing.assert_allclose(refitted.head.head.mean.numpy(), x[:, 20:].mean(0), rtol=1e-5)
    kept, _ = train(replace(spec, refit=False), x, labels)
    assert not np.allclose(kept.head.head.mean.numpy(), x[:, 20:].mean(0), rtol=1e-5)
    assert kept.metrics == refitted.metrics


def test_adam_reaches_what_lbfgs_reaches() -> None:
    x, labels = rows_and_labels()
    spec = replace(SPEC, embedding="slices", slices=("a/grid",), l2=10.0, validation_fraction=0.0)
    exact, _ = train(spec, x, labels)
    steps, _ = train(replace(spec, solver="adamw", epochs=400, learning_rate=0.01), x, labels)
    np.testing.assert_allclose(
        steps.head.head.linears[0].weight.detach().numpy(),
        exact.head.head.linears[0].weight.detach().numpy(),
        atol=0.02,
    )


def test_rows_that_cannot_be_written_to_and_a_constant_column_are_fine() -> None:
    x, labels = rows_and_labels()
    x[:, 25] = 4.0
    x.flags.writeable = False
    result, _ = train(replace(SPEC, embedding="pooled"), x, labels)
    assert bool(torch.isfinite(result.head.head.linears[0].weight).all())
    spread = x[:, 20:].astype(np.float64).std(axis=0)
    assert float(result.head.head.scale[5]) == pytest.approx(0.1 * spread.mean(), rel=1e-4)


def test_cancelling_stops_between_steps_wherever_it_happens() -> None:
    x, labels = rows_and_labels()
    spec = replace(SPEC, solver="adamw", epochs=3)
    asked = 0

    def count() -> bool:
        nonlocal asked
        asked += 1
        return False

    train_head([Source("b", x, SLICES)], labels, spec, on_event=lambda event: None, should_stop=count)
    assert asked > 20
    for stop_at in range(1, asked + 1, 5):
        left = iter(range(stop_at))
        calls = []

        def stop(left: object = left, calls: list[int] = calls) -> bool:
            calls.append(1)
            return next(left, None) is None  # type: ignore[call-overload]

        if stop_at < asked:
            with pytest.raises(TrainingCancelled):
                train_head([Source("b", x, SLICES)], labels, spec, on_event=lambda event: None, should_stop=stop)
            assert len(calls) == stop_at + 1


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"solver": "lbfgs", "head": HeadConfig("mlp", (8,))}, ErrorCode.INVALID_ARGUMENT, "solver 'adamw'"),
        ({"solver": "lbfgs", "head": HeadConfig(fuse="add")}, ErrorCode.INVALID_ARGUMENT, "solver 'adamw'"),
        ({"solver": "adamw", "head": HeadConfig("prototype")}, ErrorCode.INVALID_ARGUMENT, "closed form"),
        (
            {"solver": "adamw", "head": HeadConfig("mlp", (8,), batch_norm=True), "batch_size": 1},
            ErrorCode.INVALID_ARGUMENT,
            "at least 2 rows",
        ),
        ({"loss": LossConfig("huber")}, ErrorCode.INVALID_ARGUMENT, "not one for classes"),
        ({"loss": LossConfig("focal")}, ErrorCode.INVALID_ARGUMENT, "train with solver 'adamw'"),
        ({"loss": LossConfig(class_weights=(1.0,))}, ErrorCode.INVALID_ARGUMENT, "one for each is needed"),
        ({"select_by": "rmse"}, ErrorCode.INVALID_ARGUMENT, "not a metric of classes"),
        ({"loss": LossConfig("huber"), "head": HeadConfig("prototype")}, ErrorCode.INVALID_ARGUMENT, "no loss"),
        ({"solver": "sgd"}, ErrorCode.INVALID_ARGUMENT, "'sgd'"),
        ({"embedding": "best"}, ErrorCode.INVALID_ARGUMENT, "'best'"),
        ({"embedding": "slices"}, ErrorCode.INVALID_ARGUMENT, "slices are named"),
        ({"slices": ("pooled",)}, ErrorCode.INVALID_ARGUMENT, "slices are named"),
        ({"embedding": "slices", "slices": ("pooled", "pooled")}, ErrorCode.INVALID_ARGUMENT, "twice"),
        ({"embedding": "slices", "slices": ("b/grid",)}, ErrorCode.NOT_FOUND, "'b/grid'.*a/grid, a/mean, pooled"),
        ({"validation_fraction": 1.0}, ErrorCode.INVALID_ARGUMENT, "below 1"),
        ({"validation_fraction": float("nan")}, ErrorCode.INVALID_ARGUMENT, "below 1"),
        ({"epochs": -1}, ErrorCode.INVALID_ARGUMENT, "epochs"),
        ({"learning_rate": float("inf")}, ErrorCode.INVALID_ARGUMENT, "learning rate"),
        ({"l2": float("nan")}, ErrorCode.INVALID_ARGUMENT, "L2"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(changes: dict, code: ErrorCode, words: str) -> None:
    x, labels = rows_and_labels(12)
    with pytest.raises(WireError, match=words) as caught:
        train(replace(SPEC, **changes), x, labels)
    assert caught.value.code is code


def test_a_row_that_could_not_be_embedded_is_named() -> None:
    x, labels = rows_and_labels()
    x[41, 7] = np.nan
    with pytest.raises(WireError, match="row 41") as caught:
        train(replace(SPEC, embedding="pooled"), x, labels)
    assert caught.value.code is ErrorCode.NOT_FINITE


def test_a_class_with_one_row_trains_when_nothing_is_held_out() -> None:
    x, _ = rows_and_labels(9)
    labels = Labels(("a", "b"), np.array([0] * 8 + [1]))
    with pytest.raises(WireError, match="single row") as caught:
        train(SPEC, x, labels)
    assert caught.value.code is ErrorCode.BAD_LABELS
    result, _ = train(replace(SPEC, validation_fraction=0.0), x, labels)
    assert result.metrics["train_accuracy"] > 0.8


def test_too_few_rows_for_auto_say_what_to_do() -> None:
    x, _ = rows_and_labels(3)
    with pytest.raises(WireError, match="'pooled'") as caught:
        train(replace(SPEC, validation_fraction=0.0), x, Labels(NAMES, np.array([0, 1, 2])))
    assert caught.value.code is ErrorCode.BAD_LABELS


def test_a_loss_that_explodes_says_so() -> None:
    split = Split(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2)
    with pytest.raises(WireError, match=r"no longer finite.*learning rate below 1e\+30"):
        fit_minibatches(
            Head(HeadConfig("mlp", (8, 8)), [HeadInput(("a",), (3,))], 2),
            Objective("classification", LossConfig()),
            split,
            None,
            Schedule(epochs=9, batch_size=20, learning_rate=1e30, l2=0.0),
            seed=0,
            check=lambda: None,
            on_epoch=lambda epoch, losses: None,
        )


def test_the_best_epoch_is_kept() -> None:
    draw = torch.Generator().manual_seed(0)
    training = Split(torch.randn(24, 40, generator=draw), torch.arange(24) % 2)
    validation = Split(torch.randn(200, 40, generator=draw), torch.arange(200) % 2)
    head = Head(HeadConfig("mlp", (64,)), [HeadInput(("a",), (40,))], 2)
    losses: list[float] = []
    best = fit_minibatches(
        head,
        Objective("classification", LossConfig()),
        training,
        validation,
        Schedule(epochs=60, batch_size=8, learning_rate=1e-3, l2=0.0),
        seed=0,
        check=lambda: None,
        on_epoch=lambda epoch, metrics: losses.append(metrics["validation_loss"]),
    )
    assert len(losses) == 60
    assert best == 1 + int(np.argmin(losses)) < 60
    with torch.no_grad():
        got = torch.nn.functional.cross_entropy(head.forward_standardised(validation.x_ND), validation.truth)
    assert float(got) == pytest.approx(min(losses), rel=1e-5)


def test_joined_slices_are_balanced_in_the_head_as_in_the_selection() -> None:
    x, labels = rows_and_labels()
    spec = replace(SPEC, embedding="slices", slices=("a/mean", "a/grid"), l2=1.0)
    scaled = train(spec, x, labels)[0].head.head.standardise(torch.from_numpy(x[:, :20]))
    variance = scaled.var(dim=0, correction=0)
    assert float(variance[:4].sum()) == pytest.approx(10.0, rel=1e-4)
    assert float(variance[4:].sum()) == pytest.approx(10.0, rel=1e-4)


def test_every_step_asks_whether_to_stop() -> None:
    split = Split(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2)
    asked: list[int] = []
    fit_minibatches(
        Head(HeadConfig(), [HeadInput(("a",), (3,))], 2),
        Objective("classification", LossConfig()),
        split,
        None,
        Schedule(epochs=2, batch_size=5, learning_rate=0.1, l2=0.0),
        seed=0,
        check=lambda: asked.append(1),
        on_epoch=lambda epoch, losses: None,
    )
    assert len(asked) == 8


def test_the_refit_starts_from_the_fit_before_it() -> None:
    x, labels = rows_and_labels()
    assert labels.class_indices is not None
    rows = Rows(torch.from_numpy(x), torch.from_numpy(labels.class_indices.astype(np.int64)))
    first = rows.take(torch.arange(85))

    def fit(on: Rows, before: Fit | None) -> Fit:
        progress = Progress(lambda event: None, lambda: False)
        return fit_head(
            SPEC,
            "classification",
            3,
            [HeadInput(("a",), (30,))],
            on,
            None,
            30.0,
            progress,
            span=(0.0, 1.0),
            before=before,
        )

    cold = fit(rows, None)
    warm = fit(rows, fit(first, None))
    assert warm.details["num_iterations"] < cold.details["num_iterations"]
    same = fit(rows, cold)
    assert same.details["num_iterations"] <= 1
    np.testing.assert_allclose(warm.head(rows.x_ND).numpy(), cold.head(rows.x_ND).numpy(), atol=0.02)


def test_many_classes_are_subsampled_for_the_selection() -> None:
    draw = np.random.default_rng(0)
    classes = np.repeat(np.arange(90), 6)
    x = draw.normal(size=(540, 30)).astype(np.float32)
    x[:, 4:20] += 3 * draw.normal(size=(90, 16)).astype(np.float32)[classes]
    result, _ = train(SPEC, x, Labels(tuple(map(str, range(90))), classes))
    assert "a/grid" in result.head.slices
    assert result.head.num_outputs == 90
    assert result.metrics["accuracy"] > 0.5


def test_the_select_event_names_the_choice_and_the_runner_up() -> None:
    x, labels = rows_and_labels()
    result, events = train(SPEC, x, labels)
    best, second = result.candidates[:2]
    event = [one for one in events if one.phase == "select"][-1]
    for one in (best, second):
        assert f"{', '.join(one.slices)} (score {one.score:.3f}, accuracy {one.accuracy:.3f})" in event.message
    assert event.message.startswith("chose ")
    assert event.metrics["num_candidates"] == len(result.candidates)
    assert event.metrics["score"] == best.score
    x, labels = numbers()
    result, events = train(SPEC, x, labels)
    event = [one for one in events if one.phase == "select"][-1]
    assert f"(score {result.candidates[0].score:.3f})" in event.message
    assert "accuracy" not in event.message


def test_an_embedding_of_one_slice_leaves_no_runner_up() -> None:
    x, labels = rows_and_labels()
    events: list[Event] = []
    result = train_head(
        [Source("b", x, (SliceSpec("pooled", 0, 30),))], labels, SPEC, on_event=events.append, should_stop=lambda: False
    )
    assert [one.slices for one in result.candidates] == [("pooled",)]
    assert "nothing else" in [one for one in events if one.phase == "select"][-1].message


def test_rows_that_are_held_out_have_no_part_in_any_choice() -> None:
    x, labels = rows_and_labels()
    spec = replace(SPEC, refit=False, calibrate=False)
    training, validation = hold_out(
        np.asarray(labels.class_indices, np.int64), 90, spec.validation_fraction, random_stream(spec.seed, HOLD_OUT)
    )
    changed = x.copy()
    changed[validation] = np.random.default_rng(5).normal(size=(len(validation), 30)) * 100
    one, other = train(spec, x, labels)[0], train(spec, changed, labels)[0]
    assert one.candidates == other.candidates
    assert one.metrics["l2"] == other.metrics["l2"]
    assert head_to_bytes(one.head) == head_to_bytes(other.head)
    assert one.metrics["accuracy"] > other.metrics["accuracy"] + 0.2
    assert len(training) + len(validation) == 90


def test_rows_uploaded_twice_do_not_vouch_for_each_other() -> None:
    """Every row is there four times: a slice of noise would predict each by its twins."""
    draw = np.random.default_rng(0)
    classes = np.arange(40) % 4
    x = draw.normal(size=(40, 30)).astype(np.float32)
    x[:, 4:20] += 1.5 * draw.normal(size=(4, 16))[classes]
    labels = Labels(("a", "b", "c", "d"), np.tile(classes, 4))
    result, _ = train(replace(SPEC, validation_fraction=0.0), np.tile(x, (4, 1)), labels)
    alone, _ = train(replace(SPEC, validation_fraction=0.0), x, Labels(labels.class_names, classes))
    assert [one.slices for one in result.candidates] == [one.slices for one in alone.candidates]
    noise = next(one for one in result.candidates if one.slices == ("pooled",))
    assert noise.accuracy is not None
    assert noise.accuracy < 0.6


def test_a_dataset_of_one_picture_trains_all_the_same() -> None:
    labels = Labels(("a", "b"), np.arange(12) % 2)
    result, _ = train(SPEC, np.ones((12, 30), np.float32), labels)
    assert all(np.isfinite(one.score) for one in result.candidates)
    assert all(np.isfinite(one) for one in result.metrics.values())


def test_thousands_of_classes_with_two_rows_each_stay_bounded() -> None:
    """Neither choice may look at all of them: memory would grow with rows times classes."""
    draw = np.random.default_rng(0)
    num_classes = 700
    classes = np.repeat(np.arange(num_classes), 3)
    x = draw.normal(size=(len(classes), 30)).astype(np.float32)
    x[:, 4:20] += 3 * draw.normal(size=(num_classes, 16)).astype(np.float32)[classes]
    seen: list[tuple[int, int]] = []

    def watch(x_ND: torch.Tensor, classes_N: torch.Tensor, count: int, *rest: object, **more: Any) -> dict:
        seen.append((x_ND.shape[0], count))
        more["keep"](1.0, x_ND.new_zeros((len(x_ND), count)))
        return {1.0: 0.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trunkline_worker.training.choose.cross_validate_l2", watch)
        rows = Rows(torch.from_numpy(x), torch.from_numpy(classes))
        progress = Progress(lambda event: None, lambda: False)
        assert choose_l2(SPEC, "classification", rows, classes, [30], progress) == 1.0
    assert seen == [(512, 256)]


def test_the_strength_of_wide_rows_is_chosen_by_many_of_them_held_out_once() -> None:
    """Few rows would tell of a strength that suits few."""
    draw = np.random.default_rng(0)
    classes = np.arange(6000) % 3
    x = draw.normal(size=(6000, 200)).astype(np.float32)
    x[:, :3] += np.eye(3, dtype=np.float32)[classes]
    seen: list[tuple[int, int, int]] = []

    def watch(x_ND: torch.Tensor, classes_N: torch.Tensor, count: int, folds_N: torch.Tensor, *_: Any, **more: Any):
        seen.append((len(x_ND), int(folds_N.max()) + 1, int((folds_N >= 0).sum())))
        more["keep"](1.0, x_ND.new_zeros((len(x_ND), count)))
        return {1.0: 0.0}

    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trunkline_worker.training.choose.cross_validate_l2", watch)
        progress = Progress(lambda event: None, lambda: False)
        for rows in (6000, 1000, 400):
            training = Rows(torch.from_numpy(x[:rows]), torch.from_numpy(classes[:rows]))
            choose_l2(SPEC, "classification", training, classes[:rows], [200], progress, None, said.append)
    assert seen == [(3000, 1, 600), (1000, 3, 600), (400, 5, 400)]
    assert [(len(one.rows), len(one.log_NK)) for one in said] == [(600, 600), (600, 600), (400, 400)]


def test_classes_of_a_single_row_do_not_crowd_out_those_that_can_be_compared() -> None:
    draw = np.random.default_rng(0)
    classes = np.concatenate([np.arange(2, 200), np.repeat([0, 1], 4)])
    x = draw.normal(size=(len(classes), 30)).astype(np.float32)
    x[classes == 1, 4:20] += 5
    result, _ = train(replace(SPEC, validation_fraction=0.0, l2=1.0), x, Labels(tuple(map(str, range(200))), classes))
    assert all(np.isfinite(one.score) for one in result.candidates)
    assert result.candidates[0].accuracy is not None
    assert "a/grid" in result.candidates[0].slices


@pytest.mark.parametrize(
    ("changes", "unit"),
    [({"solver": "adamw", "epochs": 12}, "epoch"), ({"solver": "lbfgs"}, "step")],
    ids=["adamw", "lbfgs"],
)
def test_events_of_a_fit_say_where_they_are_and_which_fit_they_are_of(changes: dict, unit: str) -> None:
    x, labels = rows_and_labels()
    result, events = train(replace(SPEC, embedding="pooled", l2=1.0, **changes), x, labels)
    assert result.evaluation is not None
    curve = result.evaluation.curves["loss"]
    told = [one.metrics for one in events if one.phase == "fit" and unit in one.metrics]
    first = [one for one in told if "loss" in one]
    again = [one for one in told if "refit_loss" in one]
    assert first and again and told == first + again
    for one in first:
        assert one["loss"] == pytest.approx(curve[int(one[unit]) - 1])
    for fit in (first, again):
        places = [one[unit] for one in fit]
        assert places == sorted(set(places)) and places[0] >= 1
