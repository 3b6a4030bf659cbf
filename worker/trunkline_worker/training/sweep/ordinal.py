"""Linear heads for classes in order, for every strength and fold: convex problems along a path of strengths.

The objective of each problem is that of ``training.ordinal``; the way along the path is that of ``linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trunkline_worker.training.ordinal import above
from trunkline_worker.training.softmax import Design, prepare
from trunkline_worker.training.sweep.linear import Path
from trunkline_worker.training.sweep.rows import FoldedRows, Result
from trunkline_worker.training.sweep.search import Search
from trunkline_worker.training.weighing import row_weights

# Shape suffix legend: N = rows, R = coordinates, P = problems, one for each fold, T = thresholds, one fewer than
# classes, V = R + T, Q = directions of known curvature

_TOLERANCE = 1e-5
_MIN_SLOPE = 1e-6


def ordinal_outputs(
    rows: FoldedRows, strengths: Sequence[float], *, check: Callable[[], None], tell: Callable[[float], None]
) -> Iterator[Result]:
    """Yield the log-odds of lying above each threshold, of the rows that a fold was not trained on.

    Args:
        rows: Of classes in order.
        strengths: Penalties on the sum of the rows' losses.
        check: Called between steps; may raise to stop.
        tell: Called with the fraction done.
    """
    design = prepare(rows.x_ND)
    check()
    problem = _Problem(rows, design)
    path, search = Path(problem.start_PV), Search()
    penalised_V = torch.ones_like(problem.start_PV[0])
    penalised_V[problem.width :] = 0.0
    order = sorted(range(len(strengths)), key=lambda one: -strengths[one])
    for done, number in enumerate(order):
        l2 = strengths[number]
        if done:
            search.shift(l2 - path.l2, penalised_V)
        solution_PV = problem.solve(l2, path.start(l2), search, check)
        path.add(l2, solution_PV)
        outputs = []
        for held, weights_R, bias_T in zip(
            rows.folds.held, solution_PV[:, : problem.width], solution_PV[:, problem.width :], strict=True
        ):
            outputs.append(((design.x_NR[held] @ weights_R)[:, None] + bias_T).float())
        yield number, outputs
        tell((done + 1) / len(order))


class _Problem:
    """The folds' problems, which share the rows' coordinates and the penalty.

    Attributes:
        width: R.
        start_PV: Where to start: with what no feature tells.
    """

    def __init__(self, rows: FoldedRows, design: Design) -> None:
        """Weigh the rows of each fold."""
        self._design = design
        self.width = design.x_NR.shape[1]
        self._above_NT = above(rows.truth, rows.num_outputs).to(design.x_NR)
        self._weights_NP = design.x_NR.new_zeros((len(design.x_NR), len(rows.folds)))
        for problem, training in enumerate(rows.folds.training):
            own_N = row_weights(rows.around.loss, rows.truth[training], rows.num_outputs)
            self._weights_NP[training, problem] = 1.0 if own_N is None else own_N.to(design.x_NR)
        self._total_P = self._weights_NP.sum(dim=0)
        share_PT = (self._weights_NP.T @ self._above_NT) / self._total_P[:, None]
        least = 0.5 / len(design.x_NR)
        self.start_PV = design.x_NR.new_zeros((len(rows.folds), self.width + self._above_NT.shape[1]))
        self.start_PV[:, self.width :] = share_PT.clamp(least, 1.0 - least).logit()

    def solve(self, l2: float, start_PV: Tensor, search: Search, check: Callable[[], None]) -> Tensor:
        """Return the solutions, (P, V): weights, then thresholds."""
        design, width = self._design, self.width
        known = design.curvature
        ridge = l2 + known.floor
        share_P = self._total_P / len(design.x_NR)
        slope_PT = torch.ones_like(start_PV[:, width:])

        def objective(flat_PV: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal slope_PT
            weights_PR, bias_PT = flat_PV[:, :width], flat_PV[:, width:]
            outputs_NPT = (design.x_NR @ weights_PR.T)[:, :, None] + bias_PT
            probability_NPT = outputs_NPT.sigmoid()
            loss_NPT = functional.softplus(outputs_NPT) - self._above_NT[:, None] * outputs_NPT
            value_P = (loss_NPT.sum(dim=2) * self._weights_NP).sum(dim=0) + 0.5 * l2 * weights_PR.square().sum(dim=1)
            residual_NPT = (probability_NPT - self._above_NT[:, None]) * self._weights_NP[:, :, None]
            curvature_NPT = probability_NPT * (1 - probability_NPT) * self._weights_NP[:, :, None]
            slope_PT = (curvature_NPT.sum(dim=0) / self._total_P[:, None]).clamp(min=_MIN_SLOPE)
            gradient_PR = residual_NPT.sum(dim=2).T @ design.x_NR + l2 * weights_PR
            return value_P, torch.cat([gradient_PR, residual_NPT.sum(dim=0)], dim=1)

        def precondition(flat_PV: Tensor) -> Tensor:
            weights_PR, bias_PT = flat_PV[:, :width], flat_PV[:, width:]
            scaled_PR = known.precondition(weights_PR, slope_PT.sum(dim=1) * share_P, ridge)
            return torch.cat([scaled_PR, bias_PT / (self._total_P[:, None] * slope_PT)], dim=1)

        return search.minimise(objective, start_PV, precondition=precondition, on_step=check, tolerance=_TOLERANCE)
