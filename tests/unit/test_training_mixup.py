"""Mixup: rows and labels in the shares that are drawn, and nothing else changed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from training_rows import SPEC, numbers, rows_and_labels, train
from trunkline_wire.errors import WireError
from trunkline_wire.fits import LossConfig, OptimiserConfig, SweepConfig
from trunkline_wire.heads import HeadConfig
from trunkline_worker.heads.artefact import head_to_bytes
from trunkline_worker.store import serial
from trunkline_worker.training.mixup import Mix, Mixer
from trunkline_worker.training.objective import Objective
from trunkline_worker.training.spec import check_spec

MIXED = replace(
    SPEC,
    head=HeadConfig("mlp", (16,)),
    solver="adamw",
    epochs=30,
    learning_rate=0.02,
    embedding="pooled",
    optimiser=OptimiserConfig(mixup=0.4),
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_columns_are_mixed_as_the_share_says() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 8.0], [5.0, 4.0]])
    mixed = Mix(0.75, torch.tensor([1, 2, 0])).columns(x)
    assert mixed.tolist() == [[1.5, 2.0], [3.5, 7.0], [4.0, 3.0]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_classes_is_that_by_mixed_labels(smoothing: float) -> None:
    outputs, truth, partner = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([3, 0, 1, 5, 4, 2])
    objective = Objective("classification", LossConfig(label_smoothing=smoothing))
    soft = 0.3 * torch.eye(3)[truth] + 0.7 * torch.eye(3)[truth[partner]]
    expected = functional.cross_entropy(outputs, soft, label_smoothing=smoothing)
    torch.testing.assert_close(Mix(0.3, partner).loss(objective, outputs, truth), expected)


def test_of_labels_and_numbers_the_gradient_is_that_by_mixed_ones() -> None:
    partner = torch.tensor([3, 0, 1, 2])
    for task, truth in (("multi_label", torch.eye(4)[:, :2]), ("regression", torch.randn(4, 2))):
        outputs = torch.randn(4, 2, requires_grad=True)
        objective = Objective(task, LossConfig())
        (got,) = torch.autograd.grad(Mix(0.3, partner).loss(objective, outputs, truth), outputs)
        (expected,) = torch.autograd.grad(objective.loss(outputs, 0.3 * truth + 0.7 * truth[partner]), outputs)
        torch.testing.assert_close(got, expected)


def test_what_is_drawn_follows_from_the_seed() -> None:
    first, again, other = Mixer(0.5, 3), Mixer(0.5, 3), Mixer(0.5, 4)
    cpu = torch.device("cpu")
    draws = [[mixer.draw(5, cpu) for _ in range(3)] for mixer in (first, again, other)]
    shares = [[one.share for one in some] for some in draws]
    assert shares[0] == shares[1] != shares[2]
    assert len(set(shares[0])) == 3
    assert all(torch.equal(a.partner_B, b.partner_B) for a, b in zip(draws[0], draws[1], strict=True))
    assert sorted(draws[0][0].partner_B.tolist()) == [0, 1, 2, 3, 4]
    many = np.array([Mixer(0.2, seed).draw(2, cpu).share for seed in range(400)])
    assert abs(many.mean() - 0.5) < 0.06
    assert (np.minimum(many, 1 - many) < 0.1).mean() > 0.5  # Beta(0.2, 0.2) lies near its ends


@pytest.mark.parametrize("data", [rows_and_labels, numbers])
def test_a_head_learns_from_mixed_rows_and_equal_jobs_give_equal_bytes(data) -> None:
    x, labels = data()
    spec = replace(MIXED, embedding="auto")
    result = train(spec, x, labels)
    plain = train(replace(spec, optimiser=OptimiserConfig()), x, labels)
    assert head_to_bytes(result.head) == head_to_bytes(train(spec, x, labels).head)
    assert head_to_bytes(result.head) != head_to_bytes(plain.head)
    assert result.metrics["accuracy" if labels.class_names else "r2"] > 0.8


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"solver": "lbfgs", "head": HeadConfig()}, "'lbfgs' takes all rows at once.*'adamw'"),
        ({"head": HeadConfig("prototype"), "solver": "lbfgs"}, "closed form.*leave mixup out"),
        ({"head": HeadConfig(), "loss": LossConfig(class_order=("a", "b", "c"))}, "classes in order are not mixed"),
        ({"head": HeadConfig(), "sweep": SweepConfig(l2=(1.0, 2.0))}, "a sweep does not mix rows"),
    ],
)
def test_what_learns_otherwise_is_refused(changes: dict, match: str) -> None:
    with pytest.raises(WireError, match=match):
        check_spec(replace(MIXED, **changes))


@pytest.mark.parametrize("mixup", [-0.1, 101.0, float("nan")])
def test_a_share_out_of_range_is_refused(mixup: float) -> None:
    with pytest.raises(WireError, match="mixup is the parameter of a Beta distribution"):
        OptimiserConfig(mixup=mixup)


def test_jobs_of_before_are_read_as_not_mixed() -> None:
    text = serial.spec_to_text(MIXED)
    assert serial.spec_from_text(text) == MIXED
    old = text.replace('"mixup":0.4,', "")
    assert old != text
    assert serial.spec_from_text(old).optimiser == OptimiserConfig()
