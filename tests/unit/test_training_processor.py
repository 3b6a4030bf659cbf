"""Softmax heads on a processor beside those on other devices, and areas under curves beside scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics
from trunkline_worker.training import processor, softmax
from trunkline_worker.training.ranking import ranked


def nothing(*ignored: object) -> None:
    """Take anything."""


def problem(num_rows: int, num_columns: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = np.random.default_rng(0)
    classes = np.arange(num_rows) % num_classes
    x = draw.normal(size=(num_rows, num_columns)) + 0.4 * draw.normal(size=(num_classes, num_columns))[classes]
    return torch.from_numpy((x - x.mean(axis=0)) / x.std(axis=0)), torch.from_numpy(classes)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("portion", [2**17, 60])
def test_the_gradient_is_that_of_autograd(
    portion: int, is_weighted: bool, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "_PORTION_CELLS", portion)
    monkeypatch.setattr(processor, "_PORTION_ROWS", 1)
    x, classes = problem(50, 6, 4)
    draw = np.random.default_rng(1)
    weights = draw.random(50) if is_weighted else None
    b = draw.normal(size=(4, 7))
    rows = processor.Rows(x.numpy(), classes.numpy(), 4, weights, smoothing)
    value, gradient, curvature = rows.evaluate(b)
    leaf = torch.from_numpy(b).requires_grad_()
    logits = x @ leaf[:, :-1].T + leaf[:, -1]
    each = torch.nn.functional.cross_entropy(logits, classes, reduction="none", label_smoothing=smoothing)
    counts = torch.ones(50, dtype=torch.float64) if weights is None else torch.from_numpy(weights)
    expected = (each * counts).sum()
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-12)
    np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-10, atol=1e-10)
    said = logits.detach().softmax(dim=1)
    np.testing.assert_allclose(curvature, (said * (1 - said) * counts[:, None]).sum(dim=0), rtol=1e-10)


def test_steps_that_are_remembered_act_as_the_two_loops_do() -> None:
    draw = np.random.default_rng(0)
    half = draw.normal(size=(12, 12))
    hessian = half @ half.T + np.eye(12)
    history, pairs = processor._History(12), []
    for _ in range(processor._HISTORY + 5):
        step = draw.normal(size=(3, 4))
        change = (hessian @ step.ravel()).reshape(3, 4)
        assert history.add(step, change)
        pairs = [*pairs, (step.ravel(), change.ravel())][-processor._HISTORY :]
    assert not history.add(np.ones((3, 4)), -np.ones((3, 4)))  # says nothing of a convex function
    scale = draw.random((3, 4)) + 0.5
    gradient = draw.normal(size=(3, 4))
    q, alphas = gradient.ravel().copy(), []
    for step, change in reversed(pairs):
        alphas.append(step @ q / (step @ change))
        q -= alphas[-1] * change
    expected = 0.7 * scale.ravel() * q
    for (step, change), alpha in zip(pairs, reversed(alphas), strict=True):
        expected += (alpha - change @ expected / (step @ change)) * step
    got = history.apply(gradient, 0.7, lambda vector: scale * vector)
    np.testing.assert_allclose(got.ravel(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [(60, 150), (200, 12)])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_other_devices_get_the_same_heads(
    shape: tuple[int, int], num_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on an accelerator, here on the processor."""
    monkeypatch.setattr(softmax, "_LOOSE", 1e-10)
    x, classes = problem(*shape, num_classes)
    weights = torch.linspace(0.2, 2.0, len(classes), dtype=torch.float64)
    folds = torch.arange(len(classes)) % 3

    def everything() -> tuple[torch.Tensor, torch.Tensor, list[float], torch.Tensor]:
        fit = softmax.fit_softmax(
            softmax.prepare(x), classes, num_classes, 2.0, weights_N=weights, smoothing=0.1, on_step=nothing
        )
        scores = softmax.cross_validate_l2(
            x, classes, num_classes, folds, (30.0, 3.0), weights_N=weights, smoothing=0.1, check=nothing
        )
        said = softmax.held_out_logs(x, classes, num_classes, folds, 3.0, check=nothing)
        return fit.weights_DK, fit.bias_K, list(scores.values()), said

    ours = everything()
    monkeypatch.setattr(softmax, "_on_processor", lambda design: False)
    other = everything()
    torch.testing.assert_close(ours[0], other[0], atol=1e-3 * float(other[0].abs().max()), rtol=0.0)
    torch.testing.assert_close(ours[1], other[1], atol=1e-3, rtol=0.0)
    assert ours[2] == pytest.approx(other[2], rel=1e-4)
    torch.testing.assert_close(ours[3], other[3], atol=1e-3, rtol=0.0)


def test_a_large_problem_is_solved_as_closely_as_scikit_learn_does_and_alike_each_time() -> None:
    x, classes = problem(1500, 80, 6)
    first, again = (softmax.fit_softmax(softmax.prepare(x), classes, 6, 1.0, on_step=nothing) for _ in range(2))
    assert torch.equal(first.weights_DK, again.weights_DK)
    weights = first.weights_DK.clone().requires_grad_()
    bias = first.bias_K.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ weights + bias, classes, reduction="sum")
    (loss + 0.5 * weights.square().sum()).backward()
    assert weights.grad is not None
    assert float(weights.grad.abs().max()) / 1500 < 5e-4


def test_the_caller_can_stop_between_steps() -> None:
    x, classes = problem(60, 8, 3)
    told: list[int] = []

    def stop(step: int, loss: float) -> None:
        told.append(step)
        if step == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        softmax.fit_softmax(softmax.prepare(x), classes, 3, 1.0, on_step=stop)
    assert told == [0, 1, 2]


@pytest.mark.parametrize("has_ties", [False, True])
def test_areas_under_curves_are_those_of_scikit_learn(has_ties: bool) -> None:
    draw = np.random.default_rng(0)
    scores = draw.random((300, 4))
    if has_ties:
        scores = scores.round(1)
    member = draw.random((300, 4)) < scores * [0.2, 0.5, 0.9, 0.05] + 0.02
    area, precision = ranked(member, scores)
    assert area == pytest.approx(metrics.roc_auc_score(member, scores, average="macro"), rel=1e-12)
    assert precision == pytest.approx(metrics.average_precision_score(member, scores, average="macro"), rel=1e-12)
