"""Linear heads with softmax and cross-entropy, solved to convergence.

The objective is scikit-learn's: the sum of the rows' losses plus ``l2 / 2`` times the squared weights, intercepts free,
``l2 = 1 / C``. Two classes have one weight vector there and two here, of opposite sign, so the penalty is doubled to
give the same classifier.

With fewer rows than columns the optimum is a combination of the rows, whatever the loss (the representer theorem:
Schölkopf, Herbrich and Smola 2001, "A Generalized Representer Theorem", theorem 1): any part of the weights across the
rows' span adds to the penalty and changes no logit. So the problem is solved, exactly, in a basis of that span.

On a processor ``processor`` does the work, in numpy; here it is done for other devices, all folds side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from trunkline_worker.training import processor
from trunkline_worker.training.lbfgs import minimise

# Shape suffix legend: N = rows, D = columns, R = columns of the basis in use, Q = directions of known curvature,
# P = problems, K = classes, X = any number of problems

MAX_BASIS = 1024
"""Largest basis worth an eigendecomposition: beyond it, the solver's plain steps are cheaper."""

_MIN_SLOPE = 1e-6
"""Least curvature of a logit that the preconditioner assumes."""

_MAX_ROTATED_CELLS = 1_000_000
"""Of rows wider than tall: turning more of them costs what a whole fit does."""

_SKETCH_ROWS = 256
_FLOAT64_CELLS = 8_000_000

_LOOSE, _TIGHT, _FLOAT32_TIGHT = 1e-3, 1e-9, 1e-4
"""Promised decrease, relative to the objective, at which a fold, or the final fit, counts as converged.

The last is for rows of single precision, and on a processor for any but small problems."""

_GRADIENT = 1e-4
"""Steepest slope of the mean loss at which these are done as well: what scikit-learn stops at by default. Where classes
are told apart without a mistake a weak penalty makes the last digits of the objective dear; no prediction gains."""

_SMALL_CELLS = 2**16
"""Numbers of rows so few that their fit is as exact as doubles allow, for nothing."""

_MIN_SINGLE_TOLERANCE = 1e-5
"""What rows in single precision can tell apart with certainty."""


def _same(coordinates_RK: Tensor) -> Tensor:
    return coordinates_RK


@dataclass(frozen=True)
class Curvature:
    """The rows' second moments.

    Attributes:
        directions_RQ: Orthonormal directions of known curvature; None where they are the axes themselves.
        curvature_Q: Sum over the rows of the squared coordinate along each direction.
        rest: The same for any other direction.
    """

    directions_RQ: Tensor | None
    curvature_Q: Tensor
    rest: float

    @property
    def floor(self) -> float:
        """What keeps directions without rows from getting endless steps when there is no penalty."""
        return 1e-8 * float(self.curvature_Q.max()) if self.curvature_Q.numel() else 1.0

    def precondition(self, weights_XR: Tensor, slope_X: Tensor, ridge: float | Tensor) -> Tensor:
        """Return an estimate of the inverse Hessian times gradients.

        As if every row had the average row's curvature: exact along directions that nothing has been learnt along yet,
        and close to the penalty's own where the rows are already right.

        Args:
            weights_XR: Gradients by coordinates, for any number of problems.
            slope_X: Mean over the rows of each problem's loss's second derivative.
            ridge: The penalty and ``floor``; may differ by problem, (..., 1).
        """
        slope_X1 = slope_X[..., None]
        inverse_XQ = 1.0 / (self.curvature_Q * slope_X1 + ridge)
        if self.directions_RQ is None:
            return inverse_XQ * weights_XR
        inverse_rest_X1 = 1.0 / (self.rest * slope_X1 + ridge)
        along_XQ = (weights_XR @ self.directions_RQ) * (inverse_XQ - inverse_rest_X1)
        return along_XQ @ self.directions_RQ.T + inverse_rest_X1 * weights_XR


@dataclass(frozen=True)
class Design:
    """Standardised rows in the coordinates in which the problem is solved, with their curvature.

    Attributes:
        x_NR: The rows. In their own columns (R = D), or in a basis of their span.
        known: Their curvature; None where it is estimated once somebody asks.
        weights: From coordinates, (R, K), to weights on the columns, (D, K).
        coordinates: From weights on the columns to coordinates, of the part that lies in the basis.
    """

    x_NR: Tensor
    known: Curvature | None
    weights: Callable[[Tensor], Tensor] = _same
    coordinates: Callable[[Tensor], Tensor] = _same

    @cached_property
    def curvature(self) -> Curvature:
        """The rows' curvature."""
        return self.known or _estimated(self.x_NR)


def prepare(x_ND: Tensor, *, is_precise: bool = True) -> Design:
    """Choose coordinates for standardised rows.

    Args:
        x_ND: The rows.
        is_precise: Whether rows that stay as they are, and are not too many, get double precision.
    """
    num_rows, num_columns = x_ND.shape
    if num_rows < num_columns and num_rows <= MAX_BASIS:
        x_ND = x_ND.double()
        values_N, vectors_NN = torch.linalg.eigh(x_ND @ x_ND.T)
        kept_N = values_N > values_N[-1] * num_columns * torch.finfo(torch.float64).eps
        values_R, vectors_NR = values_N[kept_N], vectors_NN[:, kept_N]
        root_R = values_R.sqrt()
        dual_NR = vectors_NR / root_R
        return Design(
            vectors_NR * root_R,
            Curvature(None, values_R, 0.0),
            # The basis itself, (D, R), is never needed: two thin products do its work.
            weights=lambda coordinates_RK: x_ND.T @ (dual_NR @ coordinates_RK),
            coordinates=lambda weights_DK: dual_NR.T @ (x_ND @ weights_DK),
        )
    if num_columns <= MAX_BASIS and x_ND.numel() <= _MAX_ROTATED_CELLS:
        x_ND = x_ND.double()
        values_D, vectors_DD = torch.linalg.eigh(x_ND.T @ x_ND)
        return Design(
            x_ND @ vectors_DD,
            Curvature(None, values_D.clamp(min=0.0), 0.0),
            weights=lambda coordinates_DK: vectors_DD @ coordinates_DK,
            coordinates=lambda weights_DK: vectors_DD.T @ weights_DK,
        )
    return Design(x_ND.double() if is_precise and x_ND.numel() <= _FLOAT64_CELLS else x_ND.float(), None)


def prepare_softmax(x_ND: Tensor) -> Design:
    """Choose coordinates for ``fit_softmax``, which on a processor computes in single precision but for few rows."""
    return prepare(x_ND, is_precise=x_ND.device.type != "cpu" or x_ND.numel() <= _SMALL_CELLS)


def _estimated(x_ND: Tensor) -> Curvature:
    """Return what evenly spaced rows say of the curvature: enough for a preconditioner."""
    num_rows, num_columns = x_ND.shape
    sketch_SD = x_ND[:: max(1, num_rows // _SKETCH_ROWS)][:_SKETCH_ROWS].double()
    share = num_rows / sketch_SD.shape[0]
    if num_columns <= sketch_SD.shape[0]:
        values_Q, directions_DQ = torch.linalg.eigh(sketch_SD.T @ sketch_SD)
    else:
        values_Q, vectors_SQ = torch.linalg.eigh(sketch_SD @ sketch_SD.T)
        kept_Q = values_Q > values_Q[-1] * 1e-8
        values_Q = values_Q[kept_Q]
        directions_DQ = sketch_SD.T @ (vectors_SQ[:, kept_Q] / values_Q.sqrt())
    rest = float(values_Q.min().clamp(min=0.0)) * share if values_Q.numel() else 0.0
    return Curvature(directions_DQ.to(x_ND), (values_Q.clamp(min=0.0) * share).to(x_ND), rest)


@dataclass(frozen=True)
class SoftmaxFit:
    """A solved problem. ``converged`` is False if the steps ran out first."""

    weights_DK: Tensor
    bias_K: Tensor
    num_iterations: int
    converged: bool


def fit_softmax(
    design: Design,
    classes_N: Tensor,
    num_classes: int,
    l2: float,
    *,
    weights_N: Tensor | None = None,
    smoothing: float = 0.0,
    start_from: SoftmaxFit | None = None,
    on_step: Callable[[int, float], None],
) -> SoftmaxFit:
    """Solve one problem on all rows.

    Args:
        design: What ``prepare`` returned.
        classes_N: Class of each row.
        num_classes: K.
        l2: scikit-learn's 1 / C.
        weights_N: How much each row counts. None: all alike.
        smoothing: Share of each row's label that is spread over all classes.
        start_from: A solution of nearly the same problem; saves steps.
        on_step: Called before each step with its number and the mean objective; may raise to stop.
    """
    num_rows = design.x_NR.shape[0]
    double = design.x_NR.dtype == torch.float64
    start = design.x_NR.new_zeros((1, design.x_NR.shape[1] + 1, num_classes))
    if start_from is None:
        ones_N = design.x_NR.new_ones(num_rows) if weights_N is None else weights_N
        start[0, -1] = _log_shares(classes_N, num_classes, ones_N).to(start)
    else:
        start[0, :-1], start[0, -1] = design.coordinates(start_from.weights_DK.to(start)), start_from.bias_K.to(start)

    def tell(step: int, value: float) -> None:
        on_step(step, value / num_rows)

    if _on_processor(design):
        is_small = double and design.x_NR.numel() <= _SMALL_CELLS
        tolerance = _TIGHT if is_small else _FLOAT32_TIGHT
        rows = _rows(design, classes_N, num_classes, weights_N, smoothing, tolerance)
        gradient_tolerance = 0.0 if is_small else _GRADIENT
        solved = _solve_on_processor(design, rows, start[0], l2, tolerance, tell, gradient_tolerance)
        b_RK = torch.from_numpy(solved.b_KV).T.to(start)
        return SoftmaxFit(design.weights(b_RK[:-1]), b_RK[-1], solved.num_iterations, solved.converged)
    weights_PN = design.x_NR.new_ones((1, num_rows)) if weights_N is None else weights_N.to(design.x_NR)[None]
    solution, iterations, converged = _solve(
        design,
        classes_N,
        weights_PN,
        start,
        l2,
        _TIGHT if double else _FLOAT32_TIGHT,
        lambda step, value_P: tell(step, float(value_P[0])),
        smoothing=smoothing,
    )
    return SoftmaxFit(design.weights(solution[0, :-1]), solution[0, -1], iterations, converged)


def score_strengths(grid: Sequence[float], score: Callable[[float], float]) -> dict[float, float]:
    """Return the held-out loss of each strength tried.

    From the middle one to weaker ones and then to stronger ones, each way until two in a row were worse than the best.
    """
    ordered = sorted(grid, reverse=True)
    middle = len(ordered) // 2
    scores: dict[float, float] = {}
    for way in (ordered[middle:], ordered[:middle][::-1]):
        # What lies beyond the middle follows it: if the other side was better, one more that is worse is enough.
        worse = int(bool(scores) and scores[ordered[middle]] > min(scores.values()))
        for l2 in way:
            scores[l2] = score(l2)
            worse = worse + 1 if scores[l2] > min(scores.values()) else 0
            if worse == 2:
                break
    return scores


def cross_validate_l2(
    x_ND: Tensor,
    classes_N: Tensor,
    num_classes: int,
    folds_N: Tensor,
    grid: Sequence[float],
    *,
    weights_N: Tensor | None = None,
    smoothing: float = 0.0,
    scored_N: Tensor | None = None,
    badness: Callable[[Tensor], float] | None = None,
    keep: Callable[[float, Tensor], None] = lambda l2, log_NK: None,
    check: Callable[[], None],
) -> dict[float, float]:
    """Return the held-out cross-entropy, in nats per row, of each strength tried; or how bad each is otherwise.

    Each starts where the last one ended, all folds side by side. See ``score_strengths``.

    Args:
        x_ND: Standardised rows.
        classes_N: Class of each row.
        num_classes: K.
        folds_N: Fold of each row; -1 for one that every fit may see, and that is not measured by.
        grid: Strengths to try.
        weights_N: As for ``fit_softmax``; held-out rows count as much.
        smoothing: Likewise.
        scored_N: Which rows of the folds are measured by; the others are trained on alone. None: all.
        badness: Says it of the logits of all rows, (N, K), each by a fit that has not seen it; 0 for rows of no fold.
        keep: Takes each strength and what it made of the rows, as ``held_out_logs``.
        check: Called between steps; may raise to stop.
    """
    design = prepare_softmax(x_ND)
    path = _FoldPath(design, classes_N, num_classes, folds_N, weights_N, smoothing, check)
    counts_N = torch.ones_like(classes_N, dtype=torch.float64) if weights_N is None else weights_N.double()
    counts_N = counts_N * (folds_N >= 0)
    if scored_N is not None:
        counts_N = counts_N * scored_N.to(counts_N)

    def score(l2: float) -> float:
        path.move(l2)
        log_NK = path.held_out_logs()
        keep(l2, log_NK)
        if badness is not None:
            return badness(log_NK)
        loss_N = -log_NK.gather(1, classes_N[:, None]).squeeze(1).double()
        return float((loss_N * counts_N).sum() / counts_N.sum())

    return score_strengths(grid, score)


def held_out_logs(
    x_ND: Tensor,
    classes_N: Tensor,
    num_classes: int,
    folds_N: Tensor,
    l2: float,
    *,
    check: Callable[[], None],
) -> Tensor:
    """Return the logarithms of each row's probabilities, (N, K), by a fit to the rows of the other folds.

    As exactly as is worth comparing. See ``cross_validate_l2``.
    """
    path = _FoldPath(prepare_softmax(x_ND), classes_N, num_classes, folds_N, None, 0.0, check)
    path.move(l2)
    return path.held_out_logs()


class _FoldPath:
    """One problem for each fold, which leaves it out. As the strength moves, each starts where the last one ended."""

    def __init__(
        self,
        design: Design,
        classes_N: Tensor,
        num_classes: int,
        folds_N: Tensor,
        weights_N: Tensor | None,
        smoothing: float,
        check: Callable[[], None],
    ) -> None:
        self._design, self._classes_N, self._folds_N = design, classes_N, folds_N.to(torch.int64)
        self._smoothing, self._check = smoothing, check
        fold_P = torch.arange(int(folds_N.max()) + 1, device=folds_N.device)
        x_NR = design.x_NR
        counts_N = x_NR.new_ones(len(classes_N)) if weights_N is None else weights_N.to(x_NR)
        self._solution_PRK = x_NR.new_zeros((len(fold_P), x_NR.shape[1] + 1, num_classes))
        self._solution_PRK[:, -1] = _log_shares(classes_N, num_classes, counts_N).to(x_NR)
        self._training_PN = (folds_N[None, :] != fold_P[:, None]).to(x_NR) * counts_N
        self._rows: list[processor.Rows] = []
        if _on_processor(design):
            every = _rows(design, classes_N, num_classes, weights_N, smoothing, _LOOSE)
            self._rows = [every.take(np.flatnonzero(folds_N.numpy() != fold)) for fold in range(len(fold_P))]

    def move(self, l2: float) -> None:
        """Solve at a strength."""
        if not self._rows:
            self._solution_PRK, _, _ = _solve(
                self._design,
                self._classes_N,
                self._training_PN,
                self._solution_PRK,
                l2,
                _LOOSE,
                lambda step, value_P: self._check(),
                smoothing=self._smoothing,
            )
            return
        for start_RK, rows in zip(self._solution_PRK, self._rows, strict=True):
            solved = _solve_on_processor(self._design, rows, start_RK, l2, _LOOSE, lambda step, value: self._check())
            start_RK.copy_(torch.from_numpy(solved.b_KV).T)

    def held_out_logs(self) -> Tensor:
        """Return the logarithms of each row's probabilities, (N, K), by the fit that has not seen it; 0 without one."""
        x_NR = self._design.x_NR
        log_NK = x_NR.new_zeros((len(x_NR), self._solution_PRK.shape[2]))
        for fold, b_RK in enumerate(self._solution_PRK):
            held = (self._folds_N == fold).nonzero().squeeze(1)
            log_NK[held] = torch.addmm(b_RK[-1], x_NR[held], b_RK[:-1]).log_softmax(dim=1)
        return log_NK


def _on_processor(design: Design) -> bool:
    return design.x_NR.device.type == "cpu"


def _rows(
    design: Design, classes_N: Tensor, num_classes: int, weights_N: Tensor | None, smoothing: float, tolerance: float
) -> processor.Rows:
    """Return a problem's rows as ``processor`` takes them, in no more digits than the tolerance asks for."""
    dtype = torch.float32 if tolerance >= _MIN_SINGLE_TOLERANCE else design.x_NR.dtype
    x_NR = design.x_NR.to(dtype).numpy()
    weights = None if weights_N is None else weights_N.to(dtype).numpy()
    return processor.Rows(x_NR, classes_N.numpy(), num_classes, weights, smoothing)


def _solve_on_processor(
    design: Design,
    rows: processor.Rows,
    start_RK: Tensor,
    l2: float,
    tolerance: float,
    on_step: Callable[[int, float], None],
    gradient_tolerance: float = 0.0,
) -> processor.Solution:
    def curvature() -> processor.Curvature:
        known = design.curvature
        directions_RQ = None if known.directions_RQ is None else known.directions_RQ.numpy()
        return processor.Curvature(directions_RQ, known.curvature_Q.double().numpy(), known.rest, known.floor)

    return processor.solve(
        rows,
        cache(curvature),
        l2 * 2 if rows.num_classes == 2 else l2,
        np.ascontiguousarray(start_RK.double().T.numpy()),
        is_exact=design.known is not None,
        min_slope=_MIN_SLOPE,
        tolerance=tolerance,
        gradient_tolerance=gradient_tolerance,
        on_step=on_step,
    )


def _solve(
    design: Design,
    classes_N: Tensor,
    weights_PN: Tensor,
    start_PRK: Tensor,
    l2: float,
    tolerance: float,
    on_step: Callable[[int, Tensor], None],
    *,
    smoothing: float = 0.0,
) -> tuple[Tensor, int, bool]:
    """Solve problems that differ in their rows' weights. The last row of (R + 1, K) holds the intercepts."""
    x_NR = design.x_NR
    num_problems, _, num_classes = start_PRK.shape
    shape = start_PRK.shape
    l2 = l2 * 2 if num_classes == 2 else l2
    # What each row's probabilities should be.
    target_NK = torch.nn.functional.one_hot(classes_N, num_classes).to(x_NR)
    target_NK = target_NK * (1.0 - smoothing) + smoothing / num_classes

    total_P1 = weights_PN.sum(dim=1, keepdim=True)
    known = design.curvature

    def slopes(probability_PNK: Tensor) -> Tensor:
        """Return the mean over the rows of each logit's curvature, p (1 - p)."""
        mean_PK = (probability_PNK * (1 - probability_PNK) * weights_PN[:, :, None]).sum(dim=1) / total_P1
        return mean_PK.clamp(min=_MIN_SLOPE)

    slope_PK = x_NR.new_full((num_problems, num_classes), 1.0 / num_classes)

    def objective(flat_PV: Tensor) -> tuple[Tensor, Tensor]:
        b_PRK = flat_PV.view(shape)
        loss_PN, log_PNK = _losses(x_NR, classes_N, b_PRK)
        if smoothing:
            loss_PN = (1.0 - smoothing) * loss_PN - smoothing * log_PNK.mean(dim=2)
        probability_PNK = log_PNK.exp_()
        nonlocal slope_PK
        slope_PK = slopes(probability_PNK)
        residual_PNK = (probability_PNK - target_NK) * weights_PN[:, :, None]
        gradient_PRK = torch.empty_like(b_PRK)
        residual_NPK = residual_PNK.transpose(0, 1).reshape(x_NR.shape[0], num_problems * num_classes)
        gradient_PRK[:, :-1] = (x_NR.T @ residual_NPK).view(x_NR.shape[1], num_problems, num_classes).transpose(0, 1)
        gradient_PRK[:, :-1] += l2 * b_PRK[:, :-1]
        gradient_PRK[:, -1] = residual_PNK.sum(dim=1)
        value_P = (loss_PN * weights_PN).sum(dim=1) + 0.5 * l2 * b_PRK[:, :-1].square().sum(dim=(1, 2))
        return value_P, gradient_PRK.view(num_problems, -1)

    def precondition(flat_PV: Tensor) -> Tensor:
        b_PRK = flat_PV.view(shape)
        result_PRK = torch.empty_like(b_PRK)
        scaled_PKR = known.precondition(b_PRK[:, :-1].transpose(1, 2), slope_PK, l2 + known.floor)
        result_PRK[:, :-1] = scaled_PKR.transpose(1, 2)
        result_PRK[:, -1] = b_PRK[:, -1] / (total_P1 * slope_PK)
        return result_PRK.view(num_problems, -1)

    minimum = minimise(
        objective,
        start_PRK.reshape(num_problems, -1),
        precondition=precondition,
        on_step=on_step,
        tolerance=tolerance,
    )
    return minimum.x_PV.view(shape), minimum.num_iterations, minimum.converged


def _losses(x_NR: Tensor, classes_N: Tensor, b_PRK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy, (P, N), and the logarithms of the probabilities, (P, N, K)."""
    num_problems, _, num_classes = b_PRK.shape
    logits_NPK = x_NR @ b_PRK[:, :-1].transpose(0, 1).reshape(x_NR.shape[1], num_problems * num_classes)
    logits_PNK = logits_NPK.view(x_NR.shape[0], num_problems, num_classes).transpose(0, 1) + b_PRK[:, -1:]
    log_PNK = logits_PNK.log_softmax(dim=2)
    index_PN1 = classes_N[None, :, None].expand(num_problems, -1, 1)
    return -log_PNK.gather(2, index_PN1).squeeze(2), log_PNK


def _log_shares(classes_N: Tensor, num_classes: int, weights_N: Tensor) -> Tensor:
    """Return the intercepts that fit the classes' shares without any features: where every fit starts."""
    counts_K = torch.bincount(classes_N, weights_N.double(), minlength=num_classes).clamp(min=0.5)
    log_K = counts_K.log()
    return log_K - log_K.mean()
