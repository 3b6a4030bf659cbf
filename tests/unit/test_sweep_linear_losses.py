"""Weighted and smoothed linear heads of a sweep, Huber's loss and classes in order, against the same ones alone."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from threadpoolctl import threadpool_limits
from trunkline_wire.fits import LossConfig
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, ORDINAL, REGRESSION
from trunkline_worker.training.fit import labels_loss, smooth_labels, target_scale
from trunkline_worker.training.ordinal import fit_ordinal
from trunkline_worker.training.outputwise import fit_outputwise, huber, log_odds, medians
from trunkline_worker.training.softmax import fit_softmax, prepare
from trunkline_worker.training.sweep import linear, ordinal
from trunkline_worker.training.sweep.plan import PLAIN
from trunkline_worker.training.sweep.rows import FoldedRows, Folds
from trunkline_worker.training.weighing import row_weights

NUM_CLASSES, NUM_COLUMNS = 4, 12
STRENGTHS = (3.0, 100.0, 0.3)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(linear, "_TOLERANCE", 1e-7)
    monkeypatch.setattr(ordinal, "_TOLERANCE", 1e-9)
    with threadpool_limits(1):
        yield


def nothing(*ignored: object) -> None:
    """Take anything."""


def folded(task: str, loss: LossConfig, num_rows: int = 120) -> FoldedRows:
    """Return rows of few of some classes and many of others."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, NUM_COLUMNS, generator=draw)
    noisy = x[:, 0] + x[:, 1] + torch.randn(num_rows, generator=draw)
    classes = torch.bucketize(noisy, torch.tensor([-1.0, 1.0, 2.0]))
    truth = {
        CLASSIFICATION: classes,
        ORDINAL: classes,
        MULTI_LABEL: torch.stack([noisy > 1, noisy > -1], dim=1).float(),
        REGRESSION: torch.stack([5 * noisy + 70, noisy**3], dim=1),
    }[task]
    outputs = NUM_CLASSES if task in (CLASSIFICATION, ORDINAL) else 2
    folds = Folds.of(torch.arange(num_rows) % 3, 3)
    return FoldedRows(x, task, truth, outputs, folds, replace(PLAIN, loss=loss))


def outputs_of(rows: FoldedRows) -> list[list[torch.Tensor]]:
    run = ordinal.ordinal_outputs if rows.task == ORDINAL else linear.linear_outputs
    found = dict(run(rows, STRENGTHS, check=nothing, tell=nothing))
    assert not any(isinstance(one, str) for one in found.values())
    return [found[number] for number in range(len(STRENGTHS))]  # type: ignore[misc]


def alone(rows: FoldedRows, l2: float, fold: int) -> torch.Tensor:
    """Return what a job that trains on a fold's rows says of the others."""
    training, loss = rows.folds.training[fold], rows.around.loss
    design, truth = prepare(rows.x_ND[training]), rows.truth[training]
    mean = scale = None
    if rows.task == CLASSIFICATION:
        fit = fit_softmax(
            *(design, truth, NUM_CLASSES, l2),
            weights_N=row_weights(loss, truth, NUM_CLASSES),
            smoothing=loss.label_smoothing,
            on_step=nothing,
        )
    elif rows.task == ORDINAL:
        weights = row_weights(loss, truth, NUM_CLASSES)
        fit = fit_ordinal(design, truth, NUM_CLASSES, l2, weights_N=weights, on_step=nothing)  # type: ignore[assignment]
    elif rows.task == MULTI_LABEL:
        target = smooth_labels(rows.around, truth)
        fit = fit_outputwise(  # type: ignore[assignment]
            design, target, labels_loss(rows.around, truth), l2, log_odds(truth), on_step=nothing
        )
    else:
        mean, scale = target_scale(rows.truth)
        target = (truth.double() - mean) / scale
        fit = fit_outputwise(  # type: ignore[assignment]
            design, target, huber(loss.huber_delta), l2, medians(target), on_step=nothing
        )
    outputs = rows.x_ND[rows.folds.held[fold]].double() @ fit.weights_DK.double() + fit.bias_K
    return outputs if scale is None or mean is None else outputs * scale + mean


CASES = [
    (CLASSIFICATION, LossConfig(balanced=True)),
    (CLASSIFICATION, LossConfig(label_smoothing=0.2)),
    (CLASSIFICATION, LossConfig(class_weights=(1.0, 5.0, 0.5, 2.0), label_smoothing=0.1)),
    (MULTI_LABEL, LossConfig(balanced=True)),
    (MULTI_LABEL, LossConfig(class_weights=(4.0, 0.5), label_smoothing=0.1)),
    (REGRESSION, LossConfig("huber", huber_delta=0.5)),
    (ORDINAL, LossConfig(class_order=("a", "b", "c", "d"))),
    (ORDINAL, LossConfig(class_order=("a", "b", "c", "d"), balanced=True)),
]


@pytest.mark.parametrize(("task", "loss"), CASES, ids=str)
def test_every_fold_and_strength_is_as_if_trained_alone(task: str, loss: LossConfig) -> None:
    rows = folded(task, loss)
    unit = float(rows.truth.std()) if task == REGRESSION else 1.0
    together = outputs_of(rows)
    for l2, outputs in zip(STRENGTHS, together, strict=True):
        for fold, ours in enumerate(outputs):
            theirs = alone(rows, l2, fold).float()
            if task == CLASSIFICATION:
                ours, theirs = ours.log_softmax(dim=1), theirs.log_softmax(dim=1)
            torch.testing.assert_close(ours, theirs, atol=2e-2 * unit, rtol=2e-2)
    if loss.is_weighted or loss.label_smoothing:
        plain = outputs_of(replace(rows, around=replace(PLAIN, loss=replace(loss, **PLAIN_LOSS))))
        assert not torch.allclose(together[2][0], plain[2][0], atol=5e-2)


PLAIN_LOSS = {"balanced": False, "class_weights": (), "label_smoothing": 0.0}


def test_a_path_of_one_strength_twice_gives_it_twice() -> None:
    rows = folded(ORDINAL, LossConfig(class_order=("a", "b", "c", "d")))
    found = dict(ordinal.ordinal_outputs(rows, (3.0, 3.0), check=nothing, tell=nothing))
    for one, other in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
