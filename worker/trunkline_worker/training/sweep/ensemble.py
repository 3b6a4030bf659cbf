"""Heads that learn in steps, for every configuration and fold: one ensemble whose members learn side by side.

Each member learns as ``fit_minibatches`` would have it learn alone: the same first numbers, the same rows in the same
order and the same draws of dropout, for every configuration of a fold. So configurations differ by nothing but
themselves, and their batches are gathered once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from trunkline_wire.heads import CLASSIFICATION, CONCAT, MULTI_LABEL, REGRESSION

from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head
from trunkline_worker.training.fit import target_scale
from trunkline_worker.training.learner import Schedule, speed
from trunkline_worker.training.minibatch import schedule
from trunkline_worker.training.split import WEIGHTS, random_stream
from trunkline_worker.training.sweep.plan import Configuration
from trunkline_worker.training.sweep.rows import FoldedRows, Result, by_device, portions
from trunkline_worker.training.sweep.stacked import Stack, StackedAdamW, stacked_losses
from trunkline_worker.training.weighing import class_weights, label_weights

# Shape suffix legend: F = folds, C = configurations, B = rows of a batch, T = rows of an epoch, D = columns, H = units
# of a layer, K = outputs

_BUDGET_BYTES = {"cpu": 2**26, "": 2**32}
"""Memory for members that learn side by side. A processor gains by few, whose numbers stay near it."""

_COPIES = 6
"""Tensors of the parameters' size: themselves, gradients, directions, two moments, and one in passing."""


def ensemble_outputs(
    rows: FoldedRows,
    configurations: Sequence[Configuration],
    seed: int,
    *,
    share: float = 1.0,
    check: Callable[[], None],
    tell: Callable[[float], None],
) -> Iterator[Result]:
    """Yield what each configuration says of the rows that it was not trained on, after its last epoch.

    No epoch is chosen by the held-out rows, so that they remain a fair test; the learning rate ends at 0.

    Args:
        rows: What to learn.
        configurations: Linear or with the same hidden layers; all with dropout, or all without.
        seed: Of the sweep.
        share: Of the epochs that a job would run; the learning rate ends at 0 all the same.
        check: Called before each step; may raise to stop.
        tell: Called with the fraction done.
    """
    truth, (mean_K, scale_K) = rows.truth, (torch.zeros(1), torch.ones(1))
    if rows.task == REGRESSION:
        # Standardised, so that one learning rate fits every unit.
        mean_K, scale_K = (one.to(rows.x_ND.device) for one in target_scale(truth))
        truth = ((truth.double() - mean_K) / scale_K).float()
    draws = [int(one) for one in random_stream(seed, WEIGHTS).integers(2**63, size=len(rows.folds))]
    num_folds = len(rows.folds)
    size = _member_bytes(rows, configurations[0])
    budget = by_device(_BUDGET_BYTES, rows.x_ND.device)
    folds_together = max(1, min(num_folds, budget // size))
    parts = list(portions(len(configurations), budget // (size * folds_together)))
    fold_parts = list(portions(num_folds, folds_together))
    rounds, num_rounds = 0, len(parts) * len(fold_parts)
    for part in parts:
        some = configurations[part]
        outputs: list[list[Tensor]] = [[] for _ in some]
        failures: dict[int, str] = {}
        for folds in fold_parts:

            def tell_epoch(done: float, start: int = rounds) -> None:
                tell((start + done) / num_rounds)

            ensemble = _Ensemble(rows, truth, range(num_folds)[folds], some, draws[folds], share)
            failures |= ensemble.train(check, tell_epoch)
            for index, ours in enumerate(outputs):
                if index not in failures:
                    ours += [one * scale_K.to(one) + mean_K.to(one) for one in ensemble.held_out(index)]
            rounds += 1
        for index, ours in enumerate(outputs):
            yield part.start + index, failures.get(index, ours)


class _Ensemble:
    """Some folds and configurations that learn side by side.

    Args:
        rows: What to learn.
        truth: What is learnt: with standardised targets.
        folds: Numbers of the folds.
        configurations: As for ``ensemble_outputs``.
        draws: Seed of each of the folds.
        share: Of the epochs.
    """

    def __init__(
        self,
        rows: FoldedRows,
        truth: Tensor,
        folds: Sequence[int],
        configurations: Sequence[Configuration],
        draws: Sequence[int],
        share: float,
    ) -> None:
        """Draw the first numbers."""
        self._rows, self._truth, self._folds, self._configurations = rows, truth, folds, configurations
        device = rows.x_ND.device
        self._generators = [torch.Generator().manual_seed(one) for one in draws]
        # Folds differ in size, by a row or by what groups make of them. Side by side they go in step with the smallest:
        # of the others, other rows are left out of each epoch.
        self._num_rows = min(len(one) for one in rows.folds.training)
        heads = []
        for generator in self._generators:
            head = _head(rows, configurations[0])
            head.reset_parameters(generator)
            heads.append(head)
        self._plans = [_schedule(rows, heads[0], one, self._num_rows) for one in configurations]
        self._epochs = max(1, round(share * self._plans[0].epochs))
        self._stack = Stack.of(heads, len(configurations), device)
        self._rate_C = torch.tensor([one.learning_rate for one in self._plans], device=device)
        self._keep_C = torch.tensor([1.0 - one.dropout for one in configurations], device=device)
        strength_C = torch.tensor([one.l2 for one in configurations], device=device)
        self._penalty_C: Tensor | None = None
        decay_C = strength_C
        if not configurations[0].hidden:
            # Part of the problem, as `Learner` has it.
            factor = 2.0 if rows.task == CLASSIFICATION and rows.num_outputs == 2 else 1.0
            self._penalty_C, decay_C = strength_C * (0.5 * factor / self._num_rows), torch.zeros_like(strength_C)
        self._weights = _weights(rows, folds)
        self._adam = StackedAdamW(self._stack, decay_C, self._plans[0].optimiser.clip_norm)

    def train(self, check: Callable[[], None], tell: Callable[[float], None]) -> dict[int, str]:
        """Run all epochs. Returns why configurations failed, by number."""
        plan = self._plans[0]
        steps_per_epoch = math.ceil(self._num_rows / plan.batch_size)
        total_steps = self._epochs * steps_per_epoch
        failures: dict[int, str] = {}
        step = 0
        for epoch in range(1, self._epochs + 1):
            total_FC = torch.zeros_like(self._stack.biases[0][:, :, 0])
            for rows_FB in _batches(self._epoch_order(), plan.batch_size):
                check()
                rate_C = self._rate_C * speed(step, total_steps, plan.optimiser.warmup)
                outputs_FCKB = self._stack.forward(self._rows.x_ND[rows_FB], self._masks(rows_FB.shape[1]))
                loss_FC = stacked_losses(
                    self._rows.task, self._rows.around.loss, outputs_FCKB, self._truth[rows_FB], self._weights
                )
                # A member's gradient is that of its own loss, whatever the others' are: even if they are not numbers.
                self._adam.step(loss_FC.sum() + self._penalty(), rate_C)
                total_FC += loss_FC.detach()
                step += 1
            for index, is_fine in enumerate(total_FC.isfinite().all(dim=0).tolist()):
                if not is_fine and index not in failures:
                    failures[index] = (
                        f"the loss was no longer finite in epoch {epoch}; use a learning rate below "
                        f"{self._plans[index].learning_rate:g}"
                    )
            if len(failures) == len(self._configurations):
                break
            tell(epoch / self._epochs)
        return failures

    @torch.no_grad()
    def held_out(self, configuration: int) -> list[Tensor]:
        """Return what a configuration says of the rows that each fold holds out."""
        outputs = []
        widths = sum(one.shape[2] for one in self._stack.biases) + self._rows.x_ND.shape[1]
        for position, fold in enumerate(self._folds):
            member = self._stack.member(position, configuration)
            held_BD = self._rows.x_ND[self._rows.folds.held[fold]]
            some = portions(len(held_BD), by_device(_BUDGET_BYTES, held_BD.device) // (4 * widths))
            outputs.append(torch.cat([member.forward(held_BD[None, one])[0, 0].T for one in some]))
        return outputs

    def _penalty(self) -> Tensor | float:
        """Return what linear heads pay for their weights."""
        if self._penalty_C is None:
            return 0.0
        return (self._penalty_C * self._stack.weights[0].square().sum(dim=(2, 3))).sum()

    def _epoch_order(self) -> Tensor:
        """Return the rows of each fold in the order in which it sees them, (F, T)."""
        order = []
        for fold, generator in zip(self._folds, self._generators, strict=True):
            training = self._rows.folds.training[fold]
            drawn_T = torch.randperm(len(training), generator=generator).to(training.device)
            order.append(training[drawn_T[: self._num_rows]])
        return torch.stack(order)

    def _masks(self, num_rows: int) -> list[Tensor]:
        """Draw what the hidden layers' units are multiplied by."""
        if not self._configurations[0].dropout:
            return []
        keep_C11 = self._keep_C[:, None, None]
        masks = []
        for width in self._configurations[0].hidden:
            drawn = [torch.rand((num_rows, width), generator=one).T for one in self._generators]
            drawn_F1HB = torch.stack(drawn)[:, None].to(keep_C11.device)
            masks.append((drawn_F1HB < keep_C11) / keep_C11)
        return masks


def _weights(rows: FoldedRows, folds: Sequence[int]) -> list[Tensor] | None:
    """Return how much each class counts in each fold, by the rows that it trains on. See ``stacked_losses``."""
    found: list[Sequence[Tensor]] = []
    for fold in folds:
        truth = rows.truth[rows.folds.training[fold]]
        ours: Sequence[Tensor] | None
        if rows.task == CLASSIFICATION:
            weights_K = class_weights(rows.around.loss, truth, rows.num_outputs)
            ours = None if weights_K is None else [weights_K]
        else:
            ours = label_weights(rows.around.loss, truth) if rows.task == MULTI_LABEL else None
        if ours is None:
            return None
        found.append(ours)
    return [torch.stack(some).float() for some in zip(*found, strict=True)]


def _head(rows: FoldedRows, configuration: Configuration) -> Head:
    config = replace(configuration.spec(rows.around).head, fuse=CONCAT, fuse_width=0)
    return Head(config, [HeadInput(("columns",), (rows.x_ND.shape[1],))], rows.num_outputs)


def _schedule(rows: FoldedRows, head: Head, configuration: Configuration, num_rows: int) -> Schedule:
    return schedule(configuration.spec(rows.around), head, num_rows, configuration.l2)


def _batches(order_FT: Tensor, batch_size: int) -> list[Tensor]:
    """Split rows as ``fit_minibatches`` does."""
    *batches, last_FB = order_FT.split(batch_size, dim=1)
    if batches and last_FB.shape[1] == 1:
        return [*batches[:-1], torch.cat([batches[-1], last_FB], dim=1)]
    return [*batches, last_FB]


def _member_bytes(rows: FoldedRows, configuration: Configuration) -> int:
    """Return about how much memory a member takes while it learns."""
    head = _head(rows, configuration)
    num_rows = min(len(one) for one in rows.folds.training)
    parameters = sum(one.numel() for one in head.parameters())
    units = sum(configuration.hidden) + rows.num_outputs
    return 4 * (_COPIES * parameters + 6 * units * _schedule(rows, head, configuration, num_rows).batch_size)
