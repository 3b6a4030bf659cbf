"""Ridge regression: in closed form, and many kernels cross-validated at once.

Source: An, Liu and Venkatesh 2007, "Fast cross-validation algorithms for least squares support vector machine and
kernel ridge regression", for the held-out residuals of a fold from one inverse over all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trunkline_worker.training.lbfgs import minimise

# Shape suffix legend: N = rows, D = columns, M = outputs, A = kernels, S = strengths, F = repetitions of the folds

_MAX_CLOSED_FORM = 4096
_BATCH_CELLS = 2**23
_FLOOR = 1e-10
"""Smallest penalty, as a fraction of the kernel's mean diagonal: keeps dependent columns from being divided by zero."""


@dataclass(frozen=True)
class RidgeFit:
    """Weights on standardised columns, and intercepts."""

    weights_DM: Tensor
    bias_M: Tensor


def fit_ridge(x_ND: Tensor, targets_NM: Tensor, l2: float, *, check: Callable[[], None]) -> RidgeFit:
    """Minimise half the squared error's sum plus ``l2 / 2`` times the squared weights, intercepts free.

    Args:
        x_ND: Standardised rows: every column's mean is 0, so the intercepts are the targets' means.
        targets_NM: What to predict.
        l2: scikit-learn's ``alpha``.
        check: Called between steps; may raise to stop.
    """
    bias_M = targets_NM.double().mean(dim=0)
    centred_NM = targets_NM.double() - bias_M
    num_rows, num_columns = x_ND.shape
    l2 = max(l2, _FLOOR * num_rows * num_columns / min(num_rows, num_columns))
    check()
    if min(num_rows, num_columns) > _MAX_CLOSED_FORM:
        return RidgeFit(_iterate(x_ND, centred_NM.to(x_ND), l2, check), bias_M)
    x_ND = x_ND.double()
    if num_rows <= num_columns:
        # The row space holds the optimum: see `softmax`.
        return RidgeFit(x_ND.T @ _solve_shifted(x_ND @ x_ND.T, l2, centred_NM), bias_M)
    return RidgeFit(_solve_shifted(x_ND.T @ x_ND, l2, x_ND.T @ centred_NM), bias_M)


def _solve_shifted(gram: Tensor, l2: float, right: Tensor) -> Tensor:
    gram.diagonal().add_(l2)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))


def _iterate(x_ND: Tensor, targets_NM: Tensor, l2: float, check: Callable[[], None]) -> Tensor:
    shape = (x_ND.shape[1], targets_NM.shape[1])

    def objective(flat_PV: Tensor) -> tuple[Tensor, Tensor]:
        weights_DM = flat_PV.view(shape)
        residual_NM = x_ND @ weights_DM - targets_NM
        value = 0.5 * residual_NM.square().sum() + 0.5 * l2 * weights_DM.square().sum()
        return value[None], (x_ND.T @ residual_NM + l2 * weights_DM).view(1, -1)

    scale = 1.0 / (l2 + x_ND.shape[0])
    minimum = minimise(
        objective,
        x_ND.new_zeros((1, shape[0] * shape[1])),
        precondition=lambda flat_PV: flat_PV * scale,
        on_step=lambda step, value_P: check(),
        tolerance=1e-7,
    )
    return minimum.x_PV.view(shape).double()


def held_out_predictions(
    kernels_ANN: Tensor,
    targets_NM: Tensor,
    folds_FN: Tensor,
    strengths: Sequence[float],
    *,
    check: Callable[[float], None],
) -> Tensor:
    """Predict each row by kernel ridge trained on the other folds, for every kernel and strength.

    With ``C`` the kernel plus the penalty and ``a = C^-1 Y``, what a fold ``b`` is off by, once it is left out, is
    ``(C^-1[b, b])^-1 a[b]``: one inverse serves all folds, and all repetitions of them.

    Args:
        kernels_ANN: Mean diagonal near 1.
        targets_NM: Centred.
        folds_FN: Fold of each row, once per repetition.
        strengths: Penalty per row, so ``strength * N`` on the diagonal.
        check: Called between batches with the fraction done; may raise to stop.

    Shape:
        returns (A, S, F, N, M), float64.
    """
    num_kernels, num_rows, _ = kernels_ANN.shape
    targets_NM = targets_NM.double()
    strengths_S = torch.tensor(strengths, dtype=torch.float64, device=kernels_ANN.device)
    shift_SNN = torch.diag_embed((strengths_S * num_rows)[:, None].expand(-1, num_rows))
    members = [
        [torch.nonzero(fold_N == fold).squeeze(1) for fold in range(int(fold_N.max()) + 1)] for fold_N in folds_FN
    ]
    predictions = targets_NM.new_empty(
        (num_kernels, len(strengths), len(folds_FN), num_rows, targets_NM.shape[1]),
    )
    size = max(1, _BATCH_CELLS // (len(strengths) * num_rows**2))
    for start in range(0, num_kernels, size):
        check(start / num_kernels)
        shifted = kernels_ANN[start : start + size, None].double() + shift_SNN
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        dual = inverse @ targets_NM
        for repetition, folds in enumerate(members):
            for rows in folds:
                block = inverse[..., rows[:, None], rows]
                off = torch.cholesky_solve(dual[..., rows, :], torch.linalg.cholesky(block))
                predictions[start : start + size, :, repetition, rows] = targets_NM[rows] - off
    return predictions
