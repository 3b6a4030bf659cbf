"""What a sweep is won by."""

import math

import pytest
import torch
from sklearn.metrics import log_loss, mean_pinball_loss
from trunkline_wire.fits import LossConfig
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, ORDINAL, REGRESSION
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.sweep.judge import Judge

CLASSES = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
ODDS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def judge(task: str, truth: torch.Tensor, loss: LossConfig, select_by: str = "") -> Judge:
    return Judge.of(JobSpec("m", "d", "", 0, loss=loss, select_by=select_by), task, truth, 3)


def test_classes_that_count_differently_count_so_in_the_score() -> None:
    found = judge(CLASSIFICATION, CLASSES, LossConfig(class_weights=(1.0, 0.0, 5.0)))
    weights = torch.tensor([1.0, 0.0, 5.0])[CLASSES]
    expected = log_loss(CLASSES, ODDS.double().softmax(1), sample_weight=weights)
    assert found(ODDS, CLASSES) == pytest.approx(-expected)
    assert found.name == "weighted cross_entropy"
    assert judge(CLASSIFICATION, CLASSES, LossConfig())(ODDS, CLASSES) != pytest.approx(-expected)


def test_weights_that_are_balanced_are_those_of_the_training_rows() -> None:
    found = judge(CLASSIFICATION, CLASSES, LossConfig(balanced=True))
    held = torch.tensor([0, 1])
    shares = torch.tensor([8 / 12, 8 / 6])
    loss = torch.nn.functional.cross_entropy(ODDS[:2].double(), held, reduction="none")
    assert found(ODDS[:2], held) == pytest.approx(-float((loss * shares).sum() / shares.sum()))


def test_classes_in_order_and_labels_are_weighed_too() -> None:
    loss = LossConfig(balanced=True, class_order=("a", "b", "c"))
    above = torch.tensor([[2.0, -1.0], [0.5, -3.0]])
    held = torch.tensor([0, 2])
    p = above.double().sigmoid()
    own = torch.stack([1 - p[0, 0], p[1, 1]])
    shares = torch.tensor([8 / 12, 8 / 6], dtype=torch.float64)
    expected = float((-own.log() * shares).sum() / shares.sum())
    assert judge(ORDINAL, CLASSES, loss)(above, held) == pytest.approx(-expected)
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    found = judge(MULTI_LABEL, truth, LossConfig(class_weights=(3.0, 1.0)))
    outputs = ODDS[:4, :2]
    losses = torch.nn.functional.binary_cross_entropy_with_logits(outputs, truth, reduction="none")
    weights = torch.where(truth > 0.5, torch.tensor([3.0, 1.0]), 1.0)
    assert found(outputs, truth) == pytest.approx(-float((losses * weights).sum() / weights.sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "name"),
    [(LossConfig("huber"), "mae"), (LossConfig("quantile", quantile=0.9), "pinball"), (LossConfig(), "r2")],
)
def test_numbers_are_judged_as_the_loss_measures_them(loss: LossConfig, name: str) -> None:
    truth = torch.arange(8.0)[:, None]
    found = judge(REGRESSION, truth, loss)
    assert found.name == name
    if name == "pinball":
        assert found(ODDS[:, :1], truth) == pytest.approx(-mean_pinball_loss(truth, ODDS[:, :1], alpha=0.9))


def test_a_metric_that_is_named_is_heeded_and_undefined_ones_lose() -> None:
    named = judge(CLASSIFICATION, CLASSES, LossConfig(balanced=True), "roc_auc")
    assert named.name == "roc_auc"
    assert named(ODDS[:4], CLASSES[:4]) == -math.inf  # a single class has no curve
