"""Linear heads for classes in order: one weight vector, and a threshold between each class and the next.

The objective is the sum, over rows and thresholds, of the logistic loss of lying on the right side of the threshold,
plus ``l2 / 2`` times the squared weights. It is convex, and its thresholds come out in order.

Source: Rennie and Srebro 2005, "Loss Functions for Preference Levels: Regression with Discrete Ordered Labels" (the
all-threshold loss).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trunkline_worker.training.lbfgs import minimise
from trunkline_worker.training.outputwise import OutputwiseFit
from trunkline_worker.training.softmax import Design, prepare, score_strengths

# Shape suffix legend: N = rows, D = columns, R = coordinates, T = thresholds, one fewer than classes

_LOOSE, _TIGHT, _FLOAT32_TIGHT = 1e-4, 1e-7, 1e-5
"""Promised decrease, relative to the objective, at which a fold, or the final fit, counts as converged."""

_MIN_SLOPE = 1e-6


def above(classes_N: Tensor, num_classes: int) -> Tensor:
    """Return for each row and threshold whether the row's class lies above it, (N, T), 0 or 1."""
    return (classes_N[:, None] > torch.arange(num_classes - 1, device=classes_N.device)).double()


def fit_ordinal(
    design: Design,
    classes_N: Tensor,
    num_classes: int,
    l2: float,
    *,
    weights_N: Tensor | None = None,
    tolerance: float = _TIGHT,
    on_step: Callable[[int, float], None],
) -> OutputwiseFit:
    """Solve on all rows. The fit has one column of weights for each threshold, all the same.

    Args:
        design: What ``softmax.prepare`` returned.
        classes_N: Class of each row, from the lowest, 0.
        num_classes: T + 1.
        l2: scikit-learn's 1 / C.
        weights_N: How much each row counts. None: all alike.
        tolerance: As for ``minimise``; coarser where the rows are single precision.
        on_step: Called before each step with its number and the mean objective; may raise to stop.
    """
    x_NR = design.x_NR
    num_rows = x_NR.shape[0]
    above_NT = above(classes_N, num_classes).to(x_NR)
    weights_N1 = (x_NR.new_ones(num_rows) if weights_N is None else weights_N.to(x_NR))[:, None]
    total = weights_N1.sum()
    known = design.curvature
    width = x_NR.shape[1]
    slope_T = x_NR.new_ones(num_classes - 1)

    def objective(flat_1V: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal slope_T
        weights_R, bias_T = flat_1V[0, :width], flat_1V[0, width:]
        outputs_NT = (x_NR @ weights_R)[:, None] + bias_T
        probability_NT = outputs_NT.sigmoid()
        loss = ((functional.softplus(outputs_NT) - above_NT * outputs_NT) * weights_N1).sum()
        residual_NT = (probability_NT - above_NT) * weights_N1
        curvature_NT = probability_NT * (1 - probability_NT) * weights_N1
        slope_T = (curvature_NT.sum(dim=0) / total).clamp(min=_MIN_SLOPE)
        gradient_V = torch.cat([x_NR.T @ residual_NT.sum(dim=1) + l2 * weights_R, residual_NT.sum(dim=0)])
        return (loss + 0.5 * l2 * weights_R.square().sum())[None], gradient_V[None]

    def precondition(flat_1V: Tensor) -> Tensor:
        weights_R, bias_T = flat_1V[0, :width], flat_1V[0, width:]
        scaled_R = known.precondition(weights_R, slope_T.sum(), l2 + known.floor)
        return torch.cat([scaled_R, bias_T / (total * slope_T)])[None]

    share_T = ((above_NT * weights_N1).sum(dim=0) / total).clamp(0.5 / num_rows, 1.0 - 0.5 / num_rows)
    start_1V = torch.cat([x_NR.new_zeros(width), share_T.logit()])[None]
    minimum = minimise(
        objective,
        start_1V,
        precondition=precondition,
        on_step=lambda step, value_P: on_step(step, float(value_P[0]) / num_rows),
        tolerance=tolerance if x_NR.dtype == torch.float64 else max(tolerance, _FLOAT32_TIGHT),
    )
    solution_V = minimum.x_PV[0]
    weights_D = design.weights(solution_V[:width, None])[:, 0]
    return OutputwiseFit(
        weights_D[:, None].expand(-1, num_classes - 1), solution_V[width:], minimum.num_iterations, minimum.converged
    )


def cross_validate_ordinal(
    x_ND: Tensor,
    classes_N: Tensor,
    num_classes: int,
    folds_N: Tensor,
    grid: Sequence[float],
    *,
    weights_N: Tensor | None = None,
    scored_N: Tensor | None = None,
    badness: Callable[[Tensor], float] | None = None,
    check: Callable[[], None],
) -> dict[float, float]:
    """Return the held-out loss a row of each strength tried; or how bad each is otherwise.

    See ``softmax.cross_validate_l2``, whose arguments these are.
    """
    design = prepare(x_ND)
    weights_N = design.x_NR.new_ones(len(classes_N)) if weights_N is None else weights_N.to(design.x_NR)
    counted_N = weights_N if scored_N is None else weights_N * scored_N
    above_NT = above(classes_N, num_classes).to(design.x_NR)

    def score(l2: float) -> float:
        held_out_NT = torch.empty_like(above_NT)
        for fold in range(int(folds_N.max()) + 1):
            outside_N = folds_N == fold
            known_N = ~outside_N
            # One basis serves all folds: it holds the span of any of the rows.
            part = Design(design.x_NR[known_N], design.curvature)
            fit = fit_ordinal(
                part,
                classes_N[known_N],
                num_classes,
                l2,
                weights_N=weights_N[known_N],
                tolerance=_LOOSE,
                on_step=lambda step, value: check(),
            )
            held_out_NT[outside_N] = design.x_NR[outside_N] @ fit.weights_DK + fit.bias_K
        if badness is not None:
            return badness(held_out_NT)
        loss_NT = functional.softplus(held_out_NT) - above_NT * held_out_NT
        return float((loss_NT.sum(dim=1) * counted_N).sum() / counted_N.sum())

    return score_strengths(grid, score)
