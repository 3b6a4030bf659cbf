"""Fine-tuning in this process, by one worker."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from trunkline_wire.heads import HeadConfig

from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.tail import Tail
from trunkline_worker.training.tuning.checkpoint import Checkpoints, NoCheckpoints
from trunkline_worker.training.tuning.learn import learn
from trunkline_worker.training.tuning.team import Alone
from trunkline_worker.training.tuning.work import Tell, TuningOutcome, TuningWork


class LocalTailTrainer:
    """Implements ``TailTrainer`` here."""

    def __init__(
        self,
        backbone: Backbone,
        maps_ND: Callable[[str], Tensor],
        *,
        device: torch.device | str = "cpu",
        checkpoints: Checkpoints | None = None,
    ) -> None:
        """Keep what is needed.

        Args:
            backbone: The one that the maps are of.
            maps_ND: Returns the map of every row at a cut.
            device: Where to compute.
            checkpoints: Where runs keep how far they are. None: nowhere.
        """
        self._backbone = backbone
        self._maps_ND = maps_ND
        self._device = device
        self._checkpoints = checkpoints or NoCheckpoints()

    def make_tail(self, config: HeadConfig) -> Tail:
        """See ``TailTrainer``."""
        return self._backbone.tail_for(config)

    def run(self, work: TuningWork, *, tell: Tell, should_stop: Callable[[], bool]) -> TuningOutcome:
        """See ``TailTrainer``."""
        started = time.monotonic()
        learnt = learn(
            work,
            self.make_tail(work.head_config),
            self._maps_ND(work.config.cut),
            Alone(self._device),
            self._checkpoints,
            should_stop=should_stop,
            on_step=lambda step, told: tell(step / work.num_steps, told, ""),
        )
        assert learnt.outputs_WK is not None
        return TuningOutcome(
            learnt.tensors,
            learnt.outputs_WK,
            learnt.curves,
            learnt.num_trained,
            num_resumed=learnt.num_resumed,
            seconds=time.monotonic() - started,
        )
