"""Softmax problems on a processor: one at a time, in numpy. A step of a small one takes some hundred microseconds.

On a processor a small tensor's operation costs less than to start it, and more yet where threads must meet at its end.
So here rows pass through in portions that a cache holds, whose logits become residuals in place: each row is read from
memory once a step. The vectors of the search are double precision, whatever the rows are.

The search is that of ``lbfgs``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

# Shape suffix legend: N = rows, R = coordinates, K = classes, V = R + 1, the intercept last, Q = directions of known
# curvature, M = steps that are remembered

Array = npt.NDArray[np.floating[Any]]
Vector = npt.NDArray[np.float64]

_PORTION_CELLS = 2**16
"""Numbers of the rows that are in hand at once: what a core's own cache holds."""

_PORTION_ROWS = 64
"""Rows of a portion at the least, however wide they are."""

_SUFFICIENT_DECREASE = 1e-4
_MAX_BACKTRACKS = 30
_HISTORY = 12

_SLOW = 0.05
"""Share of the objective: where two steps together gain less, the curvature's estimate is worth what it costs."""

_DOUBLE_DIGITS, _SINGLE_DIGITS = 1e-15, 1e-9
"""What the objective, relative to its size, may rise by and be no worse: as far as sums of rounded losses tell."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What one problem is fitted to.

    Attributes:
        x_NR: Coordinates, single or double precision.
        classes_N: Class of each row.
        num_classes: K.
        weights_N: How much each row counts; None: all alike.
        smoothing: Share of each row's label that is spread over all classes.
    """

    x_NR: Array
    classes_N: npt.NDArray[np.int64]
    num_classes: int
    weights_N: Array | None = None
    smoothing: float = 0.0

    @property
    def total(self) -> float:
        """The rows' weights in all."""
        return float(len(self.x_NR)) if self.weights_N is None else float(self.weights_N.sum(dtype=np.float64))

    def take(self, index: npt.NDArray[np.intp]) -> Rows:
        """Return some of the rows."""
        weights_N = None if self.weights_N is None else self.weights_N[index]
        return replace(self, x_NR=self.x_NR[index], classes_N=self.classes_N[index], weights_N=weights_N)

    def evaluate(self, b_KV: Vector) -> tuple[float, Vector, Vector]:
        """Return the summed loss, its gradient, (K, V), and the sum of each logit's curvature, (K,)."""
        x_NR, dtype = self.x_NR, self.x_NR.dtype
        weights_RK = np.ascontiguousarray(b_KV[:, :-1].T, dtype=dtype)
        bias_K = b_KV[:, -1].astype(dtype)
        value = 0.0
        gradient_KV = np.zeros_like(b_KV)
        curvature_K = np.zeros(self.num_classes)
        each_N = np.arange(len(x_NR))
        size = max(_PORTION_ROWS, _PORTION_CELLS // max(1, x_NR.shape[1]))
        for start in range(0, len(x_NR), size):
            x_BR = x_NR[start : start + size]
            classes_B = self.classes_N[start : start + size]
            each_B = each_N[: len(x_BR)]
            # Classes first: sums and maxima over them are then sums and maxima of long vectors.
            work_KB = np.ascontiguousarray((x_BR @ weights_RK).T)
            work_KB += bias_K[:, None]
            work_KB -= work_KB.max(axis=0)
            loss_B = -work_KB[classes_B, each_B]
            if self.smoothing:
                loss_B *= 1.0 - self.smoothing
                loss_B -= work_KB.sum(axis=0) * (self.smoothing / self.num_classes)
            np.exp(work_KB, out=work_KB)
            total_B = work_KB.sum(axis=0)
            loss_B += np.log(total_B)
            work_KB /= total_B
            sum_K = work_KB.sum(axis=1)
            if self.weights_N is None:
                value += float(loss_B.sum(dtype=np.float64))
                curvature_K += sum_K - np.einsum("kb,kb->k", work_KB, work_KB)
            else:
                weights_B = self.weights_N[start : start + size]
                value += float(loss_B @ weights_B)
                curvature_K += work_KB @ weights_B - np.einsum("kb,kb,b->k", work_KB, work_KB, weights_B)
            if self.smoothing:
                work_KB -= self.smoothing / self.num_classes
            work_KB[classes_B, each_B] -= 1.0 - self.smoothing
            if self.weights_N is not None:
                work_KB *= weights_B
            gradient_KV[:, :-1] += work_KB @ x_BR
            gradient_KV[:, -1] += work_KB.sum(axis=1)
        return value, gradient_KV, curvature_K


@dataclass(frozen=True, eq=False)
class Curvature:
    """What is known of the rows' second moments. See ``softmax.Curvature``."""

    directions_RQ: Array | None
    curvature_Q: Vector
    rest: float
    floor: float


@dataclass(frozen=True, eq=False)
class Solution:
    """Where a search ended. ``converged`` is False if the steps ran out first."""

    b_KV: Vector
    num_iterations: int
    converged: bool


def solve(
    rows: Rows,
    curvature: Callable[[], Curvature],
    l2: float,
    start_KV: Vector,
    *,
    is_exact: bool,
    min_slope: float,
    tolerance: float,
    gradient_tolerance: float = 0.0,
    on_step: Callable[[int, float], None],
    max_iterations: int = 500,
) -> Solution:
    """Minimise the rows' losses plus ``l2 / 2`` times the squared weights.

    The first guess of the inverse Hessian is as if every row had the average row's curvature. An estimate of it leads
    astray at first, where rows are as wide as they are many: Newton's steps then fit what is noise, while plain ones
    follow what many columns share. So it comes in once these are slow.

    Args:
        rows: What to fit to.
        curvature: Returns what is known of it.
        l2: Penalty.
        start_KV: Where to start.
        is_exact: Whether the curvature is no estimate.
        min_slope: Least curvature of a logit that is assumed.
        tolerance: As for ``lbfgs.minimise``.
        gradient_tolerance: The search also ends once no part of the gradient, a row, is above this.
        on_step: Called before each step with its number and the objective; may raise to stop.
        max_iterations: Most steps.
    """
    total = rows.total

    def guess(slope_K: Vector, *, is_informed: bool) -> Callable[[Vector], Vector]:
        if not is_informed:
            return lambda vector_KV: vector_KV / total
        known = curvature()
        return _Inverse(known, l2 + known.floor, total, slope_K)

    def evaluate(b_KV: Vector) -> tuple[float, Vector, Vector]:
        value, gradient_KV, slope_K = rows.evaluate(b_KV)
        weights_KR = b_KV[:, :-1]
        value += 0.5 * l2 * float(np.vdot(weights_KR, weights_KR))
        gradient_KV[:, :-1] += l2 * weights_KR
        return value, gradient_KV, np.maximum(slope_K / total, min_slope)

    history = _History(start_KV.size)
    b_KV = start_KV
    value, gradient_KV, slope_K = evaluate(b_KV)
    is_informed, before = is_exact, np.inf
    inverse = guess(slope_K, is_informed=is_informed)
    gamma = 1.0
    digits = _DOUBLE_DIGITS if rows.x_NR.dtype == np.float64 else _SINGLE_DIGITS
    for iteration in range(max_iterations):
        on_step(iteration, value)
        direction_KV = -history.apply(gradient_KV, gamma, inverse)
        slope = float(np.vdot(gradient_KV, direction_KV))
        steepest = float(np.abs(gradient_KV).max())
        if not (-slope > tolerance * abs(value) and steepest > gradient_tolerance * total):
            return Solution(b_KV, iteration, True)
        length = 1.0
        for _ in range(_MAX_BACKTRACKS):
            new_KV = b_KV + length * direction_KV
            new_value, new_gradient_KV, slope_K = evaluate(new_KV)
            if new_value <= value + _SUFFICIENT_DECREASE * length * slope + digits * abs(value):
                break
            length *= 0.5
        else:  # lower values are below what these numbers can tell apart
            return Solution(b_KV, iteration, True)
        is_informed, before = is_informed or before - new_value < _SLOW * new_value, value
        inverse = guess(slope_K, is_informed=is_informed)
        step_KV, change_KV = new_KV - b_KV, new_gradient_KV - gradient_KV
        if history.add(step_KV, change_KV):
            gamma = float(np.vdot(step_KV, change_KV)) / float(np.vdot(change_KV, inverse(change_KV)))
        b_KV, value, gradient_KV = new_KV, new_value, new_gradient_KV
    return Solution(b_KV, max_iterations, False)


def _reciprocal(values: Vector) -> Vector:
    """Return one over each; 0 for 0: where neither rows nor penalty curve the loss there is no gradient to follow."""
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > 0)


class _Inverse:
    """Applies an estimate of the inverse Hessian. See ``softmax`` for the same on tensors."""

    def __init__(self, curvature: Curvature, ridge: float, total: float, slope_K: Vector) -> None:
        self._directions_RQ = curvature.directions_RQ
        self._along_KQ = _reciprocal(slope_K[:, None] * curvature.curvature_Q + ridge)
        self._bias_K = 1.0 / (total * slope_K)
        self._rest_K1 = _reciprocal(slope_K * curvature.rest + ridge)[:, None]

    def __call__(self, vector_KV: Vector) -> Vector:
        result_KV = np.empty_like(vector_KV)
        weights_KR = vector_KV[:, :-1]
        if self._directions_RQ is None:
            np.multiply(self._along_KQ, weights_KR, out=result_KV[:, :-1])
        else:
            # An estimate needs no more digits than the directions have.
            along_KQ = weights_KR.astype(self._directions_RQ.dtype) @ self._directions_RQ
            along_KQ *= (self._along_KQ - self._rest_K1).astype(along_KQ.dtype)
            result_KV[:, :-1] = along_KQ @ self._directions_RQ.T
            result_KV[:, :-1] += self._rest_K1 * weights_KR
        np.multiply(self._bias_K, vector_KV[:, -1], out=result_KV[:, -1])
        return result_KV


class _History:
    """The last steps, oldest first, and what they did to the gradient.

    Source: Byrd, Nocedal and Schnabel 1994, "Representations of Quasi-Newton Matrices and Their Use in Limited Memory
    Methods", equation 2.6: the two loops of ``lbfgs`` as a few products with all the steps at once.
    """

    def __init__(self, size: int) -> None:
        self._steps_MV, self._changes_MV = np.empty((_HISTORY, size)), np.empty((_HISTORY, size))
        self._inverse_MM = np.zeros((_HISTORY, _HISTORY))  # of the upper triangle of steps times changes
        self._curvature_M = np.zeros(_HISTORY)
        self._count = 0

    def add(self, step_KV: Vector, change_KV: Vector) -> bool:
        """Remember a step, unless it says nothing. Returns whether it does."""
        product = float(np.vdot(step_KV, change_KV))
        size = float(np.vdot(step_KV, step_KV) * np.vdot(change_KV, change_KV)) ** 0.5
        if not product > np.finfo(np.float64).eps * size:
            return False
        if self._count == _HISTORY:
            for kept in (self._steps_MV, self._changes_MV, self._curvature_M):
                kept[:-1] = kept[1:]
            # Of a triangle's inverse a corner is the inverse of the corner.
            self._inverse_MM[:-1, :-1] = self._inverse_MM[1:, 1:]
            self._count -= 1
        last = self._count
        self._steps_MV[last], self._changes_MV[last] = step_KV.ravel(), change_KV.ravel()
        self._curvature_M[last] = product
        across_M = self._steps_MV[:last] @ self._changes_MV[last]
        self._inverse_MM[:last, last] = self._inverse_MM[:last, :last] @ across_M / -product
        self._inverse_MM[last, :last] = 0.0
        self._inverse_MM[last, last] = 1.0 / product
        self._count += 1
        return True

    def apply(self, gradient_KV: Vector, gamma: float, inverse: Callable[[Vector], Vector]) -> Vector:
        """Return the inverse Hessian times the gradient, ``gamma`` times ``inverse`` being the guess without steps."""
        if not self._count:
            return gamma * inverse(gradient_KV)
        steps_MV, changes_MV = self._steps_MV[: self._count], self._changes_MV[: self._count]
        inverse_MM = self._inverse_MM[: self._count, : self._count]
        alpha_M = inverse_MM @ (steps_MV @ gradient_KV.ravel())
        result_KV = gamma * inverse(gradient_KV - (alpha_M @ changes_MV).reshape(gradient_KV.shape))
        beta_M = inverse_MM.T @ (self._curvature_M[: self._count] * alpha_M - changes_MV @ result_KV.ravel())
        result_KV += (beta_M @ steps_MV).reshape(gradient_KV.shape)
        return result_KV
