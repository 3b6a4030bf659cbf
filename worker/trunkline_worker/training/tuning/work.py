"""What is to be done in a fine-tuning run, and what comes of it: plain values, which can go to other machines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from trunkline_wire.fits import FineTuneConfig
from trunkline_wire.heads import TAIL, HeadConfig

from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.split import Indices

# Shape suffix legend: N = rows of the dataset, W = rows whose outputs are wanted, E = columns that the tail makes,
# K = outputs

Floats = npt.NDArray[np.float32]

_STEPS = 600
_MIN_EPOCHS, _MAX_EPOCHS = 10, 60
_BATCH = 32
_RATE, _LORA_RATE = 3e-4, 2e-3
_LAYER_DECAY = 0.6
_WEIGHT_DECAY = 0.02


@dataclass(frozen=True)
class StartHead:
    """A fitted linear head on the columns that the tail makes: where fine-tuning starts from."""

    mean_E: Floats
    scale_E: Floats
    weight_KE: Floats
    bias_K: Floats

    @classmethod
    def of(cls, head: Head) -> StartHead:
        """Return the numbers of a linear head."""
        layer = head.output
        return cls(*(one.detach().cpu().float().numpy() for one in (head.mean, head.scale, layer.weight, layer.bias)))


@dataclass(frozen=True)
class TuningWork:
    """A fine-tuning run.

    Attributes:
        name: Tells the runs of a job apart: each has checkpoints of its own.
        config: With every number filled in.
        spec: The job, for its loss, optimiser and seed.
        task: One of ``heads.TASKS``.
        slices: What the tail makes of the map, in order.
        head_input: What the tail reads.
        start: Where the head starts.
        truth: As ``Rows.truth``, of all rows.
        training_index: Rows to learn from.
        wanted_index: Rows whose outputs are wanted; may be empty.
    """

    name: str
    config: FineTuneConfig
    spec: JobSpec
    task: str
    slices: tuple[str, ...]
    head_input: HeadInput
    start: StartHead
    truth: npt.NDArray[np.generic]
    training_index: Indices
    wanted_index: Indices

    @property
    def head_config(self) -> HeadConfig:
        """What the head is made of."""
        return HeadConfig(TAIL, tap=self.config.cut, slices=self.slices, lora_rank=self.config.lora_rank)

    @property
    def num_steps(self) -> int:
        """Steps in all."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Steps that go once through the rows."""
        return math.ceil(len(self.training_index) / self.config.batch_size)

    def make_head(self, tail: nn.Module) -> Head:
        """Return the head as it starts: what it says is what the fitted head says on the backbone as it is."""
        head = Head(self.head_config, [self.head_input], len(self.start.bias_K), tail=tail)
        with torch.no_grad():
            head.mean.copy_(torch.from_numpy(self.start.mean_E))
            head.scale.copy_(torch.from_numpy(self.start.scale_E))
            head.output.weight.copy_(torch.from_numpy(self.start.weight_KE))
            head.output.bias.copy_(torch.from_numpy(self.start.bias_K))
        return head


@dataclass(frozen=True)
class TuningOutcome:
    """What came of a run.

    Attributes:
        tensors: The head's own, by their names in its state.
        outputs_WK: Its outputs for the rows wanted.
        curves: By epoch.
        num_trained: Numbers that were trained.
        num_workers: At the end.
        num_resumed: How often it went on from a checkpoint.
        seconds: From the first step to the last, checkpoints and restarts included.
    """

    tensors: Mapping[str, Tensor]
    outputs_WK: Floats
    curves: dict[str, list[float]] = field(default_factory=dict)
    num_trained: int = 0
    num_workers: int = 1
    num_resumed: int = 0
    seconds: float = 0.0


Tell = Callable[[float, Mapping[str, float], str], None]
"""Takes the share that is done, what was measured, and a message or nothing."""


class TailTrainer(Protocol):
    """Whoever runs fine-tuning: this process, or workers elsewhere."""

    def make_tail(self, config: HeadConfig) -> nn.Module:
        """Return the blocks as they are in the backbone, as ``Backbone.tail`` does."""

    def run(self, work: TuningWork, *, tell: Tell, should_stop: Callable[[], bool]) -> TuningOutcome:
        """Do it.

        Raises:
            WireError: As it fails.
            TrainingCancelled: Once ``should_stop`` said so.
        """


def filled_in(config: FineTuneConfig, num_rows: int) -> FineTuneConfig:
    """Fill in what a config leaves to us: some 600 steps of 32 rows, at most 60 times through all of them."""
    batch_size = min(config.batch_size or _BATCH, num_rows)
    steps = math.ceil(num_rows / batch_size)
    return replace(
        config,
        epochs=config.epochs or min(_MAX_EPOCHS, max(_MIN_EPOCHS, _STEPS // steps)),
        batch_size=batch_size,
        # What is added to weights starts at nothing, and has further to go.
        learning_rate=config.learning_rate or (_LORA_RATE if config.lora_rank else _RATE),
        layer_decay=config.layer_decay or _LAYER_DECAY,
        weight_decay=config.weight_decay or _WEIGHT_DECAY,
    )
