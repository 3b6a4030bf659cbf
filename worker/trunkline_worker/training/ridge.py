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

# Shape suffix legend: N = rows, D = columns, M = outputs, A = kernels, S = strengths, G = groups of one size,
# B = rows of a group

_MAX_CLOSED_FORM = 4096
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


def left_out_predictions(
    kernels_ANN: Tensor, targets_NM: Tensor, strengths: Sequence[float], groups_N: Tensor | None = None
) -> Tensor:
    """Predict each row by kernel ridge, intercept free, fitted to all the other rows: for every kernel and strength.

    With ``C`` the kernel plus the penalty, ``u = C^-1 1`` and ``P = C^-1 - u u' / (1' u)``, what row ``i`` is off by,
    once it is left out, is ``(P Y)[i] / P[i, i]``: one inverse serves all rows. As the intercept is fitted without the
    row too, nothing about its target reaches its prediction. A group of rows that are left out together is off by
    ``P[g, g]^-1 (P Y)[g]``, ``P[g, g]`` being its rows and columns.

    Args:
        kernels_ANN: Mean diagonal near 1. Their type is the one that is computed in.
        targets_NM: What to predict.
        strengths: Penalty per row, so ``strength * N`` on the diagonal.
        groups_N: Group of each row, two groups at least: all rows of it are left out at a time. None: each is its own.

    Shape:
        returns (A, S, N, M).
    """
    num_rows = kernels_ANN.shape[1]
    penalty_S1 = torch.tensor(strengths, dtype=kernels_ANN.dtype, device=kernels_ANN.device)[:, None] * num_rows
    # A free intercept takes up any constant in the kernel. With one, the row of ones is not an almost lost direction of
    # a centred kernel, and subtracting its part from the inverse costs no digits.
    shifted_ASNN = (kernels_ANN[:, None] + 1.0).repeat(1, len(strengths), 1, 1)
    shifted_ASNN.diagonal(dim1=2, dim2=3).add_(penalty_S1)
    inverse_ASNN = torch.cholesky_inverse(torch.linalg.cholesky(shifted_ASNN))
    u_ASN1 = inverse_ASNN.sum(dim=3, keepdim=True)
    total_AS11 = u_ASN1.sum(dim=2, keepdim=True)
    dual_ASNM = inverse_ASNN @ targets_NM
    dual_ASNM -= u_ASN1 * (dual_ASNM.sum(dim=2, keepdim=True) / total_AS11)
    if groups_N is not None:
        return targets_NM - _left_out_residuals(inverse_ASNN, u_ASN1, total_AS11, dual_ASNM, groups_N)
    diagonal_ASN1 = inverse_ASNN.diagonal(dim1=2, dim2=3)[..., None] - u_ASN1.square() / total_AS11
    return targets_NM - dual_ASNM / diagonal_ASN1


def _left_out_residuals(
    inverse_ASNN: Tensor, u_ASN1: Tensor, total_AS11: Tensor, dual_ASNM: Tensor, groups_N: Tensor
) -> Tensor:
    """Return what the rows of each group are off by, once all of it is left out. Groups of one size go together."""
    residual_ASNM = torch.empty_like(dual_ASNM)
    _, dense_N, size_G = torch.unique(groups_N, return_inverse=True, return_counts=True)
    order_N = torch.argsort(dense_N, stable=True)
    start_G = size_G.cumsum(0) - size_G
    for size in torch.unique(size_G).tolist():
        index_GB = order_N[start_G[size_G == size][:, None] + torch.arange(size, device=order_N.device)]
        u_ASGB = u_ASN1.squeeze(3)[:, :, index_GB]
        block_ASGBB = inverse_ASNN[:, :, index_GB[:, :, None], index_GB[:, None, :]]
        block_ASGBB = block_ASGBB - u_ASGB[..., :, None] * u_ASGB[..., None, :] / total_AS11[..., None]
        solved_ASGBM = torch.linalg.solve(block_ASGBB, dual_ASNM[:, :, index_GB])
        residual_ASNM[:, :, index_GB] = solved_ASGBM
    return residual_ASNM
