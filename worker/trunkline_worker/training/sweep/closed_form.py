"""Ridge regression for every strength and fold: one eigendecomposition a fold serves all strengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trunkline_worker.training.ridge import fit_ridge
from trunkline_worker.training.sweep.rows import FoldedRows, Result, portions

# Shape suffix legend: N = rows, D = columns, M = outputs, T = rows that a fold trains on, H = rows that it holds out,
# Q = eigenvectors

_MAX_DECOMPOSED = 4096
"""Largest matrix worth an eigendecomposition; beyond it every strength is solved on its own."""

_FLOOR = 1e-10
"""Smallest penalty, as ``ridge`` has it."""

_PORTION_CELLS = 2**22


@dataclass(frozen=True)
class _Fold:
    """A fold in the directions in which its training rows vary: there, a strength is but a division.

    Attributes:
        bias_M: Means of the training rows' targets.
        values_Q: Eigenvalues.
        right_QM: The targets along each direction.
        held_HQ: The held-out rows along each direction.
    """

    bias_M: Tensor
    values_Q: Tensor
    right_QM: Tensor
    held_HQ: Tensor


def ridge_outputs(
    rows: FoldedRows, strengths: Sequence[float], *, check: Callable[[], None], tell: Callable[[float], None]
) -> Iterator[Result]:
    """Yield what ridge regressions of each strength say of the rows that they were not trained on.

    Args:
        rows: Of a regression.
        strengths: Penalties on half the squared errors' sum: scikit-learn's ``alpha``.
        check: Called between steps; may raise to stop.
        tell: Called with the fraction done.
    """
    most = max(len(training) for training in rows.folds.training)
    if min(most, rows.x_ND.shape[1]) > _MAX_DECOMPOSED:
        yield from _one_by_one(rows, strengths, check, tell)
        return
    folds = []
    for held, training in zip(rows.folds.held, rows.folds.training, strict=True):
        check()
        folds.append(_decomposed(rows, held, training))
        tell(0.9 * len(folds) / len(rows.folds))
    for number, l2 in enumerate(strengths):
        check()
        outputs = []
        for fold, training in zip(folds, rows.folds.training, strict=True):
            shifted_Q1 = (fold.values_Q + max(l2, _least(len(training), rows.x_ND.shape[1])))[:, None]
            outputs.append(fold.held_HQ @ (fold.right_QM / shifted_Q1).to(fold.held_HQ) + fold.bias_M)
        yield number, outputs


def _least(num_rows: int, num_columns: int) -> float:
    return _FLOOR * num_rows * num_columns / min(num_rows, num_columns)


def _decomposed(rows: FoldedRows, held: Tensor, training: Tensor) -> _Fold:
    """Decompose the smaller of the two matrices of inner products: that of the columns, or that of the rows."""
    y_TM = rows.truth[training].double()
    bias_M = y_TM.mean(dim=0)
    y_TM = y_TM - bias_M
    # The columns' means are 0 over all rows; the intercept is free only if they are 0 over those of the fold.
    mean_D = rows.x_ND[training].double().mean(dim=0)
    if len(training) <= rows.x_ND.shape[1]:
        x_TD = rows.x_ND[training].double() - mean_D
        values_Q, vectors_TQ = torch.linalg.eigh(x_TD @ x_TD.T)
        kept_Q = values_Q > values_Q[-1] * x_TD.shape[1] * torch.finfo(torch.float64).eps
        values_Q, vectors_TQ = values_Q[kept_Q], vectors_TQ[:, kept_Q]
        right_QM = values_Q.sqrt()[:, None] * (vectors_TQ.T @ y_TM)
        basis_DQ = x_TD.T @ (vectors_TQ / values_Q.sqrt())
    else:
        num_columns = rows.x_ND.shape[1]
        gram_DD = mean_D.new_zeros((num_columns, num_columns))
        right_DM = mean_D.new_zeros((num_columns, y_TM.shape[1]))
        for some in portions(len(training), _PORTION_CELLS // num_columns):
            x_TD = rows.x_ND[training[some]].double() - mean_D
            gram_DD.addmm_(x_TD.T, x_TD)
            right_DM.addmm_(x_TD.T, y_TM[some])
        values_Q, basis_DQ = torch.linalg.eigh(gram_DD)
        values_Q, right_QM = values_Q.clamp(min=0.0), basis_DQ.T @ right_DM
    held_HQ = (rows.x_ND[held] - mean_D.float()) @ basis_DQ.float()
    return _Fold(bias_M.float(), values_Q, right_QM, held_HQ)


def _one_by_one(
    rows: FoldedRows, strengths: Sequence[float], check: Callable[[], None], tell: Callable[[float], None]
) -> Iterator[Result]:
    for number, l2 in enumerate(strengths):
        outputs = []
        for held, training in zip(rows.folds.held, rows.folds.training, strict=True):
            mean_D = rows.x_ND[training].mean(dim=0)
            fit = fit_ridge(rows.x_ND[training] - mean_D, rows.truth[training], l2, check=check)
            outputs.append((rows.x_ND[held] - mean_D) @ fit.weights_DM.float() + fit.bias_M.float())
        yield number, outputs
        tell((number + 1) / len(strengths))
