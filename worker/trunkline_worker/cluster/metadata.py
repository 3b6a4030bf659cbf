"""The way of gateways and replicas to the controller: calls by name, repeated while the controller restarts."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import ray
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.cluster.controller import ControllerConfig, start_controller
from trunkline_worker.serving.endpoints import Announcement, Listing
from trunkline_worker.training.ray_train import CONTROLLER, NAMESPACE

DEFAULT_TIMEOUT_S = 30.0
"""How long a call may take where the caller stated no deadline, in seconds."""

RETRY_S = 0.1


class _Controller:
    """A handle on the controller actor that outlives it."""

    def __init__(self) -> None:
        """Start without a handle; the first call finds it."""
        self._handle: Any = None

    async def _ask(self, method: str, timeout_s: float, *args: Any) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise WireError(ErrorCode.UNAVAILABLE, "the controller is away", retry_delay_s=1.0)
            try:
                if self._handle is None:
                    self._handle = await asyncio.to_thread(ray.get_actor, CONTROLLER, NAMESPACE)
                answer = await asyncio.wait_for(getattr(self._handle, method).remote(*args), remaining)
            except TimeoutError:
                continue
            except (ray.exceptions.RayActorError, ValueError):  # ValueError: no actor of that name
                self._handle = None
                await asyncio.sleep(min(RETRY_S, remaining))
                continue
            if isinstance(answer, WireError):
                raise answer
            return answer


class ActorMetadata(_Controller):
    """``Metadata`` in the controller actor. Calls may be repeated: mutations carry keys and fences."""

    async def call(self, name: str, *args: Any, timeout_s: float | None = None) -> Any:
        """See ``Metadata.call``."""
        return await self._ask("call", DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s, name, *args)

    async def wait_for_events(self, tenant: str, job_id: str, after_seq: int, timeout_s: float) -> list[Any]:
        """See ``Metadata.wait_for_events``."""
        events: list[Any] = await self._ask(
            "wait_for_events", timeout_s + DEFAULT_TIMEOUT_S, tenant, job_id, after_seq, timeout_s
        )
        return events


class ActorDirectory(_Controller):
    """``DirectoryClient`` in the controller actor."""

    async def announce(self, announcement: Announcement, *, timeout_s: float) -> bytes:
        """See ``DirectoryClient.announce``."""
        secret: bytes = await self._ask("announce", timeout_s, announcement)
        return secret

    async def withdraw(self, replica: str, *, timeout_s: float) -> None:
        """See ``DirectoryClient.withdraw``."""
        await self._ask("withdraw", timeout_s, replica)

    async def list(self, backbone: str, *, timeout_s: float) -> Listing:
        """See ``DirectoryClient.list``."""
        listing: Listing = await self._ask("endpoints", timeout_s, backbone)
        return listing


async def connect_metadata(config: ControllerConfig) -> ActorMetadata:
    """Start the controller if it does not run, and return the way to it once it answers."""
    controller = await asyncio.to_thread(start_controller, config)
    await controller.config.remote()
    return ActorMetadata()
