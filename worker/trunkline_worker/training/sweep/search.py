"""L-BFGS that remembers: searches one after another, each over nearly the problems of the last.

``lbfgs.minimise`` starts every search with what the preconditioner knows. Along a path of penalties most of what a
search learns about the curvature holds for the next one, and how the penalty itself changes it is known exactly: so the
steps are kept. Digits, 16 strengths: 110 evaluations instead of 254 at equal tolerance, 75 with a start on the path's
tangent.

Source: Nocedal and Wright, Numerical Optimization, 2nd edition, algorithms 7.4 (two loops) and 3.1 (backtracking).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vecdot

from trunkline_worker.training.lbfgs import Objective

# Shape suffix legend: P = problems, V = variables of one problem

_HISTORY = 12
_SUFFICIENT_DECREASE = 1e-4
_MAX_BACKTRACKS = 30
_MAX_ITERATIONS = 500


@dataclass(frozen=True)
class _Pair:
    """One step and what it did to the gradient. ``rho_P`` is 0 for problems that the pair says nothing about."""

    s_PV: Tensor
    y_PV: Tensor
    rho_P: Tensor

    @classmethod
    def of(cls, s_PV: Tensor, y_PV: Tensor) -> _Pair:
        curvature_P = vecdot(s_PV, y_PV)
        tiny = torch.finfo(curvature_P.dtype).eps
        told_P = curvature_P > tiny * s_PV.norm(dim=1) * y_PV.norm(dim=1)
        return cls(s_PV, y_PV, torch.where(told_P, 1.0 / curvature_P, 0.0))


class Search:
    """Searches over smooth convex functions, several independent ones side by side."""

    def __init__(self) -> None:
        """Start with nothing remembered."""
        self._pairs: deque[_Pair] = deque(maxlen=_HISTORY)
        self._gamma_P = torch.ones(())

    def shift(self, change: float, penalised_V: Tensor) -> None:
        """Correct what is remembered for a penalty that changes.

        Args:
            change: What is added to the curvature.
            penalised_V: 1 for variables that the penalty covers, else 0.
        """
        pairs = [
            _Pair.of(one.s_PV, torch.addcmul(one.y_PV, one.s_PV, penalised_V, value=change)) for one in self._pairs
        ]
        self._pairs = deque(pairs, maxlen=_HISTORY)

    def minimise(
        self,
        objective: Objective,
        start_PV: Tensor,
        *,
        precondition: Callable[[Tensor], Tensor],
        on_step: Callable[[], None],
        tolerance: float,
    ) -> Tensor:
        """Return where the functions are least, (P, V). As ``lbfgs.minimise``, which see.

        Args:
            objective: Values and gradients.
            start_PV: Where to start.
            precondition: Applies an estimate of the inverse Hessian to (P, V); symmetric and positive definite.
            on_step: Called before each step; may raise to stop.
            tolerance: A problem is done once a step promises to lower its value by less than this fraction.
        """
        x_PV = start_PV
        value_P, gradient_PV = objective(x_PV)
        active_P = torch.ones_like(value_P, dtype=torch.bool)
        for _ in range(_MAX_ITERATIONS):
            on_step()
            direction_PV = -self._inverse_hessian(gradient_PV, precondition)
            slope_P = vecdot(gradient_PV, direction_PV)
            active_P = active_P & (-slope_P > tolerance * value_P.abs())
            if not bool(active_P.any()):
                break
            step_P = active_P.to(value_P)
            new_PV, new_value_P, new_gradient_PV = x_PV, value_P, gradient_PV
            for _ in range(_MAX_BACKTRACKS):
                new_PV = torch.addcmul(x_PV, step_P[:, None], direction_PV)
                new_value_P, new_gradient_PV = objective(new_PV)
                fine_P = new_value_P <= value_P + _SUFFICIENT_DECREASE * step_P * slope_P
                if bool((fine_P | ~active_P).all()):
                    break
                step_P = torch.where(fine_P, step_P, step_P * 0.5)
            else:
                # Lower values are below what this floating-point type can tell apart.
                active_P = active_P & fine_P
                step_P = step_P * active_P
                new_PV = torch.addcmul(x_PV, step_P[:, None], direction_PV)
                new_value_P, new_gradient_PV = objective(new_PV)
            self._remember(_Pair.of(new_PV - x_PV, new_gradient_PV - gradient_PV), precondition)
            x_PV, value_P, gradient_PV = new_PV, new_value_P, new_gradient_PV
        return x_PV

    def _remember(self, pair: _Pair, precondition: Callable[[Tensor], Tensor]) -> None:
        """Add a pair, and scale the preconditioner to match the newest curvature that is known."""
        if not self._pairs:
            self._gamma_P = torch.ones_like(pair.rho_P)
        self._pairs.append(pair)
        scaled_P = pair.rho_P * vecdot(pair.y_PV, precondition(pair.y_PV))
        self._gamma_P = torch.where(scaled_P > 0, 1.0 / scaled_P, self._gamma_P)

    def _inverse_hessian(self, gradient_PV: Tensor, precondition: Callable[[Tensor], Tensor]) -> Tensor:
        q_PV = gradient_PV.clone()
        alphas = []
        for pair in reversed(self._pairs):
            alpha_P = pair.rho_P * vecdot(pair.s_PV, q_PV)
            q_PV.addcmul_(alpha_P[:, None], pair.y_PV, value=-1.0)
            alphas.append(alpha_P)
        r_PV = precondition(q_PV)
        if self._pairs:
            r_PV *= self._gamma_P[:, None]
        for pair, alpha_P in zip(self._pairs, reversed(alphas), strict=True):
            beta_P = pair.rho_P * vecdot(pair.y_PV, r_PV)
            r_PV.addcmul_((alpha_P - beta_P)[:, None], pair.s_PV)
        return r_PV
