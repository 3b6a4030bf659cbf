"""Linear heads whose outputs have nothing to do with one another, solved to convergence: one convex problem an output.

Sigmoids for several labels a row, and Huber's loss. The objective is scikit-learn's, as in ``softmax``: the sum of the
rows' losses plus ``l2 / 2`` times the squared weights, intercepts free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from trunkline_worker.training.lbfgs import minimise
from trunkline_worker.training.softmax import Design, prepare, score_strengths

# Shape suffix legend: N = rows, D = columns, R = coordinates, K = outputs, Q = directions of known curvature

_LOOSE, _TIGHT, _FLOAT32_TIGHT = 1e-4, 1e-7, 1e-5
"""Promised decrease, relative to the objective, at which a fold, or the final fit, counts as converged."""

_MIN_SLOPE = 1e-6

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Outputs and what they should be, (N, K), to the loss, its slope and its curvature, (N, K)."""


def logistic(outputs_NK: Tensor, truth_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of a sigmoid, in nats, where the truth is 0 or 1."""
    probability_NK = outputs_NK.sigmoid()
    loss_NK = functional.softplus(outputs_NK) - truth_NK * outputs_NK
    return loss_NK, probability_NK - truth_NK, probability_NK * (1 - probability_NK)


def weighted_logistic(positive_K: Tensor, negative_K: Tensor) -> Loss:
    """Return ``logistic`` with a weight for each label's presence, and one for its absence."""

    def loss(outputs_NK: Tensor, truth_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights_NK = torch.where(truth_NK > 0.5, positive_K.to(outputs_NK), negative_K.to(outputs_NK))
        loss_NK, slope_NK, curvature_NK = logistic(outputs_NK, truth_NK)
        return weights_NK * loss_NK, weights_NK * slope_NK, weights_NK * curvature_NK

    return loss


def huber(delta: float) -> Loss:
    """Half the squared error up to ``delta``, linear beyond.

    Source: Huber 1964, "Robust Estimation of a Location Parameter".
    """

    def loss(outputs_NK: Tensor, truth_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        error_NK = outputs_NK - truth_NK
        clipped_NK = error_NK.clamp(-delta, delta)
        return clipped_NK * (error_NK - 0.5 * clipped_NK), clipped_NK, (error_NK.abs() <= delta).to(error_NK)

    return loss


@dataclass(frozen=True)
class OutputwiseFit:
    """A solved problem. ``converged`` is False if the steps ran out first."""

    weights_DK: Tensor
    bias_K: Tensor
    num_iterations: int
    converged: bool


def fit_outputwise(
    design: Design,
    truth_NK: Tensor,
    loss: Loss,
    l2: float,
    start_K: Tensor,
    *,
    tolerance: float = _TIGHT,
    on_step: Callable[[int, float], None],
) -> OutputwiseFit:
    """Solve for all outputs side by side.

    Args:
        design: What ``softmax.prepare`` returned.
        truth_NK: What the outputs should be.
        loss: Convex in the outputs.
        l2: scikit-learn's 1 / C, or alpha.
        start_K: Intercepts to start from, with weights of 0.
        tolerance: As for ``minimise``; coarser where the rows are single precision.
        on_step: Called before each step with its number and the mean objective; may raise to stop.
    """
    x_NR = design.x_NR
    num_rows, num_outputs = truth_NK.shape
    truth_NK = truth_NK.to(x_NR)
    known = design.curvature
    slope_K = x_NR.new_ones(num_outputs)

    def objective(flat_KV: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal slope_K
        weights_KR, bias_K = flat_KV[:, :-1], flat_KV[:, -1]
        loss_NK, gradient_NK, curvature_NK = loss(x_NR @ weights_KR.T + bias_K, truth_NK)
        slope_K = curvature_NK.mean(dim=0).clamp(min=_MIN_SLOPE)
        gradient_KV = torch.cat([gradient_NK.T @ x_NR + l2 * weights_KR, gradient_NK.sum(dim=0)[:, None]], dim=1)
        return loss_NK.sum(dim=0) + 0.5 * l2 * weights_KR.square().sum(dim=1), gradient_KV

    def precondition(flat_KV: Tensor) -> Tensor:
        scaled_KR = known.precondition(flat_KV[:, :-1], slope_K, l2 + known.floor)
        return torch.cat([scaled_KR, flat_KV[:, -1:] / (num_rows * slope_K)[:, None]], dim=1)

    start_KV = x_NR.new_zeros((num_outputs, x_NR.shape[1] + 1))
    start_KV[:, -1] = start_K.to(x_NR)
    minimum = minimise(
        objective,
        start_KV,
        precondition=precondition,
        on_step=lambda step, value_K: on_step(step, float(value_K.sum()) / num_rows),
        tolerance=tolerance if x_NR.dtype == torch.float64 else max(tolerance, _FLOAT32_TIGHT),
    )
    solution_KV = minimum.x_PV
    return OutputwiseFit(
        design.weights(solution_KV[:, :-1].T), solution_KV[:, -1], minimum.num_iterations, minimum.converged
    )


def cross_validate_outputwise(
    x_ND: Tensor,
    truth_NK: Tensor,
    loss: Loss,
    start: Callable[[Tensor], Tensor],
    folds_N: Tensor,
    grid: Sequence[float],
    *,
    scored_N: Tensor | None = None,
    badness: Callable[[Tensor], float] | None = None,
    check: Callable[[], None],
) -> dict[float, float]:
    """Return the held-out loss, a row and output, of each strength tried; or how bad each is otherwise.

    See ``softmax.score_strengths``.

    Args:
        x_ND: Standardised rows.
        truth_NK: What the outputs should be.
        loss: As for ``fit_outputwise``.
        start: From what the outputs of some rows should be to the intercepts to start from.
        folds_N: Fold of each row.
        grid: Strengths to try.
        scored_N: Which rows are measured by; the others are trained on alone. None: all.
        badness: Says it of the outputs of all rows, each by a fit that has not seen it.
        check: Called between steps; may raise to stop.
    """
    design = prepare(x_ND)
    truth_NK = truth_NK.to(design.x_NR)
    outside_PN = [folds_N == fold for fold in range(int(folds_N.max()) + 1)]

    def score(l2: float) -> float:
        total = 0.0
        held_out_NK = torch.empty_like(truth_NK)
        for outside_N in outside_PN:
            known_NK = truth_NK[~outside_N]
            # One basis serves all folds: it holds the span of any of the rows.
            part = Design(design.x_NR[~outside_N], design.curvature)
            fit = fit_outputwise(
                part, known_NK, loss, l2, start(known_NK), tolerance=_LOOSE, on_step=lambda step, value: check()
            )
            outputs_NK = design.x_NR[outside_N] @ fit.weights_DK + fit.bias_K
            held_out_NK[outside_N] = outputs_NK
            some = slice(None) if scored_N is None else scored_N[outside_N]
            total += float(loss(outputs_NK[some], truth_NK[outside_N][some])[0].sum())
        count = truth_NK.numel() if scored_N is None else truth_NK[scored_N].numel()
        return total / count if badness is None else badness(held_out_NK)

    return score_strengths(grid, score)


def log_odds(truth_NK: Tensor) -> Tensor:
    """Return the intercepts that fit each label's share without any features."""
    num_rows = truth_NK.shape[0]
    positive_K = truth_NK.double().sum(dim=0).clamp(0.5, num_rows - 0.5)
    return positive_K.log() - (num_rows - positive_K).log()


def medians(targets_NK: Tensor) -> Tensor:
    """Return the intercepts that wild targets hardly move."""
    return targets_NK.median(dim=0).values
