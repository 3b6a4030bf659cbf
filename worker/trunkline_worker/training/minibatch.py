"""Training in minibatches: heads with hidden layers or convolutions, and linear ones on request."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import CLASSIFICATION, CONV, LINEAR

from trunkline_worker.heads.model import Head
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.learner import Learner, Schedule
from trunkline_worker.training.mixup import Mixer
from trunkline_worker.training.objective import Objective

# Shape suffix legend: N = rows, D = columns, M = outputs

_DEFAULT_STEPS = 1500
_MIN_EPOCHS, _MAX_EPOCHS = 20, 200
_MAX_BATCH = 256

_MIN_BATCH = 16

_PORTION_CELLS = 2**24
"""Numbers that go through a head at once; of maps also where it learns, unless the spec says how many rows."""


def schedule(spec: JobSpec, head: Head, num_rows: int, l2: float) -> Schedule:
    """Fill in what the spec leaves to us (0): some 1500 steps of a sixteenth of the rows, 16 to 256 at a time."""
    most = _MAX_BATCH
    if spec.head.kind == CONV:
        most = min(most, max(_MIN_BATCH, _portion(head)))
    batch_size = spec.batch_size or min(most, max(_MIN_BATCH, 2 ** math.ceil(math.log2(max(1, num_rows / 16)))))
    batch_size = min(batch_size, num_rows)
    steps_per_epoch = math.ceil(num_rows / batch_size)
    epochs = spec.epochs or min(_MAX_EPOCHS, max(_MIN_EPOCHS, _DEFAULT_STEPS // steps_per_epoch))
    rate = spec.learning_rate or (1e-3 if spec.head.kind != LINEAR else 1e-2)
    return Schedule(epochs, batch_size, rate, l2, spec.optimiser)


@dataclass(frozen=True)
class Split:
    """Raw rows and what they should give: class indices, (N,); 0 and 1, (N, M); or standardised targets, (N, M)."""

    x_ND: Tensor
    truth: Tensor


def fit_minibatches(
    head: Head,
    objective: Objective,
    training: Split,
    validation: Split | None,
    plan: Schedule,
    *,
    seed: int,
    badness: Callable[[Tensor], float] | None = None,
    stop_after: int = 0,
    check: Callable[[], None],
    on_epoch: Callable[[int, Mapping[str, float]], None],
) -> int:
    """Train a head in place.

    With a validation split the head ends as it was after the best epoch: that of the lowest validation loss, or of what
    ``badness`` says.

    Args:
        head: Its parameters are drawn anew; what standardises its columns is left alone.
        objective: What to minimise.
        training: Rows to train on.
        validation: Rows to choose the epoch by, or None for the last one.
        plan: Length, speed and portions.
        seed: Of the parameters, the order of the rows, the dropout and how rows are mixed.
        badness: Says how bad the outputs of the validation rows are. None: the loss does.
        stop_after: Epochs to run of those that are planned; 0: all.
        check: Called before each step; may raise to stop.
        on_epoch: Called after each epoch with its number, from 1, and its losses.

    Returns:
        The epoch, from 1, whose parameters the head holds.

    Raises:
        WireError: BAD_LABELS for a single row where batches are normalised; INVALID_ARGUMENT if the loss stops being
            finite.
    """
    num_rows = training.x_ND.shape[0]
    if head.config.batch_norm and num_rows < 2:
        raise WireError(
            ErrorCode.BAD_LABELS,
            "a single row is left to train on, and batch normalisation needs 2; add rows, hold fewer out, or leave "
            "batch normalisation out",
        )
    draw = torch.Generator().manual_seed(seed)
    head.reset_parameters(draw)
    head.to(training.x_ND.device)
    steps_per_epoch = math.ceil(num_rows / plan.batch_size)
    learner = Learner(
        head,
        plan,
        num_steps=plan.epochs * steps_per_epoch,
        num_rows=num_rows,
        # As the solver that runs to convergence counts it, see `softmax`.
        penalty_factor=2.0 if objective.task == CLASSIFICATION and head.output.out_features == 2 else 1.0,
    )
    mixer = Mixer(plan.optimiser.mixup, seed) if plan.optimiser.mixup else None
    best, best_epoch = math.inf, 0
    best_state: dict[str, Tensor] = {}
    last = stop_after or plan.epochs
    for epoch in range(1, last + 1):
        order_N = torch.randperm(num_rows, generator=draw).to(training.x_ND.device)
        total_loss, is_finite = 0.0, True
        head.train()
        for rows in _batches(order_N, plan.batch_size):
            check()
            x_BD, truth = head.standardise(training.x_ND[rows].float()), training.truth[rows]
            mix = None if mixer is None else mixer.draw(len(rows), x_BD.device)
            if mix is not None:
                x_BD = mix.columns(x_BD)
            with learner.precision():
                outputs = head.forward_standardised(x_BD, draw)
            outputs = outputs.float()
            loss = objective.loss(outputs, truth) if mix is None else mix.loss(objective, outputs, truth)
            is_finite &= learner.step(loss)
            total_loss += float(loss.detach()) * len(rows)
        losses = {"loss": total_loss / num_rows}
        if not is_finite or not math.isfinite(losses["loss"]):
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                f"the loss was no longer finite in epoch {epoch}; use a learning rate below {plan.learning_rate:g}",
            )
        if validation is not None:
            with learner.averaged():
                outputs = run_head(head, validation.x_ND)
                losses["validation_loss"] = float(objective.loss(outputs, validation.truth))
                if objective.task == CLASSIFICATION:
                    hits = outputs.argmax(dim=1) == validation.truth
                    losses["validation_accuracy"] = float(hits.double().mean())
                bad = losses["validation_loss"] if badness is None else badness(outputs)
                if bad < best:
                    best, best_epoch = bad, epoch
                    best_state = copy.deepcopy(head.state_dict())
        on_epoch(epoch, losses)
        if best_epoch and plan.patience and epoch - best_epoch >= plan.patience:
            break
    if best_state:
        head.load_state_dict(best_state)
        return best_epoch
    learner.keep_average()
    return last


@torch.no_grad()
def run_head(head: Head, x_ND: Tensor) -> Tensor:
    """Return logits or values of raw rows, a portion at a time, as they will be served."""
    head.eval()
    return torch.cat([head(rows.float()) for rows in x_ND.split(_portion(head))])


def _portion(head: Head) -> int:
    """Return how many rows may go through a head at once. What its convolutions put out can be wider than the map."""
    cells = head.num_features
    if head.config.kind == CONV:
        cells = max(cells, max(head.config.channels) * math.prod(head.inputs[0].map_shape[1:]))
    return max(1, _PORTION_CELLS // cells)


def _batches(order_N: Tensor, batch_size: int) -> Sequence[Tensor]:
    """Split rows into batches. A last one of a single row, which has no variance, is joined to the one before."""
    *batches, last = order_N.split(batch_size)
    if batches and len(last) == 1:
        return [*batches[:-1], torch.cat([batches[-1], last])]
    return [*batches, last]
