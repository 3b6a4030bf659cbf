"""The Serve deployments: the gateway, and a backbone. Thin: what they do is in modules without Ray."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray import serve
from trunkline_wire.bottleneck import ChannelLinear
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import FLOAT32, BackboneSpec, CutCost, FeatureSpace

from trunkline_worker.engine.api import (
    EngineStats,
    Extraction,
    Payload,
    Prediction,
    StemFile,
    TrunkGradients,
    TrunkOutputs,
)
from trunkline_worker.serving.backends import Backends, Metadata
from trunkline_worker.serving.bottlenecks import load_bottleneck
from trunkline_worker.serving.gateway import GatewayServer, Listener
from trunkline_worker.serving.loopback import keep_replica_port_on_loopback
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import SystemClock
from trunkline_worker.store.records import ModelRecord

logger = logging.getLogger(__name__)

# Runs in every process that unpickles a deployment, before Serve binds the replica's internal port.
keep_replica_port_on_loopback()

DEFAULT_TIMEOUT_S = 60.0
"""How long a call to a backbone may take where the caller stated no deadline, in seconds."""

PREPARE_TIMEOUT_S = 600.0
"""How long a call may take whose answer is made the first time it is asked for, in seconds: stems are exported and
quantised, and what a cut costs is measured."""

RETRY_S = 0.1
"""Pause before a call is sent again after the replica that had it died, in seconds."""


@dataclass(frozen=True)
class BackboneConfig:
    """What a backbone replica needs to know."""

    name: str
    weights: str | None
    allow_untrained: bool
    device: str
    num_threads: int
    max_queued_rows: int
    head_capacity: int
    storage_url: str
    manifest: str | None = None
    samples: str | None = None


@dataclass(frozen=True)
class GatewayConfig:
    """What a gateway replica needs to know. ``backbone_apps`` is (backbone, Serve application), the default first."""

    listener: Listener
    backbone_apps: tuple[tuple[str, str], ...]
    storage_url: str
    versions: dict[str, str]
    storage_shared: bool
    storage_note: str


class Backbone:
    """A replica of a backbone. Errors are returned, not raised: Ray would wrap them."""

    async def __init__(self, config: BackboneConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        """Load the weights and choose a runtime."""
        # Here, so that gateways, which unpickle this module too, stay without torch.
        from trunkline_worker.backbones.catalogue import load_backbone
        from trunkline_worker.engine.local import LocalEngine

        backbone = await asyncio.to_thread(
            load_backbone,
            config.name,
            weights=config.weights,
            allow_untrained=config.allow_untrained,
            manifest=config.manifest,
            samples=config.samples,
        )
        blobs = BlobStore(config.storage_url)
        self._engine = LocalEngine(
            backbone,
            blobs,
            device=config.device,
            # Not what torch says: Ray tells it to use as many threads as the actor reserved CPUs.
            num_threads=config.num_threads or os.cpu_count(),
            clock=SystemClock(),
            max_queued_rows=config.max_queued_rows,
            head_capacity=config.head_capacity,
            load_bottleneck=functools.partial(load_bottleneck, blobs),
        )
        await self._engine.start()

    async def describe(self, input_size: int) -> BackboneSpec | WireError:
        """See ``Engine.describe``."""
        return await _returned(self._engine.describe(input_size))

    async def stem(self, cut: str, input_size: int, precision: str) -> StemFile | WireError:
        """See ``Engine.stem``."""
        return await _returned(self._engine.stem(cut, input_size, precision))

    async def cut_cost(self, cut: str, input_size: int) -> CutCost | WireError:
        """See ``Engine.cut_cost``."""
        return await _returned(self._engine.cut_cost(cut, input_size))

    async def predict(
        self,
        space: FeatureSpace,
        rows: Payload,
        model: ModelRecord,
        more_BE: npt.NDArray[np.float32] | None,
        timeout_s: float | None,
    ) -> Prediction | WireError:
        """See ``Engine.predict``."""
        return await _returned(self._engine.predict(space, rows, model, more_BE=more_BE, timeout_s=timeout_s))

    async def extract(
        self, space: FeatureSpace, rows: Payload, slices: Sequence[str], timeout_s: float | None
    ) -> Extraction | WireError:
        """See ``Engine.extract``."""
        return await _returned(self._engine.extract(space, rows, slices, timeout_s=timeout_s))

    async def forward(
        self,
        space: FeatureSpace,
        rows: Payload,
        outputs: Sequence[str],
        decoder: ChannelLinear | None,
        timeout_s: float | None,
    ) -> TrunkOutputs | WireError:
        """See ``Engine.forward``."""
        return await _returned(self._engine.forward(space, rows, outputs, decoder=decoder, timeout_s=timeout_s))

    async def backward(
        self,
        space: FeatureSpace,
        rows: Payload,
        gradient_BD: npt.NDArray[np.generic],
        outputs: Sequence[str],
        decoder: ChannelLinear | None,
        timeout_s: float | None,
    ) -> TrunkGradients | WireError:
        """See ``Engine.backward``."""
        return await _returned(
            self._engine.backward(space, rows, gradient_BD, outputs, decoder=decoder, timeout_s=timeout_s)
        )

    async def stats(self) -> EngineStats | WireError:
        """See ``Engine.stats``."""
        return await _returned(self._engine.stats())

    async def __del__(self) -> None:
        """Let what is queued finish. There is no engine where loading failed."""
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await engine.close()


async def _returned(answer: Awaitable[Any]) -> Any:
    try:
        return await answer
    except WireError as error:
        return error


class HandleEngine:
    """An ``Engine`` behind a Serve handle. All its calls may be repeated, so one whose replica died is sent again."""

    def __init__(self, app: str) -> None:
        """Keep the name of the backbone's Serve application."""
        self._app = app
        self._handle: Any = None
        self._specs: dict[int, tuple[float, BackboneSpec]] = {}

    async def describe(self, input_size: int = 0) -> BackboneSpec:
        """See ``Engine.describe``. Remembered for a while: uploads ask for every chunk."""
        known = self._specs.get(input_size)
        if known is not None and time.monotonic() - known[0] < 5.0:
            return known[1]
        spec: BackboneSpec = await self._call("describe", None, input_size)
        self._specs[input_size] = (time.monotonic(), spec)
        return spec

    async def stem(self, cut: str, input_size: int = 0, precision: str = FLOAT32) -> StemFile:
        """See ``Engine.stem``."""
        stem: StemFile = await self._call("stem", None, cut, input_size, precision, patience_s=PREPARE_TIMEOUT_S)
        return stem

    async def cut_cost(self, cut: str, input_size: int = 0) -> CutCost:
        """See ``Engine.cut_cost``."""
        cost: CutCost = await self._call("cut_cost", None, cut, input_size, patience_s=PREPARE_TIMEOUT_S)
        return cost

    async def predict(
        self,
        space: FeatureSpace,
        rows: Payload,
        model: ModelRecord,
        *,
        more_BE: npt.NDArray[np.float32] | None = None,
        timeout_s: float | None = None,
    ) -> Prediction:
        """See ``Engine.predict``."""
        prediction: Prediction = await self._call("predict", timeout_s, space, rows, model, more_BE)
        return prediction

    async def extract(
        self, space: FeatureSpace, rows: Payload, slices: Sequence[str] = (), *, timeout_s: float | None = None
    ) -> Extraction:
        """See ``Engine.extract``."""
        extraction: Extraction = await self._call("extract", timeout_s, space, rows, tuple(slices))
        return extraction

    async def forward(
        self,
        space: FeatureSpace,
        rows: Payload,
        outputs: Sequence[str] = (),
        *,
        decoder: ChannelLinear | None = None,
        timeout_s: float | None = None,
    ) -> TrunkOutputs:
        """See ``Engine.forward``."""
        answer: TrunkOutputs = await self._call("forward", timeout_s, space, rows, tuple(outputs), decoder)
        return answer

    async def backward(
        self,
        space: FeatureSpace,
        rows: Payload,
        gradient_BD: npt.NDArray[np.generic],
        outputs: Sequence[str] = (),
        *,
        decoder: ChannelLinear | None = None,
        timeout_s: float | None = None,
    ) -> TrunkGradients:
        """See ``Engine.backward``."""
        answer: TrunkGradients = await self._call(
            "backward", timeout_s, space, rows, gradient_BD, tuple(outputs), decoder
        )
        return answer

    async def stats(self) -> EngineStats:
        """See ``Engine.stats``. Of one replica."""
        stats: EngineStats = await self._call("stats", None)
        return stats

    async def _call(self, method: str, timeout_s: float | None, *args: Any, patience_s: float | None = None) -> Any:
        """Call a replica, for ``timeout_s`` seconds at most; where the caller stated none, for ``patience_s``."""
        if patience_s is None:
            patience_s = DEFAULT_TIMEOUT_S
        deadline = time.monotonic() + (patience_s if timeout_s is None else timeout_s)
        takes_timeout = method in ("predict", "extract", "forward", "backward")
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise WireError(
                    ErrorCode.DEADLINE_EXCEEDED if timeout_s is not None else ErrorCode.UNAVAILABLE,
                    "the backbone did not answer in time",
                )
            # Without a deadline of the caller's, the batcher is told none: only the wait here is bounded.
            extra = (None if timeout_s is None else remaining,) if takes_timeout else ()
            try:
                if self._handle is None:  # finding it asks Serve's controller; it stays right when replicas change
                    self._handle = await asyncio.to_thread(serve.get_app_handle, self._app)
            except serve.exceptions.RayServeException as error:
                logger.warning("%s is not there yet: %s", self._app, error)
                await asyncio.sleep(min(RETRY_S, remaining))
                continue
            response = getattr(self._handle, method).remote(*args, *extra)
            try:
                answer = await asyncio.wait_for(response, remaining)
            except TimeoutError:
                response.cancel()
                continue
            except asyncio.CancelledError:
                response.cancel()
                raise
            except (ray.exceptions.RayActorError, serve.exceptions.RayServeException) as error:
                logger.warning("%s of %s is sent again: %s", method, self._app, type(error).__name__)
                await asyncio.sleep(min(RETRY_S, remaining))
                continue
            if isinstance(answer, WireError):
                raise answer
            return answer


class Gateway:
    """A replica of the gateway: the gRPC server, and what its servicers stand on."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: GatewayConfig, connect_metadata: Callable[[], Awaitable[Metadata]]
    ) -> None:
        """Reach the metadata store, then listen."""
        backends = Backends(
            engines={name: HandleEngine(app) for name, app in config.backbone_apps},
            metadata=await connect_metadata(),
            blobs=BlobStore(config.storage_url),
            versions=config.versions,
            storage_shared=config.storage_shared,
            storage_note=config.storage_note,
        )
        self._server = GatewayServer(config.listener, backends)
        self._port = await self._server.start()

    async def port(self) -> int:
        """Return the port that this replica listens on."""
        return self._port

    async def __del__(self) -> None:
        """Drain: no new calls, those in progress finish. There is no server where starting failed."""
        server = getattr(self, "_server", None)
        if server is not None:
            await server.stop()
