"""The controller: one detached, restartable actor that owns the metadata and looks after the lanes.

Everything it knows is in the database, so it can be killed at any moment; Ray starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.serving.endpoints import Announcement, Directory, Listing
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import SystemClock
from trunkline_worker.store.database import Database
from trunkline_worker.store.failpoints import Failpoints
from trunkline_worker.store.ids import random_id
from trunkline_worker.store.metadata import MetadataStore
from trunkline_worker.store.records import HEAD_JOB, TUNING_JOB, Event, Lease
from trunkline_worker.training.ray_fine_tune import start_tuning
from trunkline_worker.training.ray_train import CONTROLLER, FAILPOINTS_VARIABLE, NAMESPACE, LaneConfig, start_lane

logger = logging.getLogger(__name__)

METHODS = frozenset(
    {
        "rows.missing",
        "rows.add_chunk",
        "rows.locate",
        "embeddings.missing",
        "embeddings.add_chunk",
        "embeddings.locate",
        "datasets.commit",
        "datasets.get",
        "datasets.list",
        "datasets.rows",
        "jobs.submit",
        "jobs.get",
        "jobs.list",
        "jobs.request_cancel",
        "jobs.renew",
        "jobs.append_events",
        "jobs.events",
        "jobs.succeed",
        "jobs.fail",
        "jobs.mark_cancelled",
        "models.get",
        "models.list",
        "bottlenecks.add",
        "bottlenecks.check",
    }
)
"""What may be called by name."""

_READS_JOBS = {"jobs.get", "jobs.list", "jobs.events"}
_CHANGES_JOBS = frozenset(name for name in METHODS if name.startswith("jobs.")) - _READS_JOBS

EXPIRE_INTERVAL_S = 1.0
"""How often leases are looked through, in seconds."""

LANE_INTERVAL_S = 1.0
"""How often lanes are looked after, in seconds."""

SWEEP_INTERVAL_S = 3600.0
"""How often files that a dead process left half written are removed, in seconds."""

REPLACE_S = 60.0
"""How long the name of an ended controller may take to become free, in seconds."""

EVENTS_AT_A_TIME = 256


@dataclass(frozen=True)
class ControllerConfig:
    """What a controller needs to know. ``lanes`` are kept running; with an idle time, only while there is work."""

    database_url: str
    storage_url: str
    lanes: tuple[LaneConfig, ...]
    lease_s: float


class Controller:
    """The methods of the actor. Errors are returned, not raised: Ray would wrap them."""

    def __init__(self, config: ControllerConfig) -> None:
        """Open the database and start looking after leases and lanes."""
        self._config = config
        self._store = MetadataStore(
            Database(config.database_url),
            clock=SystemClock(),
            new_id=random_id,
            failpoints=Failpoints.from_text(os.environ.get(FAILPOINTS_VARIABLE, "")),
        )
        # One thread: SQLite has one writer anyway, and statements never interleave.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="metadata")
        self._directory = Directory(clock=SystemClock())
        self._changed = asyncio.Condition()
        self._lane_refs: dict[str, Any] = {}
        self._incarnations: dict[str, str] = {}
        self._lane_retry_at: dict[str, float] = defaultdict(float)
        self._tasks = [
            asyncio.ensure_future(self._forever(self._expire, EXPIRE_INTERVAL_S)),
            asyncio.ensure_future(self._forever(self._keep_lanes, LANE_INTERVAL_S)),
            asyncio.ensure_future(self._forever(self._sweep, SWEEP_INTERVAL_S)),
        ]

    async def call(self, name: str, *args: Any) -> Any:
        """Call a method of the metadata store by name."""
        try:
            if name not in METHODS:
                raise WireError(ErrorCode.INTERNAL, f"{name} is not a method of the metadata store")
            answer = await self._in_thread(name, *args)
            if name in _CHANGES_JOBS:
                await self._notify()
            return answer
        except WireError as error:
            return error

    async def join(self, lane: str, incarnation: str) -> WireError | None:
        """Take back what an earlier worker of the lane held, and ignore what it may still ask for."""
        self._incarnations[lane] = incarnation
        try:
            for job_id in await self._in_thread("jobs.release_lane", lane):
                logger.warning("job %s was taken back: its lane %s has a new worker", job_id, lane)
        except WireError as error:
            return error
        await self._notify()
        return None

    async def lease(self, lane: str, incarnation: str, wait_s: float) -> Lease | WireError | None:
        """Lease the next job of its kind to a lane, waiting for one up to a time."""
        kind = next((one.kind for one in self._config.lanes if one.name == lane), HEAD_JOB)

        async def look() -> Lease | None:
            # The question may outlive the worker that asked it: a lease given then would only run out.
            if self._incarnations.setdefault(lane, incarnation) != incarnation:
                return None
            lease: Lease | None = await self._in_thread("jobs.lease", lane, self._config.lease_s, kind)
            return lease

        try:
            return await self._wait_for(look, wait_s)
        except WireError as error:
            return error

    async def wait_for_events(self, tenant: str, job_id: str, after_seq: int, wait_s: float) -> list[Event] | WireError:
        """Return a job's events after a sequence number, waiting for one up to a time."""
        try:
            found = await self._wait_for(
                lambda: self._in_thread("jobs.events", tenant, job_id, after_seq, EVENTS_AT_A_TIME), wait_s
            )
            return found or []
        except WireError as error:
            return error

    async def announce(self, announcement: Announcement) -> bytes:
        """See ``Directory.announce``."""
        return self._directory.announce(announcement)

    async def withdraw(self, replica: str) -> None:
        """See ``Directory.withdraw``."""
        self._directory.withdraw(replica)

    async def endpoints(self, backbone: str) -> Listing:
        """See ``Directory.list``."""
        return self._directory.list(backbone)

    async def config(self) -> ControllerConfig:
        """Return what the controller was started with, once the database is open."""
        return self._config

    async def _in_thread(self, name: str, *args: Any) -> Any:
        area, _, method = name.partition(".")
        function = getattr(getattr(self._store, area), method)
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    async def _wait_for(self, look: Callable[[], Awaitable[Any]], wait_s: float) -> Any:
        """Look again after every change to a job, until something is found or the time is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        async with self._changed:
            while True:
                # The condition is held while looking, so that no change falls between the look and the wait.
                found = await look()
                remaining = deadline - loop.time()
                if found or remaining <= 0:
                    return found
                try:
                    await asyncio.wait_for(self._changed.wait(), remaining)
                except TimeoutError:
                    return await look()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _forever(self, step: Callable[[], Awaitable[None]], interval_s: float) -> None:
        while True:
            try:
                await step()
            except Exception:
                logger.exception("the controller goes on after an error")
            await asyncio.sleep(interval_s)

    async def _expire(self) -> None:
        for job_id in await self._in_thread("jobs.expire"):
            logger.warning("job %s was taken back from a lane that gave no sign of life", job_id)
            await self._notify()

    async def _sweep(self) -> None:
        blobs = BlobStore(self._config.storage_url)
        removed = await asyncio.to_thread(blobs.sweep, now=SystemClock().now(), older_than_s=SWEEP_INTERVAL_S)
        if removed:
            logger.info("%d files that were never finished have been removed", removed)

    async def _keep_lanes(self) -> None:
        """Start lanes that are not running. One with an idle time is started only for a job that waits."""
        for lane in self._config.lanes:
            ref = self._lane_refs.get(lane.name)
            if ref is not None:
                ready, _ = ray.wait([ref], timeout=0)
                if not ready:
                    continue
                del self._lane_refs[lane.name]
                await self._end_lane(lane.name, ref)
            if lane.idle_s and not await self._in_thread("jobs.has_queued", lane.kind):
                continue
            now = asyncio.get_running_loop().time()
            if now < self._lane_retry_at[lane.name]:
                continue
            self._lane_retry_at[lane.name] = now + 5.0
            start = start_tuning if lane.kind == TUNING_JOB else start_lane
            self._lane_refs[lane.name] = start(lane)

    async def _end_lane(self, name: str, ref: Any) -> None:
        try:
            await ref
        except ray.exceptions.RayError as error:
            logger.warning("lane %s ended: %s", name, error)
        try:
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
        except ValueError:
            return  # it is gone


def start_controller(config: ControllerConfig) -> Any:
    """Start the controller, or find the one that runs, whatever its configuration. Returns its handle."""
    actor = ray.remote(Controller)
    return actor.options(
        name=CONTROLLER,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=1000,
    ).remote(config)


def replace_controller(config: ControllerConfig) -> Any:
    """Start the controller with this configuration; one that runs with another is ended first, and its lanes.

    Nothing is lost: what it knows is in the database, and jobs in progress are taken back by the new lanes.
    """
    handle = start_controller(config)
    running: ControllerConfig = ray.get(handle.config.remote())
    if running == config:
        return handle
    logger.info("the controller is replaced: its settings have changed")
    ray.kill(handle)
    for lane in running.lanes:
        with contextlib.suppress(ValueError):  # it does not run
            ray.kill(ray.get_actor(lane.name, namespace=NAMESPACE))
    give_up = time.monotonic() + REPLACE_S
    while True:
        handle = start_controller(config)
        try:
            if ray.get(handle.config.remote()) == config:
                return handle
        except ray.exceptions.RayActorError:  # the old one, not quite gone
            if time.monotonic() > give_up:
                raise
