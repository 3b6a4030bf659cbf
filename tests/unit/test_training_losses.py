"""Losses, weights and metrics: what training minimises is what scikit-learn minimises, where both have it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import optimize
from sklearn import linear_model, metrics
from torch.nn import functional
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import HIGHER_IS_BETTER, LOWER_IS_BETTER, LossConfig, OptimiserConfig
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import SliceSpec
from trunkline_worker.heads.artefact import head_from_bytes, head_to_bytes
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head
from trunkline_worker.heads.stacking import packed_from_bytes
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.learner import Learner, Schedule
from trunkline_worker.training.loop import Labels, Source, TrainingResult, train_head
from trunkline_worker.training.metrics import badness, measure
from trunkline_worker.training.minibatch import Split, fit_minibatches
from trunkline_worker.training.objective import Objective

Floats = npt.NDArray[np.float64]

SPEC = JobSpec(
    model="m", dataset="d", backbone="b", input_size=0, embedding="pooled", l2=0.5, validation_fraction=0.0, seed=3
)
LOW_TO_HIGH = ("poor", "fair", "good", "best")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def train(x: npt.NDArray[np.float32], labels: Labels, **changes: Any) -> TrainingResult:
    source = Source("b", x, (SliceSpec("pooled", 0, x.shape[1]),))
    return train_head(
        [source], labels, replace(SPEC, **changes), on_event=lambda event: None, should_stop=lambda: False
    )


def rows(num_rows: int = 300, num_columns: int = 6, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(num_rows, num_columns)).astype(np.float32)


def standardised(result: TrainingResult, x: npt.NDArray[np.float32]) -> Floats:
    return result.head.head.standardise(torch.from_numpy(x)).double().numpy()


def unequal(seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return rows of three classes, few of the last, that overlap."""
    draw = np.random.default_rng(seed)
    classes = draw.permutation(np.repeat([0, 1, 2], [200, 80, 20]))
    x = draw.normal(size=(300, 6)).astype(np.float32)
    x[:, :3] += np.eye(3, dtype=np.float32)[classes] * 1.5
    return x, classes


def in_order(seed: int = 0, num_rows: int = 240) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return rows whose class grows with a direction, given by names in the alphabet's order."""
    x = rows(num_rows, seed=seed)
    height = x @ np.array([1.5, -1, 0.5, 0, 0, 0]) + np.random.default_rng(seed).logistic(size=num_rows)
    return x, np.digitize(height, [-2.0, 0.0, 2.0])


@pytest.mark.parametrize(
    ("loss", "sklearn_weights"),
    [
        (LossConfig(balanced=True), "balanced"),
        (LossConfig(class_weights=(1.0, 2.0, 7.5)), {0: 1.0, 1: 2.0, 2: 7.5}),
        (LossConfig(), None),
    ],
    ids=["balanced", "given", "none"],
)
def test_weighted_classes_agree_with_scikit_learn(loss: LossConfig, sklearn_weights: Any) -> None:
    x, classes = unequal()
    result = train(x, Labels(("a", "b", "c"), classes), loss=loss)
    own = linear_model.LogisticRegression(C=2.0, class_weight=sklearn_weights, tol=1e-10, max_iter=5000)
    own.fit(standardised(result, x), classes)
    weights, bias = result.head.head.output.weight.numpy(), result.head.head.output.bias.numpy()
    np.testing.assert_allclose(weights, own.coef_, atol=2e-3)
    np.testing.assert_allclose(bias - bias.mean(), own.intercept_ - own.intercept_.mean(), atol=2e-3)


def test_balanced_labels_agree_with_scikit_learn() -> None:
    x = rows()
    truth = (x[:, :2] + np.random.default_rng(1).normal(size=(300, 2)) > [0.3, 1.8]).astype(np.float32)
    result = train(x, Labels(("a", "b"), None, truth), loss=LossConfig(balanced=True))
    for label in range(2):
        own = linear_model.LogisticRegression(C=2.0, class_weight="balanced", tol=1e-10, max_iter=5000)
        own.fit(standardised(result, x), truth[:, label])
        np.testing.assert_allclose(result.head.head.output.weight[label].numpy(), own.coef_[0], atol=2e-3)


def test_a_class_of_weight_0_is_as_good_as_not_there() -> None:
    x, classes = unequal()
    weighed = train(x, Labels(("a", "b", "c"), classes), loss=LossConfig(class_weights=(1.0, 1.0, 0.0)))
    assert 2 not in weighed.head.predict(torch.from_numpy(x)).argmax(dim=1).tolist()
    one = np.full(len(classes), 2)
    one[:4] = [0, 1, 0, 1]
    with pytest.raises(WireError, match="one for each is needed"):
        train(x, Labels(("a", "b", "c"), one), loss=LossConfig(class_weights=(1.0, 1.0)))


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_smoothed_labels_are_the_minimum_of_torchs_loss(smoothing: float) -> None:
    x, classes = unequal()
    result = train(x, Labels(("a", "b", "c"), classes), loss=LossConfig(label_smoothing=smoothing))
    layer = result.head.head.output
    weight = layer.weight.double().requires_grad_(True)
    bias = layer.bias.double().requires_grad_(True)
    logits = torch.from_numpy(standardised(result, x)) @ weight.T + bias
    truth = torch.from_numpy(classes)
    loss = functional.cross_entropy(logits, truth, reduction="sum", label_smoothing=smoothing)
    (loss + 0.25 * weight.square().sum()).backward()
    assert float(weight.grad.abs().max()) < 0.05  # type: ignore[union-attr]  # of 300 rows' losses
    assert float(bias.grad.abs().max()) < 0.05  # type: ignore[union-attr]


def test_classes_in_order_minimise_the_all_threshold_loss() -> None:
    x, classes = in_order()
    result = train(x, Labels(tuple("abcd"), classes), loss=LossConfig(class_order=tuple("abcd")))
    z = standardised(result, x)
    above = classes[:, None] > np.arange(3)

    def objective(values: Floats) -> float:
        outputs = (z @ values[:6])[:, None] + values[6:]
        return float((np.logaddexp(0, outputs) - above * outputs).sum() + 0.25 * (values[:6] ** 2).sum())

    best = optimize.minimize(objective, np.zeros(9), method="BFGS", options={"gtol": 1e-8})
    layer = result.head.head.output
    for row in layer.weight.numpy():
        np.testing.assert_allclose(row, best.x[:6], atol=3e-3)
    np.testing.assert_allclose(layer.bias.numpy(), best.x[6:], atol=3e-3)
    assert (np.diff(layer.bias.numpy()) < 0).all()


def test_the_order_is_that_which_was_given_and_survives_being_stored() -> None:
    x, heights = in_order()
    names = tuple(sorted(LOW_TO_HIGH))
    indices = np.array([names.index(LOW_TO_HIGH[one]) for one in heights])
    result = train(x, Labels(names, indices), loss=LossConfig(class_order=LOW_TO_HIGH), validation_fraction=0.3)
    head = result.head
    assert (head.task, head.class_names, head.num_outputs) == ("ordinal", LOW_TO_HIGH, 4)
    said = head.predict(torch.from_numpy(x))
    assert said.shape == (len(x), 4)
    torch.testing.assert_close(said.sum(dim=1), torch.ones(len(x)))
    assert float((said.argmax(dim=1).numpy() == heights).mean()) > 0.4
    assert {"accuracy", "kappa", "mae_steps", "cross_entropy"} <= set(result.metrics)
    assert result.conformal is not None
    data = head_to_bytes(head)
    torch.testing.assert_close(head_from_bytes(data).predict(torch.from_numpy(x)), said)
    packed = packed_from_bytes(data)
    assert packed.num_outputs == 4
    torch.testing.assert_close(packed.predict(torch.from_numpy(x)), said)


def test_an_order_helps_where_there_is_one() -> None:
    off = {True: 0.0, False: 0.0}
    for seed in range(4):
        x, classes = in_order(seed, 60)
        fresh, truth = in_order(seed + 100, 400)
        for ordinal in off:
            loss = LossConfig(class_order=LOW_TO_HIGH if ordinal else ())
            head = train(x, Labels(LOW_TO_HIGH, classes), loss=loss, l2=-1.0).head
            off[ordinal] += float(np.abs(head.predict(torch.from_numpy(fresh)).argmax(dim=1).numpy() - truth).mean())
    assert off[True] < off[False]


@pytest.mark.parametrize(
    ("order", "what"),
    [(("poor", "fair", "good"), "name each of them once"), (("a", "b", "c", "d"), "the dataset has 4")],
)
def test_an_order_of_other_classes_is_refused(order: tuple[str, ...], what: str) -> None:
    x, classes = in_order()
    with pytest.raises(WireError, match=what) as caught:
        train(x, Labels(LOW_TO_HIGH, classes), loss=LossConfig(class_order=order))
    assert caught.value.code is ErrorCode.BAD_LABELS


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_a_quantile_has_so_many_targets_below_it(quantile: float) -> None:
    x = rows(600, 3)
    targets = (x @ np.array([2.0, 1.0, 0.0]) + np.random.default_rng(2).exponential(3.0, size=600))[:, None] * 40 + 500
    result = train(
        x,
        Labels((), None, targets.astype(np.float32)),
        solver="adamw",
        loss=LossConfig("quantile", quantile=quantile),
        l2=0.0,
        epochs=150,
        validation_fraction=0.2,
        refit=False,
    )
    below = (targets <= result.head.predict(torch.from_numpy(x)).numpy()).mean()
    assert below == pytest.approx(quantile, abs=0.05)
    assert result.metrics["pinball"] > 0


def test_the_focal_loss_is_its_formula_and_the_cross_entropy_at_0() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    truth = torch.arange(50) % 4
    probability = logits.softmax(dim=1).gather(1, truth[:, None]).squeeze(1)
    for gamma in (0.0, 1.0, 2.5):
        expected = (-((1 - probability) ** gamma) * probability.log()).mean()
        got = Objective("classification", LossConfig("focal", focal_gamma=gamma)).loss(logits, truth)
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        Objective("classification", LossConfig("focal", focal_gamma=0.0)).loss(logits, truth),
        functional.cross_entropy(logits, truth),
    )
    labels = functional.one_hot(truth, 4).float()
    torch.testing.assert_close(
        Objective("multi_label", LossConfig("focal", focal_gamma=0.0)).loss(logits, labels),
        functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(dim=1).mean(),
    )
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0])
    torch.testing.assert_close(
        Objective("classification", LossConfig(class_weights=(1.0, 2.0, 3.0, 0.0)), weights).loss(logits, truth),
        functional.cross_entropy(logits, truth, weight=weights),
    )


@pytest.mark.parametrize(
    "loss", [LossConfig("focal"), LossConfig(label_smoothing=0.1), LossConfig(balanced=True)], ids=str
)
@pytest.mark.parametrize("head", [HeadConfig(), HeadConfig("mlp", (16,))], ids=["linear", "mlp"])
def test_heads_learn_with_any_loss(loss: LossConfig, head: HeadConfig) -> None:
    x, classes = unequal()
    common: dict[str, Any] = {"head": head, "solver": "adamw", "epochs": 60, "validation_fraction": 0.2, "l2": 0.01}
    result = train(x, Labels(("a", "b", "c"), classes), loss=loss, **common)
    assert result.metrics["balanced_accuracy"] > 0.5
    truth = functional.one_hot(torch.from_numpy(classes), 3).numpy().astype(np.float32)
    result = train(x, Labels(("a", "b", "c"), None, truth), loss=loss, **common)
    assert result.metrics["roc_auc"] > 0.7


def test_metrics_are_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(200, 4))
    truth = draw.integers(0, 4, size=200)
    logits[np.arange(200), truth] += 1
    found = measure("classification", torch.from_numpy(logits), torch.from_numpy(truth))
    said = torch.from_numpy(logits).softmax(dim=1).numpy()
    assert set(found) == {*HIGHER_IS_BETTER["classification"], *LOWER_IS_BETTER["classification"]}
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, said.argmax(axis=1)))
    assert found["roc_auc"] == pytest.approx(metrics.roc_auc_score(truth, said, multi_class="ovr"))
    assert found["cross_entropy"] == pytest.approx(metrics.log_loss(truth, said))
    members = (draw.random(size=(200, 4)) < 0.3).astype(np.float32)
    found = measure("multi_label", torch.from_numpy(logits), torch.from_numpy(members))
    assert set(found) == {*HIGHER_IS_BETTER["multi_label"], *LOWER_IS_BETTER["multi_label"]}
    assert found["average_precision"] == pytest.approx(metrics.average_precision_score(members, logits))
    values = torch.from_numpy(logits * 3 + 1)
    found = measure("regression", values, torch.from_numpy(logits), quantile=0.3)
    assert set(found) == {*HIGHER_IS_BETTER["regression"], *LOWER_IS_BETTER["regression"]}
    assert found["rmse"] == pytest.approx(metrics.root_mean_squared_error(logits, values.numpy()))


def test_metrics_that_are_not_defined_are_left_out() -> None:
    one_class = measure("classification", torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    assert "roc_auc" not in one_class
    assert one_class["accuracy"] == 1.0
    assert "r2" not in measure("regression", torch.zeros(3, 1), torch.ones(3, 1))
    assert measure("classification", torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)) == {}
    assert badness("classification", "roc_auc", torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)) == float("inf")


@pytest.mark.parametrize("solver", ["lbfgs", "adamw"])
@pytest.mark.parametrize("metric", ["balanced_accuracy", "roc_auc", "cross_entropy"])
def test_what_is_chosen_is_best_by_the_metric_that_was_named(solver: str, metric: str) -> None:
    x, classes = unequal()
    labels = Labels(("a", "b", "c"), classes)
    head = HeadConfig() if solver == "lbfgs" else HeadConfig("mlp", (16,))
    common: dict[str, Any] = {
        "solver": solver,
        "head": head,
        "epochs": 0 if solver == "lbfgs" else 30,
        "validation_fraction": 0.3,
        "refit": False,
        "l2": -1.0,
        "calibrate": False,
    }
    chosen = train(x, labels, select_by=metric, **common).metrics
    plain = train(x, labels, **common).metrics
    if solver == "adamw":  # the epoch is chosen on the very rows that are measured
        sign = -1 if metric == "cross_entropy" else 1
        assert sign * chosen[metric] >= sign * plain[metric] - 1e-6
    else:
        assert np.isfinite(chosen["l2"])


def test_strengths_differ_by_what_they_are_chosen_by() -> None:
    found = set()
    for seed in range(4):
        x, classes = unequal(seed)
        for metric in ("", "balanced_accuracy", "f1_macro"):
            labels = Labels(("a", "b", "c"), classes)
            found.add((seed, train(x, labels, select_by=metric, l2=-1.0).metrics["l2"]))
    assert len(found) > 4


def head_and_learner(plan: Schedule, num_steps: int = 100, **keywords: Any) -> tuple[Head, Learner]:
    head = Head(HeadConfig("mlp", (8,)), [HeadInput(("pooled",), (4,))], 2)
    head.reset_parameters(torch.Generator().manual_seed(0))
    return head, Learner(head, plan, num_steps=num_steps, num_rows=10, **keywords)


def test_the_rate_rises_and_falls() -> None:
    head, learner = head_and_learner(Schedule(1, 4, 0.5, 0.0, OptimiserConfig(warmup=0.1)))
    rates = []
    for _ in range(100):
        learner.step(head(torch.ones(3, 4)).square().mean())
        rates.append(learner._optimiser.param_groups[0]["lr"])
    peak = int(np.argmax(rates))
    assert peak == 10
    assert rates[peak] == pytest.approx(0.5)
    assert (np.diff(rates[: peak + 1]) > 0).all()
    assert (np.diff(rates[peak:]) < 0).all()
    assert rates[-1] < 0.001


def test_a_long_gradient_is_shortened() -> None:
    lengths = {}
    for clip in (0.0, 0.5):
        head, learner = head_and_learner(Schedule(1, 4, 1e-3, 0.0, OptimiserConfig(clip_norm=clip)))
        torch.nn.init.ones_(head.output.weight)
        learner.step(1e4 * head(torch.ones(3, 4)).square().mean())
        lengths[clip] = float(
            torch.cat([one.grad.flatten() for one in head.parameters() if one.grad is not None]).norm()
        )
    assert lengths[0.0] > 10
    assert lengths[0.5] == pytest.approx(0.5, rel=1e-3)


def test_the_average_is_what_is_kept() -> None:
    head, learner = head_and_learner(Schedule(1, 4, 0.1, 0.0, OptimiserConfig(ema=0.9)))
    average: torch.Tensor | None = None
    for _ in range(20):
        learner.step((head(torch.ones(3, 4)) - 1).square().mean())
        now = head.output.bias.detach().clone()
        average = now if average is None else 0.9 * average + 0.1 * now
    own = head.output.bias.detach().clone()
    assert average is not None
    with learner.averaged():
        torch.testing.assert_close(head.output.bias.detach(), average)
    torch.testing.assert_close(head.output.bias.detach(), own)
    learner.keep_average()
    torch.testing.assert_close(head.output.bias.detach(), average)


def test_weights_decay_apart_from_the_loss() -> None:
    head, learner = head_and_learner(Schedule(1, 4, 0.1, 0.5, OptimiserConfig(warmup=0.0)))
    before = head.linears[0].weight.detach().clone()
    learner.step(0.0 * head(torch.ones(3, 4)).sum())
    torch.testing.assert_close(head.linears[0].weight.detach(), before * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_other_precisions_learn_as_well(precision: str) -> None:
    x, classes = unequal()
    labels = Labels(("a", "b", "c"), classes)
    common: dict[str, Any] = {
        "head": HeadConfig("mlp", (16,)),
        "solver": "adamw",
        "epochs": 30,
        "validation_fraction": 0.3,
    }
    exact = train(x, labels, **common).metrics["accuracy"]
    other = train(x, labels, optimiser=OptimiserConfig(precision=precision), **common)
    assert other.metrics["accuracy"] > exact - 0.06
    assert other.head.head.output.weight.dtype == torch.float32


def test_training_ends_when_nothing_better_comes() -> None:
    x, classes = unequal()
    labels = np.random.default_rng(0).permutation(classes)  # nothing to learn

    def epochs_run(patience: int) -> tuple[int, int]:
        head = Head(HeadConfig("mlp", (32,)), [HeadInput(("pooled",), (6,))], 3)
        data = Split(torch.from_numpy(x), torch.from_numpy(labels))
        seen: list[int] = []
        best = fit_minibatches(
            head,
            Objective("classification", LossConfig()),
            Split(data.x_ND[:200], data.truth[:200]),
            Split(data.x_ND[200:], data.truth[200:]),
            Schedule(60, 16, 0.02, 0.0, OptimiserConfig(patience=patience)),
            seed=0,
            check=lambda: None,
            on_epoch=lambda epoch, losses: seen.append(epoch),
        )
        return best, len(seen)

    assert epochs_run(0)[1] == 60
    best, run = epochs_run(3)
    assert run == best + 3 < 60
