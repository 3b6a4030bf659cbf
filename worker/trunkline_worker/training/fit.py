"""Fits one head on given rows and slices: standardisation, then the solver that the spec names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trunkline_worker.heads.config import HeadConfig
from trunkline_worker.heads.model import CLASSIFICATION, Head
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.metrics import measure
from trunkline_worker.training.minibatch import Split, fit_minibatches, schedule
from trunkline_worker.training.progress import Progress
from trunkline_worker.training.ridge import fit_ridge
from trunkline_worker.training.softmax import SoftmaxFit, fit_softmax, prepare
from trunkline_worker.training.split import WEIGHTS, random_stream
from trunkline_worker.training.standardise import standardisation

# Shape suffix legend: N = rows, D = columns, M = outputs

_EXPECTED_STEPS = 40
"""L-BFGS steps after which a fit is usually done: for the progress bar only."""


@dataclass(frozen=True)
class Rows:
    """Raw columns of the chosen slices and what they should give: class indices, (N,), or targets, (N, M)."""

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
    """

    head: Head
    best_epoch: int
    details: dict[str, float]


def fit_head(
    config: HeadConfig,
    spec: JobSpec,
    task: str,
    num_outputs: int,
    widths: Sequence[int],
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
        config: What the head is made of.
        spec: Names the solver, its settings and the seed.
        task: ``classification`` or ``regression``.
        num_outputs: M.
        widths: Columns of each slice.
        training: Rows that everything is fitted on.
        validation: Rows that the best epoch is chosen by; of no use to the solvers that run to convergence.
        l2: Penalty on the sum of the rows' losses.
        progress: Told how far it is.
        span: Which part of the phase this fit is.
        before: An earlier fit on most of these rows: where to start, or after how many epochs to stop.
    """
    fitted = standardisation(training.x_ND, widths)
    head = Head(config, training.x_ND.shape[1], num_outputs)
    head.mean, head.scale = fitted.mean_D, fitted.scale_D
    start, stop = span

    def tell(done: float, metrics: dict[str, float]) -> None:
        progress.tell("fit", start + (stop - start) * min(1.0, done), metrics)

    progress.tell("fit", start)
    x_ND = head.standardise(training.x_ND.float())
    details: dict[str, float] = {}
    best_epoch = 0
    if spec.solver == "adam":
        best_epoch = _fit_epochs(
            head,
            spec,
            task,
            Split(x_ND, training.truth),
            validation,
            l2,
            progress,
            tell,
            before.best_epoch if before else 0,
        )
        details["best_epoch"] = float(best_epoch)
    elif task == CLASSIFICATION:
        solved = fit_softmax(
            prepare(x_ND),
            training.truth,
            num_outputs,
            l2,
            start_from=_softmax_start(before, head) if before else None,
            on_step=lambda step, loss: tell(step / _EXPECTED_STEPS * 0.95, {"loss": loss}),
        )
        _set_linear(head, solved.weights_DK, solved.bias_K)
        details = {"num_iterations": float(solved.num_iterations), "converged": float(solved.converged)}
    else:
        ridge = fit_ridge(x_ND, training.truth, l2, check=progress.check)
        _set_linear(head, ridge.weights_DM, ridge.bias_M)
    return Fit(head.eval().requires_grad_(False), best_epoch, details)


def _fit_epochs(
    head: Head,
    spec: JobSpec,
    task: str,
    training: Split,
    validation: Rows | None,
    l2: float,
    progress: Progress,
    tell: Callable[[float, dict[str, float]], None],
    stop_after: int,
) -> int:
    plan = schedule(spec, training.x_ND.shape[0], l2)
    planned = stop_after or plan.epochs
    mean_M, scale_M = _target_scale(task, training.truth)
    seed = int(random_stream(spec.seed, WEIGHTS).integers(2**63))

    def split(x_ND: Tensor, truth: Tensor) -> Split:
        return Split(
            x_ND, truth if mean_M is None or scale_M is None else ((truth.double() - mean_M) / scale_M).float()
        )

    best_epoch = fit_minibatches(
        head,
        task,
        split(training.x_ND, training.truth),
        None if validation is None else split(head.standardise(validation.x_ND.float()), validation.truth),
        plan,
        seed=seed,
        stop_after=stop_after,
        check=progress.check,
        on_epoch=lambda epoch, losses: tell(epoch / planned * 0.95, dict(losses)),
    )
    if mean_M is not None and scale_M is not None:
        # Targets were standardised, so that one learning rate fits every unit; the output layer takes it back.
        output = head.linears[-1]
        with torch.no_grad():
            output.weight.mul_(scale_M[:, None].to(output.weight))
            output.bias.copy_(output.bias.double() * scale_M + mean_M)
    return best_epoch


def _target_scale(task: str, truth: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if task == CLASSIFICATION:
        return None, None
    truth_NM = truth.double()
    scale_M = truth_NM.std(dim=0, correction=0)
    return truth_NM.mean(dim=0), torch.where(scale_M > 0, scale_M, torch.ones_like(scale_M))


def _softmax_start(before: Fit, head: Head) -> SoftmaxFit:
    """Express an earlier fit on the columns as this head standardises them."""
    old, layer = before.head, before.head.linears[-1]
    weights_DK = (layer.weight * (head.scale / old.scale)).T
    return SoftmaxFit(weights_DK, layer(old.standardise(head.mean)), 0, False)


def _set_linear(head: Head, weights_DM: Tensor, bias_M: Tensor) -> None:
    layer = head.linears[-1]
    head.to(weights_DM.device)
    with torch.no_grad():
        layer.weight.copy_(weights_DM.T)
        layer.bias.copy_(bias_M)


@torch.inference_mode()
def measure_head(head: Head, task: str, rows: Rows, *, batch_rows: int = 8192) -> dict[str, float]:
    """Return the metrics of a head on rows, computed a portion at a time."""
    if len(rows) == 0:
        return {}
    outputs = torch.cat([head(portion.float()) for portion in rows.x_ND.split(batch_rows)])
    return measure(task, outputs, rows.truth)
