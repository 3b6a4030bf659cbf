"""Linear classifiers of a sweep against the same ones trained alone."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch.nn import functional
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL
from trunkline_worker.training import softmax
from trunkline_worker.training.sweep import linear
from trunkline_worker.training.sweep.rows import FoldedRows, Folds

# N = rows, D = columns, K = outputs

STRENGTHS = (3.0, 300.0, 30.0, 3.0)


def nothing(*ignored: object) -> None:
    """Take anything."""


def folded(num_rows: int, num_columns: int, num_classes: int, num_folds: int = 4) -> FoldedRows:
    """Return standardised rows around class centres, overlapping."""
    draw = np.random.default_rng(0)
    classes = np.arange(num_rows) % num_classes
    x = draw.normal(size=(num_rows, num_columns)) + 0.4 * draw.normal(size=(num_classes, num_columns))[classes]
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    fold = torch.from_numpy(draw.integers(num_folds, size=num_rows))
    return FoldedRows(
        torch.from_numpy(x).float(), CLASSIFICATION, torch.from_numpy(classes), num_classes, Folds.of(fold, num_folds)
    )


def labelled(num_rows: int, num_columns: int, num_labels: int) -> FoldedRows:
    rows = folded(num_rows, num_columns, 2)
    noise = torch.randn(num_rows, num_labels, generator=torch.Generator().manual_seed(1))
    truth = (rows.x_ND[:, :num_labels] + noise > 0.5).float()
    return FoldedRows(rows.x_ND, MULTI_LABEL, truth, num_labels, rows.folds)


def outputs_of(rows: FoldedRows, strengths: Sequence[float] = STRENGTHS) -> list[list[torch.Tensor]]:
    found = dict(linear.linear_outputs(rows, strengths, check=nothing, tell=nothing))
    assert sorted(found) == list(range(len(strengths)))
    results = [found[number] for number in range(len(strengths))]
    assert not any(isinstance(one, str) for one in results)
    return results  # type: ignore[return-value]


def cross_entropies(rows: FoldedRows, outputs: Sequence[torch.Tensor]) -> list[float]:
    return [
        float(functional.cross_entropy(one.double(), rows.truth[held]))
        for one, held in zip(outputs, rows.folds.held, strict=True)
    ]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that share small work mostly wait for each other, and for ever where neighbours need the processor."""
    with threadpool_limits(1):
        yield


SHAPES = [pytest.param(60, 150, id="fewer rows than columns"), pytest.param(200, 20, id="fewer columns than rows")]


@pytest.mark.parametrize(("num_rows", "num_columns"), SHAPES)
@pytest.mark.parametrize("num_classes", [2, 5])
def test_every_fold_and_strength_is_as_if_trained_alone(
    num_rows: int, num_columns: int, num_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_TOLERANCE", 1e-6)
    rows = folded(num_rows, num_columns, num_classes)
    for l2, outputs in zip(STRENGTHS, outputs_of(rows), strict=True):
        ours = cross_entropies(rows, outputs)
        for training, held, loss in zip(rows.folds.training, rows.folds.held, ours, strict=True):
            x, known = rows.x_ND[training], rows.truth[training]
            alone = softmax.fit_softmax(softmax.prepare(x), known, num_classes, l2, on_step=nothing)
            logits = rows.x_ND[held].double() @ alone.weights_DK + alone.bias_K
            assert loss == pytest.approx(float(functional.cross_entropy(logits, rows.truth[held])), rel=3e-3)
            theirs = LogisticRegression(C=1 / l2, tol=1e-8, max_iter=5000).fit(x.double().numpy(), known.numpy())
            log = theirs.predict_log_proba(rows.x_ND[held].double().numpy())
            assert loss == pytest.approx(-log[np.arange(len(held)), rows.truth[held].numpy()].mean(), rel=3e-3)


def test_the_usual_tolerance_is_far_below_what_folds_differ_by() -> None:
    rows = folded(200, 20, 5)
    for l2, outputs in zip(STRENGTHS, outputs_of(rows), strict=True):
        ours = cross_entropies(rows, outputs)
        for training, held, loss in zip(rows.folds.training, rows.folds.held, ours, strict=True):
            design = softmax.prepare(rows.x_ND[training])
            alone = softmax.fit_softmax(design, rows.truth[training], 5, l2, on_step=nothing)
            logits = rows.x_ND[held].double() @ alone.weights_DK + alone.bias_K
            exact = float(functional.cross_entropy(logits, rows.truth[held]))
            assert abs(loss - exact) < 0.1 * np.std(ours)


@pytest.mark.parametrize("kind", [CLASSIFICATION, MULTI_LABEL])
@pytest.mark.parametrize("problems", [0, 2])
def test_how_much_is_solved_side_by_side_makes_no_difference(
    kind: str, problems: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_TOLERANCE", 1e-6)
    rows = folded(60, 30, 3) if kind == CLASSIFICATION else labelled(60, 30, 3)
    expected = outputs_of(rows)
    num_numbers = 31 * (3 if kind == CLASSIFICATION else 1)
    monkeypatch.setattr(linear, "_SEARCH_BYTES", problems * 4 * (linear._VECTORS * num_numbers + 60))
    monkeypatch.setattr(linear, "_PORTION_CELLS", {"": 100})
    for ours, theirs in zip(outputs_of(rows), expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            if kind == CLASSIFICATION:  # what is added to all logits of a row means nothing
                one, other = one.log_softmax(dim=1), other.log_softmax(dim=1)
            torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


def test_no_matrix_of_all_rows_problems_and_outputs_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = folded(200, 10, 4)
    monkeypatch.setattr(linear, "_PORTION_CELLS", {"": 512})
    largest = 0
    inner = linear.softmax_losses

    def watched(classes: torch.Tensor, smoothing: float) -> linear.Losses:
        losses = inner(classes, smoothing)

        def look(logits: torch.Tensor, some: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            nonlocal largest
            largest = max(largest, logits.numel())
            return losses(logits, some)

        return look

    monkeypatch.setattr(linear, "softmax_losses", watched)
    outputs_of(rows)
    assert 0 < largest <= 512


def test_a_preconditioner_from_a_sketch_leads_to_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_TOLERANCE", 1e-6)
    rows = folded(200, 20, 3)
    expected = outputs_of(rows)
    monkeypatch.setattr(softmax, "MAX_BASIS", 0)
    monkeypatch.setattr(softmax, "_SKETCH_ROWS", 8)
    for ours, theirs in zip(outputs_of(rows), expected, strict=True):
        assert cross_entropies(rows, ours) == pytest.approx(cross_entropies(rows, theirs), rel=2e-3)


@pytest.mark.parametrize(("num_rows", "num_columns"), SHAPES)
def test_every_label_is_as_if_trained_alone(num_rows: int, num_columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_TOLERANCE", 1e-6)
    rows = labelled(num_rows, num_columns, 3)
    for l2, outputs in zip(STRENGTHS, outputs_of(rows), strict=True):
        for training, held, ours in zip(rows.folds.training, rows.folds.held, outputs, strict=True):
            for label in range(3):
                theirs = LogisticRegression(C=1 / l2, tol=1e-8, max_iter=5000)
                theirs.fit(rows.x_ND[training].double().numpy(), rows.truth[training, label].numpy())
                expected = theirs.decision_function(rows.x_ND[held].double().numpy())
                np.testing.assert_allclose(ours[:, label].numpy(), expected, atol=2e-2, rtol=2e-2)


def test_a_class_that_a_fold_does_not_train_on_leaves_finite_outputs() -> None:
    rows = folded(40, 10, 3)
    truth = rows.truth.clone()
    truth[truth == 2] = 0
    truth[rows.folds.held[0][0]] = 2
    alone = FoldedRows(rows.x_ND, CLASSIFICATION, truth, 3, rows.folds)
    for outputs in outputs_of(alone, (10.0, 0.0)):
        assert all(bool(one.isfinite().all()) for one in outputs)
