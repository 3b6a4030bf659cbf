"""One step of learning after another: AdamW, its learning rate, its clipping, its precision, its average."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from trunkline_wire.fits import FLOAT16, FLOAT32, OptimiserConfig
from trunkline_wire.heads import LINEAR

from trunkline_worker.heads.model import Head


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and in what portions.

    Attributes:
        epochs: Passes over the rows.
        batch_size: Rows per step.
        learning_rate: At its highest; it rises to it, and falls to 0 along half a cosine.
        l2: For heads with layers of their own AdamW's weight decay. For linear ones the penalty on the sum of the rows'
            losses, as for the solvers that run to convergence: theirs is a convex problem, and it is part of it.
        optimiser: The rest.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    l2: float
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)

    @property
    def patience(self) -> int:
        """Epochs without a better one after which training ends; 0: none."""
        return self.optimiser.patience


class Learner:
    """Takes the steps. Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"."""

    def __init__(
        self, head: Head, plan: Schedule, *, num_steps: int, num_rows: int, penalty_factor: float = 1.0
    ) -> None:
        """Prepare to take some steps.

        Args:
            head: Learns in place.
            plan: How.
            num_steps: In all that are planned.
            num_rows: That are trained on.
            penalty_factor: What a linear head's penalty is multiplied by.
        """
        self._head = head
        self._plan = plan
        self._num_steps = num_steps
        self._step = 0
        config = plan.optimiser
        penalised = {id(one) for one in head.penalised}
        self._penalty, decay = 0.0, plan.l2
        if head.config.kind == LINEAR:
            self._penalty, decay = 0.5 * plan.l2 * penalty_factor / num_rows, 0.0
        groups = [
            {"params": [one for one in head.parameters() if id(one) in penalised], "weight_decay": decay},
            {"params": [one for one in head.parameters() if id(one) not in penalised], "weight_decay": 0.0},
        ]
        self._optimiser = torch.optim.AdamW([one for one in groups if one["params"]], lr=plan.learning_rate)
        self._device = next(head.parameters()).device.type
        self._scaler = torch.amp.GradScaler(self._device, enabled=config.precision == FLOAT16)
        self._average: AveragedModel | None = None
        if config.ema:
            self._average = AveragedModel(head, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Multiply in the precision that was asked for."""
        name = self._plan.optimiser.precision
        if name == FLOAT32:
            yield
            return
        with torch.autocast(self._device, dtype=getattr(torch, name)):
            yield

    def step(self, loss: Tensor) -> bool:
        """Take one. Returns whether the gradient was finite; in float16 one that is not is passed over."""
        is_finite = True
        for group in self._optimiser.param_groups:
            group["lr"] = self._plan.learning_rate * speed(self._step, self._num_steps, self._plan.optimiser.warmup)
        if self._penalty:
            squares = (one.square().sum() for one in self._head.penalised)
            loss = loss + self._penalty * sum(squares, start=loss.new_zeros(()))
        self._optimiser.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        if self._plan.optimiser.clip_norm:
            self._scaler.unscale_(self._optimiser)
            norm = nn.utils.clip_grad_norm_(self._head.parameters(), self._plan.optimiser.clip_norm)
            is_finite = bool(norm.isfinite()) or self._scaler.is_enabled()
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._step += 1
        if self._average is not None:
            self._average.update_parameters(self._head)
        return is_finite

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the head hold the average of its weights meanwhile, where one is kept."""
        if self._average is None:
            yield
            return
        own = {name: one.detach().clone() for name, one in self._head.state_dict().items()}
        self.keep_average()
        try:
            yield
        finally:
            self._head.load_state_dict(own)

    def keep_average(self) -> None:
        """Have the head hold the average of its weights from now on, where one is kept."""
        if self._average is not None:
            self._head.load_state_dict(self._average.module.state_dict())


def speed(step: int, num_steps: int, warmup: float) -> float:
    """Return the share of the learning rate that a step has: up along a line, down along half a cosine."""
    warm = warmup * num_steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1.0, num_steps - warm)))
