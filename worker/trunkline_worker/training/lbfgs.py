"""L-BFGS over several independent problems at once, with a preconditioner.

torch's own optimiser takes one problem, a scalar start for the inverse Hessian and an autograd graph; here folds are
solved side by side in one matrix product, the start is the problem's known curvature, and gradients are written out.

Source: Nocedal and Wright, Numerical Optimization, 2nd edition, algorithms 7.4 (two loops) and 3.1 (backtracking).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Shape suffix legend: P = problems, V = variables of one problem

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(P, V) to the values, (P,), and the gradients, (P, V)."""

_SUFFICIENT_DECREASE = 1e-4
_MAX_BACKTRACKS = 30


@dataclass(frozen=True)
class Minimum:
    """Where the search ended.

    Attributes:
        x_PV: The points.
        value_P: The objective there.
        num_iterations: Steps taken.
        converged: Whether every problem met the tolerance before the steps ran out.
    """

    x_PV: Tensor
    value_P: Tensor
    num_iterations: int
    converged: bool


@dataclass(frozen=True)
class _Pair:
    """One step and what it did to the gradient. ``rho_P`` is 0 for problems that the pair says nothing about."""

    s_PV: Tensor
    y_PV: Tensor
    rho_P: Tensor


def minimise(
    objective: Objective,
    start_PV: Tensor,
    *,
    precondition: Callable[[Tensor], Tensor],
    on_step: Callable[[int, Tensor], None],
    tolerance: float,
    max_iterations: int = 500,
    history: int = 12,
) -> Minimum:
    """Minimise smooth convex functions.

    Args:
        objective: Values and gradients.
        start_PV: Where to start.
        precondition: Applies an estimate of the inverse Hessian to (P, V); symmetric and positive definite.
        on_step: Called before each step with its number and the values; may raise to stop.
        tolerance: A problem is done once a step promises to lower its value by less than this fraction.
        max_iterations: Most steps.
        history: Steps that are remembered.
    """
    x_PV = start_PV
    value_P, gradient_PV = objective(x_PV)
    active_P = torch.ones_like(value_P, dtype=torch.bool)
    pairs: deque[_Pair] = deque(maxlen=history)
    gamma_P = torch.ones_like(value_P)
    for iteration in range(max_iterations):
        on_step(iteration, value_P)
        direction_PV = -_inverse_hessian(gradient_PV, pairs, gamma_P, precondition)
        slope_P = _dot(gradient_PV, direction_PV)
        active_P = active_P & (-slope_P > tolerance * value_P.abs())
        if not bool(active_P.any()):
            return Minimum(x_PV, value_P, iteration, True)
        step_P = active_P.to(value_P)
        new_PV, new_value_P, new_gradient_PV = x_PV, value_P, gradient_PV
        for _ in range(_MAX_BACKTRACKS):
            new_PV = x_PV + step_P[:, None] * direction_PV
            new_value_P, new_gradient_PV = objective(new_PV)
            fine_P = new_value_P <= value_P + _SUFFICIENT_DECREASE * step_P * slope_P
            if bool((fine_P | ~active_P).all()):
                break
            step_P = torch.where(fine_P, step_P, step_P * 0.5)
        else:
            # Lower values are below what this floating-point type can tell apart.
            active_P = active_P & fine_P
            step_P = step_P * active_P
            new_PV = x_PV + step_P[:, None] * direction_PV
            new_value_P, new_gradient_PV = objective(new_PV)
        gamma_P = _remember(pairs, gamma_P, new_PV - x_PV, new_gradient_PV - gradient_PV, precondition)
        x_PV, value_P, gradient_PV = new_PV, new_value_P, new_gradient_PV
    return Minimum(x_PV, value_P, max_iterations, False)


def _remember(
    pairs: deque[_Pair], gamma_P: Tensor, s_PV: Tensor, y_PV: Tensor, precondition: Callable[[Tensor], Tensor]
) -> Tensor:
    """Add a pair; return how the preconditioner must be scaled to match the newest curvature."""
    curvature_P = _dot(s_PV, y_PV)
    tiny = torch.finfo(curvature_P.dtype).eps
    told_P = curvature_P > tiny * _dot(y_PV, y_PV).sqrt() * _dot(s_PV, s_PV).sqrt()
    one_P = torch.ones_like(curvature_P)
    rho_P = torch.where(told_P, 1.0 / torch.where(told_P, curvature_P, one_P), 0.0 * one_P)
    pairs.append(_Pair(s_PV, y_PV, rho_P))
    scaled_P = _dot(y_PV, precondition(y_PV))
    return torch.where(told_P & (scaled_P > 0), curvature_P / torch.where(scaled_P > 0, scaled_P, one_P), gamma_P)


def _inverse_hessian(
    gradient_PV: Tensor, pairs: deque[_Pair], gamma_P: Tensor, precondition: Callable[[Tensor], Tensor]
) -> Tensor:
    q_PV = gradient_PV
    alphas = []
    for pair in reversed(pairs):
        alpha_P = pair.rho_P * _dot(pair.s_PV, q_PV)
        q_PV = q_PV - alpha_P[:, None] * pair.y_PV
        alphas.append(alpha_P)
    r_PV = gamma_P[:, None] * precondition(q_PV)
    for pair, alpha_P in zip(pairs, reversed(alphas), strict=True):
        beta_P = pair.rho_P * _dot(pair.y_PV, r_PV)
        r_PV = r_PV + (alpha_P - beta_P)[:, None] * pair.s_PV
    return r_PV


def _dot(a_PV: Tensor, b_PV: Tensor) -> Tensor:
    return (a_PV * b_PV).sum(dim=1)
