"""Linear heads with softmax, sigmoids or Huber's loss, for every strength and fold: convex problems along a path.

The objective of each problem is that of ``softmax`` and ``outputwise``. Folds and labels are solved side by side,
strengths one after another: on digits a strength takes 5 evaluations behind its neighbours, and 48 from nothing, as it
would beside them. Rows pass through in portions, so that no matrix of all rows, problems and outputs is ever held.

Source: Friedman, Hastie and Tibshirani 2010, "Regularization Paths for Generalized Linear Models via Coordinate
Descent", for starting each strength from the solution of a stronger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, REGRESSION

from trunkline_worker.training.fit import smooth_labels, target_scale
from trunkline_worker.training.outputwise import Loss, huber, log_odds, logistic, medians
from trunkline_worker.training.softmax import Curvature, Design, prepare
from trunkline_worker.training.sweep.rows import FoldedRows, HeldOut, Result, by_device, portions
from trunkline_worker.training.sweep.search import Search
from trunkline_worker.training.weighing import class_weights, label_weights

# Shape suffix legend: N = rows, R = coordinates, V = R + 1, the intercept last, P = problems, K = outputs of a problem,
# F = folds, M = outputs

_TOLERANCE = 1e-4
"""Promised decrease, relative to the objective, at which a problem counts as solved."""

_MIN_SLOPE = 1e-6
_VECTORS = 30
"""Vectors of a problem's numbers that a search holds: steps, changes of the gradient, and what is in hand."""

_SEARCH_BYTES = 2**29
"""Memory for problems that are solved side by side."""

_PORTION_CELLS = {"cpu": 2**19, "": 2**26}
"""Logits that are held at once: on a processor, what its cache holds."""

Losses = Callable[[Tensor, slice], tuple[Tensor, Tensor, Tensor]]
"""Logits of some rows, (P, K, N), which it may overwrite, and which rows they are, to the loss, (P, N), its slopes and
its curvatures, (P, K, N). Rows come last: sums over classes are then sums of long vectors."""


def softmax_losses(classes_N: Tensor, smoothing: float = 0.0) -> Losses:
    """Cross-entropy, in nats, of one class a row. ``smoothing`` is the share of a label that all classes get."""

    def losses(work_PKN: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        num_problems, num_classes, _ = work_PKN.shape
        index_P1N = classes_N[rows].expand(num_problems, 1, -1)
        work_PKN -= work_PKN.amax(dim=1, keepdim=True)
        loss_PN = -work_PKN.gather(1, index_P1N).squeeze(1)
        if smoothing:
            loss_PN = (1.0 - smoothing) * loss_PN - smoothing * work_PKN.mean(dim=1)
        total_PN = work_PKN.exp_().sum(dim=1)
        loss_PN += total_PN.log()
        work_PKN /= total_PN[:, None]
        curvature_PKN = work_PKN - work_PKN.square()
        if smoothing:
            work_PKN -= smoothing / num_classes
        work_PKN.scatter_add_(1, index_P1N, work_PKN.new_tensor(smoothing - 1.0).expand(index_P1N.shape))
        return loss_PN, work_PKN, curvature_PKN

    return losses


def outputwise_losses(truth_NM: Tensor, label_P: Tensor, loss: Loss) -> Losses:
    """What each output costs for itself: one output a problem."""

    def losses(logits_PKN: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        truth_NP = truth_NM[rows][:, label_P].to(logits_PKN)
        loss_NP, slope_NP, curvature_NP = loss(logits_PKN.squeeze(1).T, truth_NP)
        return loss_NP.T, slope_NP.T[:, None], curvature_NP.T[:, None]

    return losses


def solve(
    design: Design,
    losses: Losses,
    weights_PN: Tensor,
    l2: float,
    start_PKV: Tensor,
    search: Search,
    *,
    check: Callable[[], None],
) -> Tensor:
    """Solve problems that share the rows' coordinates and the penalty.

    Args:
        design: What ``prepare`` returned.
        losses: What the logits cost.
        weights_PN: How much each row counts.
        l2: Penalty.
        start_PKV: Where to start.
        search: What is known of the curvature.
        check: Called between steps; may raise to stop.
    """
    x_NR = design.x_NR
    shape = num_problems, num_outputs, _ = start_PKV.shape
    total_P = weights_PN.sum(dim=1)
    share_P1 = total_P[:, None] / len(x_NR)
    known = design.curvature
    ridge = l2 + known.floor
    portion_cells = by_device(_PORTION_CELLS, x_NR.device)
    slope_PK = torch.empty_like(start_PKV[:, :, 0])

    def objective(flat: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal slope_PK
        b_PKV = flat.view(shape)
        weights_PKR, bias_PK = b_PKV[:, :, :-1], b_PKV[:, :, -1]
        side_by_side = weights_PKR.flatten(0, 1)
        gradient_PKV = torch.zeros_like(b_PKV)
        curvature_PK = torch.zeros_like(bias_PK)
        summed = torch.zeros_like(side_by_side)
        value_P = 0.5 * l2 * weights_PKR.square().sum(dim=(1, 2))
        for rows in portions(len(x_NR), portion_cells // (num_problems * num_outputs)):
            logits_PKN = torch.addmm(bias_PK.reshape(-1, 1), side_by_side, x_NR[rows].T).unflatten(0, bias_PK.shape)
            loss_PN, residual_PKN, curvature_PKN = losses(logits_PKN, rows)
            count_PN = weights_PN[:, rows]
            residual_PKN = residual_PKN * count_PN[:, None]
            value_P += (loss_PN * count_PN).sum(dim=1)
            curvature_PK += (curvature_PKN * count_PN[:, None]).sum(dim=2)
            gradient_PKV[:, :, -1] += residual_PKN.sum(dim=2)
            summed.addmm_(residual_PKN.flatten(0, 1), x_NR[rows])
        slope_PK = (curvature_PK / total_P[:, None]).clamp(min=_MIN_SLOPE)
        gradient_PKV[:, :, :-1] = torch.add(summed.view_as(weights_PKR), weights_PKR, alpha=l2)
        return value_P, gradient_PKV.flatten(1)

    def precondition(flat: Tensor) -> Tensor:
        b_PKV = flat.view(shape)
        result_PKV = torch.empty_like(b_PKV)
        result_PKV[:, :, :-1] = known.precondition(b_PKV[:, :, :-1], slope_PK * share_P1, ridge)
        result_PKV[:, :, -1] = b_PKV[:, :, -1] / (total_P[:, None] * slope_PK)
        return result_PKV.flatten(1)

    solution = search.minimise(
        objective, start_PKV.flatten(1), precondition=precondition, on_step=check, tolerance=_TOLERANCE
    )
    return solution.view(shape)


@dataclass(frozen=True)
class _Family:
    """The problems of one strength: one for each fold, or for each fold and label.

    Attributes:
        fold_P: Which fold each leaves out.
        label_P: Which label it is about; all 0 for classes.
        start_PKV: Where to start: with what no feature tells.
    """

    fold_P: Tensor
    label_P: Tensor
    start_PKV: Tensor

    @classmethod
    def of(cls, rows: FoldedRows, design: Design) -> _Family:
        """Return the problems, folds in the outer order."""
        device = design.x_NR.device
        num_folds, num_labels = len(rows.folds), 1 if rows.task == CLASSIFICATION else rows.num_outputs
        if rows.task == REGRESSION:
            bias_PK = torch.cat([medians(rows.truth[training]) for training in rows.folds.training])[:, None]
        elif rows.task == CLASSIFICATION:
            counts_K = torch.bincount(rows.truth, minlength=rows.num_outputs).double().clamp(min=0.5)
            bias_PK = (counts_K.log() - counts_K.log().mean()).repeat(num_folds, 1)
        else:
            bias_PK = torch.cat([log_odds(rows.truth[training]) for training in rows.folds.training])[:, None]
        start_PKV = design.x_NR.new_zeros((num_folds * num_labels, bias_PK.shape[1], design.x_NR.shape[1] + 1))
        start_PKV[:, :, -1] = bias_PK.to(start_PKV)
        fold_P = torch.arange(num_folds, device=device).repeat_interleave(num_labels)
        return cls(fold_P, torch.arange(num_labels, device=device).repeat(num_folds), start_PKV)


def linear_outputs(
    rows: FoldedRows, strengths: Sequence[float], *, check: Callable[[], None], tell: Callable[[float], None]
) -> Iterator[Result]:
    """Yield what linear heads of each strength say of the rows that they were not trained on.

    One strength after another, from the strongest on, all folds and labels side by side: each starts where the last
    ones point to. So a result depends on the other strengths, but by no more than the tolerance.

    Args:
        rows: Of a classification, with several labels, or of a regression with Huber's loss.
        strengths: Penalties on the sum of the rows' losses.
        check: Called between steps; may raise to stop.
        tell: Called with the fraction done.
    """
    design = _single_precision(prepare(rows.x_ND))
    check()
    mean_M, scale_M = torch.zeros(1), torch.ones(1)
    if rows.task == REGRESSION:
        # From where on the loss is linear counts in standard deviations.
        mean_M, scale_M = target_scale(rows.truth)
        rows = replace(rows, truth=((rows.truth.double() - mean_M) / scale_M).float())
    family = _Family.of(rows, design)
    penalised_KV = torch.ones_like(family.start_PKV[0])
    penalised_KV[:, -1] = 0.0
    parts = list(
        portions(len(family.start_PKV), _SEARCH_BYTES // (4 * (_VECTORS * penalised_KV.numel() + len(design.x_NR))))
    )
    row_weights = _RowWeights(rows)
    held_out = [design.x_NR[held] for held in rows.folds.held]
    path, search = Path(family.start_PKV), Search()
    order = sorted(range(len(strengths)), key=lambda one: -strengths[one])
    for done, number in enumerate(order):
        # Two classes have two weight vectors, of opposite sign: see `softmax`.
        l2 = strengths[number] * (2 if rows.task == CLASSIFICATION and rows.num_outputs == 2 else 1)
        if done:
            search.shift(l2 - path.l2, penalised_KV.flatten())
        start_PKV = path.start(l2)
        solution_PKV = torch.empty_like(start_PKV)
        for part in parts:
            if len(parts) > 1:
                search = Search()  # what is remembered is the most of the memory: parts that take turns begin without
            losses = _losses(rows, family.label_P[part])
            weights_PN = row_weights.of(family.fold_P[part], family.label_P[part])
            solution_PKV[part] = solve(design, losses, weights_PN, l2, start_PKV[part], search, check=check)
        path.add(l2, solution_PKV)
        yield number, [one * scale_M.to(one) + mean_M.to(one) for one in _outputs(held_out, solution_PKV)]
        tell((done + 1) / len(order))


def _losses(rows: FoldedRows, label_P: Tensor) -> Losses:
    config = rows.around.loss
    if rows.task == CLASSIFICATION:
        return softmax_losses(rows.truth, config.label_smoothing)
    if rows.task == REGRESSION:
        return outputwise_losses(rows.truth, label_P, huber(config.huber_delta))
    return outputwise_losses(smooth_labels(rows.around, rows.truth), label_P, logistic)


class _RowWeights:
    """How much each row counts in each problem: nothing if it is held out, otherwise as its class does."""

    def __init__(self, rows: FoldedRows) -> None:
        """Weigh classes by the rows that each fold trains on, as a job on these rows would."""
        self._truth = rows.truth
        self._training_FN = rows.x_ND.new_zeros((len(rows.folds), len(rows.x_ND)))
        sides: list[tuple[Tensor, Tensor]] = []
        for training_N, training in zip(self._training_FN, rows.folds.training, strict=True):
            training_N[training] = 1.0
            truth = rows.truth[training]
            if rows.task == CLASSIFICATION:
                weights_K = class_weights(rows.around.loss, truth, rows.num_outputs)
                if weights_K is not None:
                    training_N *= weights_K.to(training_N)[rows.truth]
            elif rows.task == MULTI_LABEL:
                both = label_weights(rows.around.loss, truth)
                sides += [] if both is None else [both]
        self._sides_FM = [torch.stack(one).to(rows.x_ND) for one in zip(*sides, strict=True)]

    def of(self, fold_P: Tensor, label_P: Tensor) -> Tensor:
        """Return the weights of problems, (P, N)."""
        weights_PN = self._training_FN[fold_P]
        if self._sides_FM:
            present_P, absent_P = (one_FM[fold_P, label_P] for one_FM in self._sides_FM)
            weights_PN = weights_PN * torch.where(self._truth[:, label_P] > 0.5, present_P, absent_P).T
        return weights_PN.contiguous()


def _single_precision(design: Design) -> Design:
    """Eigenvectors need double precision. Scores do not: what it costs would buy digits far below the folds' noise."""
    known = design.curvature
    directions_RQ = None if known.directions_RQ is None else known.directions_RQ.float()
    return replace(
        design, x_NR=design.x_NR.float(), known=Curvature(directions_RQ, known.curvature_Q.float(), known.rest)
    )


class Path:
    """Solutions along falling strengths, and where the next one may lie.

    Args:
        start: Where the first one may lie.
    """

    def __init__(self, start: Tensor) -> None:
        """Start with nothing solved."""
        self._solved: list[tuple[float, Tensor]] = []
        self._start = start

    @property
    def l2(self) -> float:
        """The last strength."""
        return self._solved[-1][0]

    def start(self, l2: float) -> Tensor:
        """Go on along the last two solutions, by the logarithm of the strength, but no further than they are apart."""
        if len(self._solved) < 2:
            return self._solved[-1][1] if self._solved else self._start
        (before, before_PKV), (last, last_PKV) = self._solved
        if before <= last:
            return last_PKV
        ahead = math.log(last / l2) / math.log(before / last) if l2 > 0 else 1.0
        return last_PKV + min(1.0, ahead) * (last_PKV - before_PKV)

    def add(self, l2: float, solution_PKV: Tensor) -> None:
        """Take a solution; the one before the last is forgotten."""
        self._solved = [*self._solved[-1:], (l2, solution_PKV)]


def _outputs(held_out: Sequence[Tensor], solved_PKV: Tensor) -> HeldOut:
    """Return what the heads of each fold say of the rows that it holds out."""
    outputs = []
    for x_NR, of_fold_PKV in zip(held_out, solved_PKV.chunk(len(held_out)), strict=True):
        b_MV = of_fold_PKV.flatten(0, 1)
        outputs.append(torch.addmm(b_MV[:, -1], x_NR, b_MV[:, :-1].T))
    return outputs
