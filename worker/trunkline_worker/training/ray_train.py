"""Lanes: a resident, one-worker Ray Train run that leases jobs, one after another, with torch loaded and warm.

A run of its own for every job would pay Ray Train's start of several seconds each time. One worker per lane, because a
dead rank tears down its whole worker group and every job in it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import BackboneSpec, CutCost, FeatureSpace

from trunkline_worker.engine.api import Extraction, Payload
from trunkline_worker.store.blobs import BlobStore, CachedBlobs
from trunkline_worker.store.clock import SystemClock
from trunkline_worker.store.failpoints import Failpoints
from trunkline_worker.store.ids import random_id
from trunkline_worker.store.records import HEAD_JOB, Lease

if TYPE_CHECKING:
    from trunkline_worker.training.tools import JobTools

logger = logging.getLogger(__name__)

NAMESPACE = "trunkline"
"""Ray namespace of all named actors."""

CONTROLLER = "trunkline-controller"
"""Name of the controller actor."""

FAILPOINTS_VARIABLE = "TRUNKLINE_FAILPOINTS"
"""Names the failpoints that are switched on. For tests."""

PATIENCE_S = 300.0
"""How long a lane waits for a controller or a backbone that is away, in seconds."""

LEASE_WAIT_S = 10.0
"""How long one question for a job waits, in seconds."""

CACHE_BYTES = 512 * 2**20
"""How much of what it read a lane keeps in memory, in bytes: the next job is often on the same rows."""

_RETRY_S = 0.2


@dataclass(frozen=True)
class BackboneSource:
    """Where the weights of a backbone are, as for ``load_backbone``."""

    weights: str | None = None
    allow_untrained: bool = False
    manifest: str | None = None


@dataclass(frozen=True)
class LaneConfig:
    """What a lane needs to know.

    ``backbone_apps`` is backbone name to Serve application, ``kind`` which jobs it does. What follows is for those that
    fine-tune: where backbones are, and what each worker of a run reserves.
    """

    name: str
    storage_url: str
    storage_path: str
    backbone_apps: Mapping[str, str]
    versions: Mapping[str, str]
    num_threads: int
    lease_s: float
    idle_s: float
    use_gpu: bool
    kind: str = HEAD_JOB
    backbones: Mapping[str, BackboneSource] = field(default_factory=dict)
    tuning_cpus: float = 1.0
    tuning_gpus: float = 0.0


class LaneMetadata:
    """Calls the controller, waiting while it restarts. Every call is safe to repeat: fences and keys see to it."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        """Keep how long to wait for a controller that is away, in seconds."""
        self._patience_s = patience_s
        self._controller: Any = None

    def __call__(self, name: str, *args: Any) -> Any:
        """Call ``area.method``.

        Raises:
            WireError: As the method does; UNAVAILABLE where the controller stays away.
        """
        return self._call("call", name, *args)

    def join(self, lane: str, incarnation: str) -> None:
        """Say that the lane has a new worker: jobs and calls of an earlier one are void."""
        self._call("join", lane, incarnation)

    def lease(self, lane: str, incarnation: str, wait_s: float) -> Lease | None:
        """Wait for a job up to ``wait_s`` seconds and lease it."""
        return self._call("lease", lane, incarnation, wait_s)

    def _call(self, method: str, *args: Any) -> Any:
        give_up = time.monotonic() + self._patience_s
        while True:
            try:
                if self._controller is None:
                    self._controller = ray.get_actor(CONTROLLER, namespace=NAMESPACE)
                answer = ray.get(getattr(self._controller, method).remote(*args))
                break
            except (ray.exceptions.RayActorError, ValueError) as error:  # ValueError: no actor of that name
                self._controller = None
                if time.monotonic() > give_up:
                    raise WireError(ErrorCode.UNAVAILABLE, "the controller is away") from error
                time.sleep(_RETRY_S)
        if isinstance(answer, WireError):
            raise answer
        return answer


class HandleTrunk:
    """The backbones behind Serve handles, a few batches in flight."""

    IN_FLIGHT = 3

    def __init__(self, apps: Mapping[str, str], patience_s: float = PATIENCE_S) -> None:
        """Keep backbone name to Serve application, and how long to wait for one that is away, in seconds."""
        self._apps = apps
        self._patience_s = patience_s
        self._handles: dict[str, Any] = {}

    def describe(self, backbone: str, input_size: int) -> BackboneSpec:
        """Describe the backbone at an input size."""
        return self._finish(lambda: self._handle(backbone).describe.remote(input_size), None)

    def cut_cost(self, backbone: str, cut: str, input_size: int) -> CutCost:
        """Say what codecs and stems cost at a cut. Takes seconds where nobody has asked before."""
        return self._finish(lambda: self._handle(backbone).cut_cost.remote(cut, input_size), None)

    def extract(
        self, batches: Iterator[tuple[FeatureSpace, Payload]], slices: Sequence[str] = ()
    ) -> Iterator[Extraction]:
        """Return slices of the embedding of each batch, in order. A batch whose replica died is sent again."""
        waiting: deque[tuple[Any, Any]] = deque()
        wanted = tuple(slices)
        for space, rows in batches:

            def send(space: FeatureSpace = space, rows: Payload = rows) -> Any:
                return self._handle(space.backbone).extract.remote(space, rows, wanted, self._patience_s)

            waiting.append((send, send()))
            if len(waiting) >= self.IN_FLIGHT:
                yield self._finish(*waiting.popleft())
        while waiting:
            yield self._finish(*waiting.popleft())

    def _handle(self, backbone: str) -> Any:
        if backbone not in self._handles:
            app = self._apps.get(backbone)
            if app is None:
                raise WireError(ErrorCode.NOT_FOUND, f"no backbone {backbone!r} is served any more")
            # Finding it asks Serve's controller; it stays right when replicas change.
            self._handles[backbone] = serve.get_app_handle(app)
        return self._handles[backbone]

    def _finish(self, send: Any, response: Any) -> Any:
        give_up = time.monotonic() + self._patience_s
        while True:
            try:
                response = response or send()
                answer = response.result(timeout_s=self._patience_s)
            except (ray.exceptions.RayError, serve.exceptions.RayServeException, TimeoutError) as error:
                if time.monotonic() > give_up:
                    raise WireError(ErrorCode.UNAVAILABLE, "the backbone is away") from error
                logger.warning("backbone call failed, trying again: %s", error)
                response = None
                time.sleep(_RETRY_S)
                continue
            if isinstance(answer, WireError):
                if answer.code is ErrorCode.OVERLOADED and time.monotonic() < give_up:
                    response = None
                    time.sleep(max(_RETRY_S, answer.retry_delay_s))
                    continue
                raise answer
            return answer


def lane_loop(config: Mapping[str, Any]) -> None:
    """The train loop of a lane's only worker: lease a job, do it, again. Ends after ``idle_s`` without work."""
    # Here, so that the controller and the gateways, which import this module too, stay without torch.
    import torch

    from trunkline_worker.training.ray_tune import TuneTrials

    lane = LaneConfig(**config)

    torch.set_num_threads(lane.num_threads or os.cpu_count() or 1)
    _warm_up()
    blobs = CachedBlobs(lane.storage_url, capacity_bytes=CACHE_BYTES)
    metadata = LaneMetadata()
    tools = make_tools(lane, metadata, blobs, run_trials=TuneTrials(f"{lane.storage_path}/trials"))
    work_through(lane, metadata, tools)


def make_tools(lane: LaneConfig, metadata: LaneMetadata, blobs: BlobStore, **more: Any) -> JobTools:
    """Return what jobs work with on this cluster. ``more``: what only some of them need."""
    from trunkline_worker.training.tools import JobTools

    return JobTools(
        metadata=metadata,
        blobs=blobs,
        trunk=HandleTrunk(lane.backbone_apps),
        clock=SystemClock(),
        versions=lane.versions,
        lease_s=lane.lease_s,
        failpoints=Failpoints.from_text(os.environ.get(FAILPOINTS_VARIABLE, "")),
        **more,
    )


def work_through(lane: LaneConfig, metadata: LaneMetadata, tools: JobTools) -> None:
    """Lease a job, do it, again. Ends after ``idle_s`` without work."""
    from trunkline_worker.training.job import run_job

    # What an earlier worker of this lane held when it died is taken back at once, not when its lease runs out.
    incarnation = random_id()
    metadata.join(lane.name, incarnation)
    logger.info("lane %s is ready", lane.name)
    idle_since = time.monotonic()
    while True:
        lease = metadata.lease(lane.name, incarnation, LEASE_WAIT_S)
        if lease is not None:
            run_job(lease, tools)
            idle_since = time.monotonic()
        elif lane.idle_s and time.monotonic() - idle_since > lane.idle_s:
            logger.info("lane %s had nothing to do for %.0f s and ends", lane.name, lane.idle_s)
            return


def _warm_up() -> None:
    """Train on a few made-up rows: the first job would otherwise pay for torch's lazy imports."""
    import numpy as np
    from trunkline_wire.specs import SliceSpec

    from trunkline_worker.store.records import JobSpec
    from trunkline_worker.training.loop import Labels, Source, train_head

    rows = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    indices = np.arange(20) % 2
    rows[indices == 1] += 1.0
    train_head(
        [Source("", rows, (SliceSpec("a", 0, 4), SliceSpec("pooled", 4, 8)))],
        Labels(("a", "b"), indices, None),
        JobSpec(model="warm-up", dataset="warm-up", backbone="", input_size=0),
        on_event=lambda event: None,
        should_stop=lambda: False,
    )


class Driver:
    """Works for as long as there is work, once. An actor that is named and detached outlives whoever started it."""

    def __init__(self, config: LaneConfig) -> None:
        """Keep the configuration."""
        self._config = config
        self._first = threading.Lock()
        self._ended = threading.Event()

    def run(self) -> None:
        """Work until there has been nothing to do for long enough.

        A second call, by a controller that was restarted, waits for the same end.
        """
        if not self._first.acquire(blocking=False):
            self._ended.wait()
            return
        try:
            self._work()
        finally:
            self._ended.set()

    def _work(self) -> None:
        raise NotImplementedError


@ray.remote(num_cpus=0)
class LaneDriver(Driver):
    """Holds the Ray Train run of one lane. Ray Train restarts the worker when it dies."""

    def _work(self) -> None:
        # Ray Train looks after its workers only this often, in seconds; read when the run starts.
        os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        config = self._config
        # Not TorchTrainer: its process group, of no use to one worker, listens on every interface without a password.
        trainer = DataParallelTrainer(
            lane_loop,
            train_loop_config=dict(config.__dict__),
            scaling_config=ScalingConfig(
                num_workers=1, use_gpu=config.use_gpu, resources_per_worker=None if config.use_gpu else {"CPU": 1}
            ),
            run_config=RunConfig(
                name=config.name, storage_path=config.storage_path, failure_config=FailureConfig(max_failures=-1)
            ),
        )
        trainer.fit()


def start_lane(config: LaneConfig) -> Any:
    """Start a lane, or find the one of that name. Returns a reference that becomes ready when the lane has ended."""
    return start_driver(LaneDriver, config, max_concurrency=16)


def start_driver(actor: Any, config: LaneConfig, *, max_concurrency: int) -> Any:
    """Start a ``Driver``, or find the one of that name. Returns a reference that becomes ready when it has ended."""
    driver = actor.options(
        name=config.name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_concurrency=max_concurrency,
        max_restarts=0,
    ).remote(config)
    return driver.run.remote()
