"""The loop that trains a tail and its head: one worker, or several that see the same batches and share them.

Any number of workers takes the same steps, up to rounding: a batch is dealt out row by row, and each worker's loss
counts as much as its rows do.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import BATCH_NORM_ADAPT, FLOAT16, FLOAT32
from trunkline_wire.heads import CLASSIFICATION, REGRESSION

from trunkline_worker.backbones.tail import Tail
from trunkline_worker.heads.artefact import load_own_state, own_state
from trunkline_worker.heads.model import Head
from trunkline_worker.training.fit import make_objective, target_scale
from trunkline_worker.training.learner import speed
from trunkline_worker.training.mixup import Mixer
from trunkline_worker.training.objective import Objective
from trunkline_worker.training.progress import TrainingCancelled
from trunkline_worker.training.tuning.checkpoint import Checkpoints, Progress, progress_from_bytes, progress_to_bytes
from trunkline_worker.training.tuning.team import Team
from trunkline_worker.training.tuning.work import Floats, TuningWork

# Shape suffix legend: N = rows of the dataset, B = rows of a batch, W = rows whose outputs are wanted, D = columns of a
# map, K = outputs

_CHECKPOINTS = 20
"""How often a run saves how far it is, at most."""

_MIN_STEPS = 10
"""Steps between two checkpoints, at least."""

_PORTION = 64
"""Rows that go through a tail at once where nothing is learnt."""

_HEAD, _ADAM, _EMA, _SCALER = "head.", "adam.", "ema.", "scaler."
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")

OnStep = Callable[[int, Mapping[str, float]], None]
"""Takes the number of a step, from 1, and what was measured."""


@dataclass(frozen=True)
class Learnt:
    """What the loop made.

    Attributes:
        tensors: The head's own, on the CPU.
        outputs_WK: Its outputs for the rows wanted, which the first worker alone works out.
        curves: By epoch.
        num_trained: Numbers that were trained.
        num_resumed: How often the run went on from a checkpoint.
    """

    tensors: dict[str, Tensor]
    outputs_WK: Floats | None
    curves: dict[str, list[float]]
    num_trained: int
    num_resumed: int


def learn(
    work: TuningWork,
    tail: Tail,
    maps_ND: Tensor,
    team: Team,
    checkpoints: Checkpoints,
    *,
    should_stop: Callable[[], bool],
    on_step: OnStep,
    on_resumed: Callable[[int], None] | None = None,
) -> Learnt:
    """Train a tail and its head, going on from the latest checkpoint if there is one.

    Args:
        work: What to do.
        tail: The blocks as they are in the backbone; trained in place.
        maps_ND: The map of every row of the dataset.
        team: The workers.
        checkpoints: Where it keeps how far it is.
        should_stop: Asked by the first worker before each step.
        on_step: Told by the first worker after each step.
        on_resumed: Told by it which step a run that was interrupted goes on from.

    Raises:
        WireError: INVALID_ARGUMENT if the loss stops being finite; STORAGE_FULL at a checkpoint; CORRUPT_DATA for one
            that is damaged.
        TrainingCancelled: Once ``should_stop`` said so, in every worker.
    """
    run = _Run(work, tail, maps_ND, team)
    saved = checkpoints.latest()
    if saved is not None:
        run.restore(progress_from_bytes(saved))
        if team.rank == 0 and on_resumed is not None:
            on_resumed(run.step)
    every = max(_MIN_STEPS, work.num_steps // _CHECKPOINTS)
    while run.step < work.num_steps:
        stop = team.rank == 0 and should_stop()
        told = run.take_step(stop=stop)
        if team.rank == 0:
            on_step(run.step, told)
        if run.step % every == 0 and run.step < work.num_steps:
            checkpoints.save(run.saved, run.step)
    return run.finish()


class _Run:
    """A run's state, and a step of it."""

    def __init__(self, work: TuningWork, tail: Tail, maps_ND: Tensor, team: Team) -> None:
        config = work.config
        self._work, self._maps_ND, self._team = work, maps_ND, team
        tail.draw(torch.Generator().manual_seed(work.spec.seed % 2**63))
        self._tail = tail
        self._head = work.make_head(tail).to(team.device)
        truth = torch.from_numpy(work.truth)
        self._scale: tuple[Tensor, Tensor] | None = None
        if work.task == REGRESSION:
            # Standardised, so that one learning rate fits every unit; the output layer takes it back.
            mean_M, scale_M = target_scale(truth[torch.from_numpy(work.training_index)])
            self._scale = mean_M, scale_M
            truth = ((truth.double() - mean_M) / scale_M).float()
            _rescale(self._head, 1.0 / scale_M, -mean_M / scale_M)
        self._truth = truth
        self._training_N = torch.from_numpy(work.training_index)
        self._objective = make_objective(
            work.spec, work.task, self._head.output.out_features, torch.from_numpy(work.truth)[self._training_N]
        )
        self._module = team.wrap(self._head, share_buffers=config.batch_norm == BATCH_NORM_ADAPT)
        self._optimiser = torch.optim.AdamW(_groups(self._head, tail, work), lr=config.learning_rate)
        precision = work.spec.optimiser.precision
        self._autocast = None if precision == FLOAT32 else getattr(torch, precision)
        self._scaler = torch.amp.GradScaler(team.device.type, enabled=precision == FLOAT16)
        self._average: AveragedModel | None = None
        if work.spec.optimiser.ema:
            average = get_ema_multi_avg_fn(work.spec.optimiser.ema)
            self._average = AveragedModel(self._head, multi_avg_fn=average, use_buffers=True)
        self._curves: dict[str, list[float]] = {}
        self._epoch_loss = 0.0
        self._order_N = self._training_N[:0]
        self._order_of = -1
        self._num_resumed = 0
        self.step = 0

    def take_step(self, *, stop: bool) -> dict[str, float]:
        """Learn from the next batch, and return what was measured."""
        work, team, config = self._work, self._team, self._work.config
        epoch, place = divmod(self.step, work.steps_per_epoch)
        batch_B = self._order(epoch)[place * config.batch_size : (place + 1) * config.batch_size]
        parts = self._parts(batch_B)
        self._module.train()
        self._tail.adapt_norms(adapt=config.batch_norm == BATCH_NORM_ADAPT)
        x_BD = self._mixed_maps(parts)
        with self._precision():
            outputs_BK = self._module(x_BD)
        loss = self._part_of_loss(outputs_BK.float(), parts, batch_B)
        summed = team.total(torch.stack([loss.detach().double(), loss.new_tensor(float(stop)).double()]))
        batch_loss, any_stop = summed.tolist()
        if any_stop:
            raise TrainingCancelled
        pace = speed(self.step, work.num_steps, work.spec.optimiser.warmup)
        for group in self._optimiser.param_groups:
            group["lr"] = group["highest"] * pace
        self._optimiser.zero_grad(set_to_none=True)
        # Averaged over the workers, whose losses are parts of the batch's.
        self._scaler.scale(loss * team.size).backward()
        if work.spec.optimiser.clip_norm:
            self._scaler.unscale_(self._optimiser)
            trained = [one for one in self._head.parameters() if one.requires_grad]
            nn.utils.clip_grad_norm_(trained, work.spec.optimiser.clip_norm)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        if self._average is not None:
            self._average.update_parameters(self._head)
        self.step += 1
        if not math.isfinite(batch_loss):
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                f"the loss was no longer finite in step {self.step} of fine-tuning; use a learning rate below "
                f"{config.learning_rate:g}",
            )
        self._epoch_loss += batch_loss * len(batch_B)
        told = {"step": float(self.step), "loss": batch_loss, "epoch": float(epoch + 1)}
        if place + 1 == work.steps_per_epoch:
            self._curves.setdefault("tune_loss", []).append(self._epoch_loss / len(self._training_N))
            self._epoch_loss = 0.0
        return told

    def saved(self) -> bytes:
        """Return how far the run is."""
        tensors = {f"{_HEAD}{name}": one for name, one in own_state(self._head).items()}
        for number, parameter in enumerate(self._parameters()):
            state = self._optimiser.state[parameter]
            tensors.update({f"{_ADAM}{number}.{name}": state[name] for name in _MOMENTS})
        if self._average is not None:
            tensors |= {f"{_EMA}{name}": one for name, one in own_state(_averaged(self._average)).items()}
            tensors[f"{_EMA}n_averaged"] = self._average.n_averaged
        if self._scaler.is_enabled():
            state = self._scaler.state_dict()
            tensors |= {f"{_SCALER}{name}": torch.tensor(float(one)) for name, one in state.items()}
        return progress_to_bytes(Progress(self.step, tensors, self._curves, self._epoch_loss, self._num_resumed))

    def restore(self, progress: Progress) -> None:
        """Go on from there."""
        other = WireError(ErrorCode.CORRUPT_DATA, "a checkpoint of the fine-tuning run is of another model")
        load_own_state(self._head, _under(progress.tensors, _HEAD), other)
        for number, parameter in enumerate(self._parameters()):
            moments = _under(progress.tensors, f"{_ADAM}{number}.")
            # The count of steps stays on the CPU, as torch has it.
            self._optimiser.state[parameter] = {
                name: one if name == "step" else one.to(parameter.device) for name, one in moments.items()
            }
        if self._average is not None:
            tensors = _under(progress.tensors, _EMA)
            self._average.n_averaged.copy_(tensors.pop("n_averaged"))
            load_own_state(_averaged(self._average), tensors, other)
        if self._scaler.is_enabled():
            scaler = _under(progress.tensors, _SCALER)
            kinds = self._scaler.state_dict()
            self._scaler.load_state_dict({name: type(kinds[name])(float(one)) for name, one in scaler.items()})
        self._curves = {name: list(values) for name, values in progress.curves.items()}
        self._epoch_loss, self.step = progress.open_epoch, progress.step
        self._num_resumed = progress.num_resumed + 1

    @torch.no_grad()
    def finish(self) -> Learnt:
        """Return what came of it."""
        head = self._head if self._average is None else _averaged(self._average)
        if self._scale is not None:
            mean_M, scale_M = self._scale
            _rescale(head, scale_M, mean_M)
        head.eval()
        outputs: Floats | None = None
        if self._team.rank == 0:
            index_W = torch.from_numpy(self._work.wanted_index)
            parts = [
                head(self._maps_ND[rows].to(self._team.device, torch.float32)).cpu() for rows in index_W.split(_PORTION)
            ]
            outputs = torch.cat([head.output.bias.new_zeros((0, head.output.out_features)).cpu(), *parts]).numpy()
        tensors = {name: one.detach().cpu().clone() for name, one in own_state(head).items()}
        num_trained = sum(one.numel() for one in self._parameters())
        return Learnt(tensors, outputs, self._curves, num_trained, self._num_resumed)

    def _order(self, epoch: int) -> Tensor:
        """Return the rows in the order of an epoch. It follows from seed and epoch, so that a run can be resumed."""
        if self._order_of != epoch:
            generator = torch.Generator().manual_seed((self._work.spec.seed * 1_000_003 + epoch) % 2**63)
            shuffled_N = torch.randperm(len(self._training_N), generator=generator)
            self._order_N, self._order_of = self._training_N[shuffled_N], epoch
        return self._order_N

    def _parts(self, batch_B: Tensor) -> list[tuple[float, Tensor]]:
        """Return this worker's rows of a batch, and those that they are mixed with, each with their share.

        Who is mixed with whom follows from seed and step: it is the same for any number of workers, and in a run that
        is resumed. All workers have the map of every row, so the other one may be anybody's.
        """
        place_B = torch.arange(len(batch_B))[self._team.rank :: self._team.size]
        if len(place_B) == 0:
            place_B = torch.zeros(1, dtype=torch.int64)  # a row that does not count: all workers must take part
        alpha = self._work.spec.optimiser.mixup
        if not alpha:
            return [(1.0, batch_B[place_B])]
        mix = Mixer(alpha, self._work.spec.seed, self.step).draw(len(batch_B), torch.device("cpu"))
        return [(mix.share, batch_B[place_B]), (1.0 - mix.share, batch_B[mix.partner_B[place_B]])]

    def _mixed_maps(self, parts: Sequence[tuple[float, Tensor]]) -> Tensor:
        (share, rows), *others = parts
        x_BD = self._maps_ND[rows].to(self._team.device, torch.float32)
        for other_share, other_rows in others:
            x_BD = share * x_BD + other_share * self._maps_ND[other_rows].to(self._team.device, torch.float32)
        return x_BD

    def _part_of_loss(self, outputs_BK: Tensor, parts: Sequence[tuple[float, Tensor]], batch_B: Tensor) -> Tensor:
        """Return what this worker's rows are of the batch's loss: by each label, as much as its share and weight."""
        counts = 1.0 if self._team.rank < len(batch_B) else 0.0
        whole = _weight(self._objective, self._truth[batch_B])
        loss = outputs_BK.new_zeros(())
        for share, rows in parts:
            part = counts * share * _weight(self._objective, self._truth[rows]) / whole
            loss = loss + part * self._objective.loss(outputs_BK, self._truth[rows].to(self._team.device))
        return loss

    def _parameters(self) -> list[Tensor]:
        return [one for group in self._optimiser.param_groups for one in group["params"]]

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._team.device.type, dtype=self._autocast)


def _groups(head: Head, tail: Tail, work: TuningWork) -> list[dict[str, object]]:
    """Return the trained parameters by depth: the further from the output, the slower. Biases do not decay.

    Source: Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification": discriminative rates.
    """
    config = work.config
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            depth = tail.depths.get(name.removeprefix("tail."), 0) if name.startswith("tail.") else 0
            groups.setdefault((depth, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "highest": config.learning_rate * config.layer_decay**depth,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (depth, decays), parameters in sorted(groups.items(), key=lambda one: one[0])
    ]


def _weight(objective: Objective, truth: Tensor) -> float:
    """Return how much rows count in a mean over them."""
    if objective.task == CLASSIFICATION and objective.weights_K is not None:
        return float(objective.weights_K[truth].sum().clamp(min=torch.finfo(torch.float64).tiny))
    return float(len(truth))


def _rescale(head: Head, factor_M: Tensor, shift_M: Tensor) -> None:
    """Have the head's outputs multiplied and then shifted."""
    with torch.no_grad():
        layer = head.output
        layer.weight.mul_(factor_M[:, None].to(layer.weight))
        layer.bias.copy_(layer.bias * factor_M.to(layer.bias) + shift_M.to(layer.bias))


def _averaged(average: AveragedModel) -> Head:
    head = average.module
    assert isinstance(head, Head)
    return head


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
