"""Ridge regressions of a sweep against the same ones trained alone."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_limits
from trunkline_wire.heads import REGRESSION
from trunkline_worker.training.ridge import fit_ridge
from trunkline_worker.training.sweep import closed_form
from trunkline_worker.training.sweep.rows import FoldedRows, Folds

STRENGTHS = (1.0, 1000.0, 30.0)


def nothing(*ignored: object) -> None:
    """Take anything."""


def folded(num_rows: int, num_columns: int) -> FoldedRows:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(num_rows, num_columns))
    y = x[:, :2] * [3.0, 500.0] + draw.normal(size=(num_rows, 2)) + [40.0, -7.0]
    return FoldedRows(
        torch.from_numpy((x - x.mean(axis=0)) / x.std(axis=0)).float(),
        REGRESSION,
        torch.from_numpy(y).float(),
        2,
        Folds.of(torch.from_numpy(draw.integers(4, size=num_rows)), 4),
    )


def outputs_of(rows: FoldedRows, strengths: tuple[float, ...] = STRENGTHS) -> list[list[torch.Tensor]]:
    found = dict(closed_form.ridge_outputs(rows, strengths, check=nothing, tell=nothing))
    return [found[number] for number in range(len(strengths))]  # type: ignore[misc]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that share small work mostly wait for each other, and for ever where neighbours need the processor."""
    with threadpool_limits(1):
        yield


@pytest.mark.parametrize("most", [4096, 5])
@pytest.mark.parametrize("shape", [(40, 90), (120, 15)])
def test_every_fold_and_strength_is_as_if_trained_alone(
    shape: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_form, "_MAX_DECOMPOSED", most)
    monkeypatch.setattr(closed_form, "_PORTION_CELLS", 150)
    rows = folded(*shape)
    for l2, outputs in zip(STRENGTHS, outputs_of(rows), strict=True):
        for training, held, ours in zip(rows.folds.training, rows.folds.held, outputs, strict=True):
            x, y = rows.x_ND[training], rows.truth[training]
            theirs = Ridge(alpha=l2).fit(x.double().numpy(), y.numpy()).predict(rows.x_ND[held].double().numpy())
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-3, atol=1e-3)
            mean = x.mean(dim=0)
            alone = fit_ridge(x - mean, y, l2, check=nothing)
            expected = (rows.x_ND[held] - mean).double() @ alone.weights_DM + alone.bias_M
            torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(40, 90), (120, 15)])
def test_dependent_columns_without_a_penalty_stay_finite(shape: tuple[int, int]) -> None:
    rows = folded(*shape)
    twice = FoldedRows(rows.x_ND.repeat(1, 2), rows.task, rows.truth, 2, rows.folds)
    for one in outputs_of(twice, (0.0,))[0]:
        assert bool(one.isfinite().all())
