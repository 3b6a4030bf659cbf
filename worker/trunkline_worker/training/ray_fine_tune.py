"""Fine-tuning on Ray: each run is a TorchTrainer of its own, whose workers may come and go.

A driver, one process beside the lanes, does a fine-tuning job as a lane does any other, and starts Ray Train where the
last blocks are to be trained. The workers read the features from storage, tell the driver how far they are, and leave
what they made with it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.training.ray_train import (
    NAMESPACE,
    Driver,
    LaneConfig,
    LaneMetadata,
    make_tools,
    start_driver,
    work_through,
)
from trunkline_worker.training.ray_tune import remove_run

if TYPE_CHECKING:
    from torch import nn
    from trunkline_wire.heads import HeadConfig

    from trunkline_worker.backbones.backbone import Backbone
    from trunkline_worker.training.embed import RowMaps
    from trunkline_worker.training.tuning.work import Tell, TuningOutcome, TuningWork

logger = logging.getLogger(__name__)

MAX_FAILURES = 5
"""How often a run goes on from its last checkpoint after workers were lost."""

TELL_INTERVAL_S = 0.2
"""Workers tell how far they are, and ask whether to stop, at most this often, in seconds."""

GRACE_S = 15.0
"""How long workers have to stop by themselves, in seconds, before they are ended."""

_OUT_OF_MEMORY = (
    "a worker of the fine-tuning run ran out of memory; use smaller batches, a later cut or a smaller input size"
)

CHECKPOINT = "tuning.safetensors"
"""Name of the file in a checkpoint's folder."""


@dataclass(frozen=True)
class RunConfig:
    """What the workers of a run need to know.

    Attributes:
        name: Of the run: the same one goes on where it was.
        lane: The driver's own configuration.
        work: What is to be done.
        maps: Where its rows are.
    """

    name: str
    lane: LaneConfig
    work: TuningWork
    maps: RowMaps


@dataclass
class _Live:
    """A run in progress, as its driver sees it."""

    news: deque[tuple[float, Mapping[str, float], str]] = field(default_factory=deque)
    is_stopping: bool = False
    outcome: TuningOutcome | WireError | None = None
    is_stopped: bool = False


@ray.remote(num_cpus=0)
class TuningDriver(Driver):
    """Does fine-tuning jobs, one after another."""

    def __init__(self, config: LaneConfig) -> None:
        """Keep the configuration."""
        super().__init__(config)
        self._runs: dict[str, _Live] = {}

    def _work(self) -> None:
        # Here, so that the controller, which imports this module too, stays without torch.
        import torch

        config = self._config
        torch.set_num_threads(config.num_threads or os.cpu_count() or 1)

        def tails(job_id: str, maps: RowMaps) -> RayTailTrainer:
            return RayTailTrainer(config, job_id, maps, self._runs)

        metadata = LaneMetadata()
        work_through(config, metadata, make_tools(config, metadata, BlobStore(config.storage_url), tails=tails))

    # What workers call.

    def hear(self, run: str, done: float, metrics: Mapping[str, float], message: str) -> bool:
        """Take news of a run, and return whether its workers should stop."""
        live = self._runs.get(run)
        if live is None:
            return True  # of a driver before this one: nobody waits for it
        live.news.append((done, metrics, message))
        return live.is_stopping

    def finish(self, run: str, outcome: Any) -> None:
        """Take what came of a run, or why it failed; None: it stopped as it was told."""
        live = self._runs.get(run)
        # An error stays: the others stop for it.
        if live is not None and not isinstance(live.outcome, WireError):
            live.outcome, live.is_stopped = outcome, outcome is None


class RayTailTrainer:
    """Implements ``TailTrainer`` by a Ray Train run."""

    def __init__(self, config: LaneConfig, job_id: str, maps: RowMaps, runs: dict[str, _Live]) -> None:
        """Keep what is needed. ``runs`` is where the driver's workers leave news."""
        self._config = config
        self._job_id = job_id
        self._maps = maps
        self._runs = runs
        self._backbone: Backbone | None = None

    def make_tail(self, config: HeadConfig) -> nn.Module:
        """See ``TailTrainer``."""
        if self._backbone is None:
            self._backbone = _load(self._config, self._maps)
        return self._backbone.tail_for(config)

    def run(self, work: TuningWork, *, tell: Tell, should_stop: Callable[[], bool]) -> TuningOutcome:
        """See ``TailTrainer``."""
        from trunkline_worker.training.progress import TrainingCancelled

        started = time.monotonic()
        name = f"{self._job_id}-{work.name}"
        live = self._runs[name] = _Live()
        least, most = work.config.min_workers, work.config.max_workers
        number = f"{most}" if least == most else f"{least} to {most}"
        tell(0.0, {}, f"starting {number} worker{'' if most == 1 else 's'}")
        fitting = _fit.remote(RunConfig(name, self._config, work, self._maps))
        stop_by = float("inf")
        try:
            while True:
                ready, _ = ray.wait([fitting], timeout=TELL_INTERVAL_S)
                while live.news:
                    tell(*live.news.popleft())
                if ready:
                    break
                if (should_stop() or isinstance(live.outcome, WireError)) and not live.is_stopping:
                    live.is_stopping, stop_by = True, time.monotonic() + GRACE_S
                if time.monotonic() > stop_by:
                    break
            if not ready and not should_stop() and isinstance(live.outcome, WireError):
                raise live.outcome
            if not ready or live.is_stopped:
                raise TrainingCancelled
            if live.outcome is None:
                _raise_reason(fitting)
            assert live.outcome is not None
            if isinstance(live.outcome, WireError):
                raise live.outcome
            return replace(live.outcome, seconds=time.monotonic() - started)
        finally:
            del self._runs[name]
            with contextlib.suppress(Exception):  # it has ended, one way or another
                ray.cancel(fitting)
            remove_run(f"{_runs_path(self._config)}/{name}")


def _raise_reason(fitting: Any) -> None:
    """Say why a run ended without anything to show for it."""
    try:
        ray.get(fitting)
    except ray.exceptions.RayError as error:
        logger.warning("a fine-tuning run failed", exc_info=True)
        text = str(error)
        if "OutOfMemory" in text or "out of memory" in text:
            raise WireError(ErrorCode.WORKER_OOM, _OUT_OF_MEMORY) from error
        raise WireError(
            ErrorCode.UNAVAILABLE,
            f"the workers of the fine-tuning run were lost more than {MAX_FAILURES} times; the cluster's log says how",
        ) from error
    raise WireError(ErrorCode.INTERNAL, "a fine-tuning run ended without a result")


@ray.remote(num_cpus=0, max_retries=0)
def _fit(config: RunConfig) -> None:
    """Run Ray Train. A task of its own, which can be cancelled."""
    # Ray Train looks after its workers only this often, in seconds; read when the run starts.
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    from ray import train
    from ray.train.torch import TorchTrainer

    from trunkline_worker.training.process_group import OneAddressConfig

    wanted, lane = config.work.config, config.lane
    num_workers: Any = wanted.max_workers
    if wanted.min_workers < wanted.max_workers:
        num_workers = (wanted.min_workers, wanted.max_workers)
    resources = {"GPU": lane.tuning_gpus} if lane.use_gpu else {"CPU": lane.tuning_cpus}
    TorchTrainer(
        _worker,
        train_loop_config={"config": config},
        torch_config=OneAddressConfig(),
        scaling_config=train.ScalingConfig(
            num_workers=num_workers, use_gpu=lane.use_gpu, resources_per_worker=resources
        ),
        run_config=train.RunConfig(
            name=config.name,
            storage_path=_runs_path(lane),
            failure_config=train.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=train.CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def _worker(given: Mapping[str, Any]) -> None:
    """What every worker of a run does."""
    import torch
    from ray import train
    from ray.train.torch import get_device

    from trunkline_worker.training.progress import TrainingCancelled
    from trunkline_worker.training.tuning.learn import learn
    from trunkline_worker.training.tuning.team import Alone, Team, TorchTeam
    from trunkline_worker.training.tuning.work import TuningOutcome

    config: RunConfig = given["config"]
    lane, work = config.lane, config.work
    context = train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    device = get_device()
    torch.set_num_threads(max(1, int(lane.tuning_cpus)))
    driver = _Driver(lane.name, config.name, size)
    try:
        tools = make_tools(lane, LaneMetadata(), BlobStore(lane.storage_url))
        maps_ND = torch.from_numpy(config.maps.read(tools))
        tail = _load(lane, config.maps).tail_for(work.head_config)
        team: Team = Alone(device) if size == 1 else TorchTeam(device)
        learnt = learn(
            work,
            tail,
            maps_ND,
            team,
            _Checkpoints(rank),
            should_stop=driver.should_stop,
            on_step=lambda step, told: driver.tell(step / work.num_steps, told),
            on_resumed=lambda step: driver.tell(
                step / work.num_steps, {}, f"going on from step {step} of {work.num_steps} with {size} workers"
            ),
        )
    except TrainingCancelled:
        if rank == 0:
            driver.finish(None)
        return
    except WireError as error:
        # Told, not raised: Ray Train would begin again, and fail again.
        driver.finish(error)
        if size > 1:
            raise  # the others wait for this one
        return
    except (MemoryError, torch.OutOfMemoryError) as error:
        driver.finish(WireError(ErrorCode.WORKER_OOM, _OUT_OF_MEMORY))
        if size > 1:
            raise
        logger.warning("out of memory", exc_info=error)
        return
    if rank == 0:
        assert learnt.outputs_WK is not None
        driver.finish(
            TuningOutcome(
                learnt.tensors, learnt.outputs_WK, learnt.curves, learnt.num_trained, size, learnt.num_resumed
            )
        )


class _Driver:
    """The driver, as a worker sees it."""

    def __init__(self, name: str, run: str, size: int) -> None:
        self._actor = ray.get_actor(name, namespace=NAMESPACE)
        self._run = run
        self._size = size
        self._told_at = 0.0
        self._stop = False

    def tell(self, done: float, metrics: Mapping[str, float], message: str = "") -> None:
        """Tell how far the run is; not every step, unless there is something to say."""
        now = time.monotonic()
        if message or now - self._told_at >= TELL_INTERVAL_S:
            self._told_at = now
            told = {**metrics, "workers": float(self._size)} if metrics else {}
            self._stop = bool(ray.get(self._actor.hear.remote(self._run, done, told, message)))

    def should_stop(self) -> bool:
        """Return what the driver said last."""
        return self._stop

    def finish(self, outcome: object) -> None:
        """Leave what came of it."""
        ray.get(self._actor.finish.remote(self._run, outcome))


class _Checkpoints:
    """Keeps how far a run is where Ray Train keeps its checkpoints."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def latest(self) -> bytes | None:
        """Return what was saved last, by this group of workers or one before it."""
        from ray import train

        checkpoint = train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            return (Path(folder) / CHECKPOINT).read_bytes()

    def save(self, make: Callable[[], bytes], step: int) -> None:
        """Save; the first worker's bytes are the run's."""
        from ray import train

        try:
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = None
                if self._rank == 0:
                    (Path(folder) / CHECKPOINT).write_bytes(make())
                    checkpoint = train.Checkpoint.from_directory(folder)
                train.report({"step": step}, checkpoint=checkpoint)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise WireError(
                ErrorCode.STORAGE_FULL,
                f"no room for the checkpoint at step {step}; make some, and submit the job again",
            ) from error


def _load(lane: LaneConfig, maps: RowMaps) -> Backbone:
    """Load the backbone, and check that it is the one that the features come from."""
    from trunkline_worker.backbones.catalogue import load_backbone

    source = lane.backbones[maps.spec.name]
    backbone = load_backbone(
        maps.spec.name, weights=source.weights, allow_untrained=source.allow_untrained, manifest=source.manifest
    )
    if backbone.weights_sha256 != maps.spec.weights_sha256:
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"the weights of {maps.spec.name} on this machine are not those that the features come from; have the same "
            "on every node",
        )
    return backbone


def _runs_path(lane: LaneConfig) -> str:
    return f"{lane.storage_path}/tuning"


def start_tuning(config: LaneConfig) -> Any:
    """Start a driver, or find the one of that name. Returns a reference that becomes ready when it has ended."""
    return start_driver(TuningDriver, config, max_concurrency=32)
