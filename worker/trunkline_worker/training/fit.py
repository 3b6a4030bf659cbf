"""Fits one head on given rows and slices: standardisation, then the solver that the spec names."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from trunkline_wire.fits import HUBER, QUANTILE
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, ORDINAL, PROTOTYPE, REGRESSION

from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.metrics import badness
from trunkline_worker.training.minibatch import Split, fit_minibatches, schedule
from trunkline_worker.training.objective import Objective
from trunkline_worker.training.ordinal import fit_ordinal
from trunkline_worker.training.outputwise import (
    Loss,
    OutputwiseFit,
    fit_outputwise,
    huber,
    log_odds,
    logistic,
    medians,
    weighted_logistic,
)
from trunkline_worker.training.progress import Progress
from trunkline_worker.training.prototype import fit_prototypes
from trunkline_worker.training.ridge import fit_ridge
from trunkline_worker.training.softmax import SoftmaxFit, fit_softmax, prepare, prepare_softmax
from trunkline_worker.training.split import WEIGHTS, random_stream
from trunkline_worker.training.standardise import input_statistics
from trunkline_worker.training.weighing import class_weights, label_weights, row_weights

# Shape suffix legend: N = rows, D = columns, M = outputs

_EXPECTED_STEPS = 40
"""L-BFGS steps after which a fit is usually done: for the progress bar only."""


@dataclass(frozen=True)
class Rows:
    """Raw columns of all inputs and what they should give: class indices, (N,), or targets, (N, M)."""

    x_ND: Tensor
    truth: Tensor

    def __len__(self) -> int:
        """Return N."""
        return self.x_ND.shape[0]

    def take(self, index: Tensor) -> Rows:
        """Return some of the rows."""
        return Rows(self.x_ND[index], self.truth[index])


@dataclass(frozen=True)
class Fit:
    """A fitted head on the CPU, and how the fitting went.

    Attributes:
        head: Takes raw columns.
        best_epoch: Epoch whose parameters it holds; 0 where there are no epochs.
        details: ``num_iterations``, ``converged`` and the like, for the metrics.
        curves: The losses of each epoch or step, and what else was told of it, by name.
    """

    head: Head
    best_epoch: int
    details: dict[str, float]
    curves: dict[str, list[float]] = field(default_factory=dict)


def fit_head(
    spec: JobSpec,
    task: str,
    num_outputs: int,
    inputs: Sequence[HeadInput],
    training: Rows,
    validation: Rows | None,
    l2: float,
    progress: Progress,
    *,
    span: tuple[float, float],
    before: Fit | None = None,
) -> Fit:
    """Fit a head.

    Args:
        spec: What the head is made of, the solver, its settings and the seed.
        task: One of ``heads.TASKS``.
        num_outputs: M; of classes in order the thresholds between them.
        inputs: What the columns are.
        training: Rows that everything is fitted on.
        validation: Rows that the best epoch is chosen by; of no use to the solvers that run to convergence.
        l2: Penalty on the sum of the rows' losses.
        progress: Told how far it is.
        span: Which part of the phase this fit is.
        before: An earlier fit on most of these rows: where to start, or after how many epochs to stop.
    """
    head = Head(spec.head, inputs, num_outputs)
    head.mean, head.scale = input_statistics(training.x_ND, inputs)
    start, stop = span

    curves: dict[str, list[float]] = {}
    count = itertools.count(1)
    unit = "epoch" if spec.solver == "adamw" else "step"
    # The second fit counts from 1 again, and has more rows: its numbers are no continuation of the first one's.
    prefix = "refit_" if before else ""

    def tell(done: float, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            curves.setdefault(name, []).append(value)
        told = {prefix + name: value for name, value in metrics.items()} | {unit: float(next(count))}
        progress.tell("fit", start + (stop - start) * min(1.0, done), told)

    progress.tell("fit", start)
    best_epoch = 0
    if spec.solver == "adamw":
        stop_after = before.best_epoch if before else 0
        best_epoch = _fit_epochs(head, spec, task, training, validation, l2, progress, tell, stop_after)
        details = {"best_epoch": float(best_epoch)}
    else:
        x_ND = head.standardise(training.x_ND.float())
        details = _fit_to_convergence(head, spec, task, x_ND, training.truth, l2, progress, tell, before)
    return Fit(head.eval().requires_grad_(False), best_epoch, details, curves)


def _fit_to_convergence(
    head: Head,
    spec: JobSpec,
    task: str,
    x_ND: Tensor,
    truth: Tensor,
    l2: float,
    progress: Progress,
    tell: Callable[[float, dict[str, float]], None],
    before: Fit | None,
) -> dict[str, float]:
    """Set the head's only layer. Returns how the solver fared."""

    def on_step(step: int, loss: float) -> None:
        tell(step / _EXPECTED_STEPS * 0.95, {"loss": loss})

    solved: SoftmaxFit | OutputwiseFit
    if spec.head.kind == PROTOTYPE:
        weights_DK, bias_K = fit_prototypes(x_ND, task, truth, head.output.out_features, l2, check=progress.check)
        _set_linear(head, weights_DK, bias_K)
        return {}
    if task == CLASSIFICATION:
        start_from = _softmax_start(before, head) if before else None
        num_classes = head.output.out_features
        solved = fit_softmax(
            prepare_softmax(x_ND),
            truth,
            num_classes,
            l2,
            weights_N=row_weights(spec.loss, truth, num_classes),
            smoothing=spec.loss.label_smoothing,
            start_from=start_from,
            on_step=on_step,
        )
        _set_linear(head, solved.weights_DK, solved.bias_K)
    elif task == ORDINAL:
        num_classes = head.output.out_features + 1
        weights_N = row_weights(spec.loss, truth, num_classes)
        solved = fit_ordinal(prepare(x_ND), truth, num_classes, l2, weights_N=weights_N, on_step=on_step)
        _set_linear(head, solved.weights_DK, solved.bias_K)
    elif task == MULTI_LABEL:
        targets_NM = smooth_labels(spec, truth)
        solved = fit_outputwise(
            prepare(x_ND), targets_NM, labels_loss(spec, truth), l2, log_odds(truth), on_step=on_step
        )
        _set_linear(head, solved.weights_DK, solved.bias_K)
    elif spec.loss.kind == HUBER:
        mean_M, scale_M = target_scale(truth)
        targets_NM = (truth.double() - mean_M) / scale_M
        loss = huber(spec.loss.huber_delta)
        solved = fit_outputwise(prepare(x_ND), targets_NM, loss, l2, medians(targets_NM), on_step=on_step)
        _set_linear(head, solved.weights_DK, solved.bias_K)
        _unstandardise_targets(head, mean_M, scale_M)
    else:
        ridge = fit_ridge(x_ND, truth, l2, check=progress.check)
        _set_linear(head, ridge.weights_DM, ridge.bias_M)
        return {}
    return {"num_iterations": float(solved.num_iterations), "converged": float(solved.converged)}


def _fit_epochs(
    head: Head,
    spec: JobSpec,
    task: str,
    training: Rows,
    validation: Rows | None,
    l2: float,
    progress: Progress,
    tell: Callable[[float, dict[str, float]], None],
    stop_after: int,
) -> int:
    plan = schedule(spec, head, len(training), l2)
    planned = stop_after or plan.epochs
    # Targets are standardised, so that one learning rate fits every unit; the output layer takes it back.
    scale = target_scale(training.truth) if task == REGRESSION else None
    seed = int(random_stream(spec.seed, WEIGHTS).integers(2**63))

    def split(rows: Rows) -> Split:
        if scale is None:
            return Split(rows.x_ND, rows.truth)
        return Split(rows.x_ND, ((rows.truth.double() - scale[0]) / scale[1]).float())

    def bad(outputs: Tensor) -> float:
        assert validation is not None
        return selected_badness(
            spec, task, outputs if scale is None else outputs * scale[1] + scale[0], validation.truth
        )

    best_epoch = fit_minibatches(
        head,
        make_objective(spec, task, head.output.out_features, training.truth),
        split(training),
        None if validation is None else split(validation),
        plan,
        seed=seed,
        badness=bad if spec.select_by else None,
        stop_after=stop_after,
        check=progress.check,
        on_epoch=lambda epoch, losses: tell(epoch / planned * 0.95, dict(losses)),
    )
    if scale is not None:
        _unstandardise_targets(head, *scale)
    return best_epoch


def make_objective(spec: JobSpec, task: str, num_outputs: int, truth: Tensor) -> Objective:
    """Return what minibatches minimise; classes are weighed by how many rows they have."""
    if task == CLASSIFICATION:
        return Objective(task, spec.loss, class_weights(spec.loss, truth, num_outputs))
    if task == MULTI_LABEL:
        weights = label_weights(spec.loss, truth)
        return Objective(task, spec.loss) if weights is None else Objective(task, spec.loss, *weights)
    return Objective(task, spec.loss)


def labels_loss(spec: JobSpec, truth_NM: Tensor) -> Loss:
    """Return what is minimised where a row may be of several classes."""
    weights = label_weights(spec.loss, truth_NM)
    return logistic if weights is None else weighted_logistic(*weights)


def smooth_labels(spec: JobSpec, truth_NM: Tensor) -> Tensor:
    """Return what the probabilities of labels should be: not quite 0 and 1 where they are smoothed."""
    smoothing = spec.loss.label_smoothing
    return truth_NM * (1.0 - smoothing) + 0.5 * smoothing if smoothing else truth_NM


def selected_badness(spec: JobSpec, task: str, outputs: Tensor, truth: Tensor) -> float:
    """Return the metric that a spec selects by so that lower is better."""
    return badness(task, spec.select_by, outputs, truth, quantile=quantile_of(spec))


def quantile_of(spec: JobSpec) -> float:
    """Return which quantile a spec predicts; 0: none."""
    return spec.loss.quantile if spec.loss.kind == QUANTILE else 0.0


def target_scale(truth_NM: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each target; 1 for one that does not vary."""
    truth_NM = truth_NM.double()
    scale_M = truth_NM.std(dim=0, correction=0)
    return truth_NM.mean(dim=0), torch.where(scale_M > 0, scale_M, torch.ones_like(scale_M))


def _unstandardise_targets(head: Head, mean_M: Tensor, scale_M: Tensor) -> None:
    with torch.no_grad():
        head.output.weight.mul_(scale_M[:, None].to(head.output.weight))
        head.output.bias.copy_(head.output.bias.double() * scale_M + mean_M)


def _softmax_start(before: Fit, head: Head) -> SoftmaxFit:
    """Express an earlier fit on the columns as this head standardises them."""
    old, layer = before.head, before.head.output
    weights_DK = (layer.weight * (head.scale / old.scale)).T
    return SoftmaxFit(weights_DK, layer(old.standardise(head.mean)), 0, False)


def _set_linear(head: Head, weights_DM: Tensor, bias_M: Tensor) -> None:
    head.to(weights_DM.device)
    with torch.no_grad():
        head.output.weight.copy_(weights_DM.T)
        head.output.bias.copy_(bias_M)


def soften(head: Head, temperature: float) -> None:
    """Divide a head's outputs by a temperature from now on."""
    with torch.no_grad():
        head.output.weight.div_(temperature)
        head.output.bias.div_(temperature)
