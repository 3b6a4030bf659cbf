"""The Serve deployments: the gateway, and a backbone. Thin: what they do is in modules without Ray."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray import serve
from trunkline_wire.bottleneck import ChannelLinear
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import FLOAT32, BackboneSpec, CutCost, FeatureSpace, Tuning

from trunkline_worker.engine.api import (
    Engine,
    EngineStats,
    Extraction,
    Payload,
    Prediction,
    StemFile,
    TrunkGradients,
    TrunkOutputs,
)
from trunkline_worker.serving.addresses import find_place, outward_host
from trunkline_worker.serving.allocator import keep_freed_memory, spare_long_lived
from trunkline_worker.serving.backends import Backends, Metadata, TuningLimits
from trunkline_worker.serving.bottlenecks import load_bottleneck
from trunkline_worker.serving.direct import DirectConfig, DirectEndpoint, EndpointBackends, open_endpoint
from trunkline_worker.serving.endpoints import DirectoryClient, EndpointBook
from trunkline_worker.serving.gateway import GatewayServer
from trunkline_worker.serving.loopback import keep_replica_port_on_loopback
from trunkline_worker.serving.server import Listener
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
quantised, what a cut costs and which runtime is the fastest is measured."""

SWITCH_INTERVAL_S = 0.0005
"""How long a thread of a replica keeps Python to itself where another one wants it, in seconds: a thread that comes
back from the device waits for the event loop, and the device for it."""

RETRY_S = 0.1
"""Pause before a call is sent again after the replica that had it died, in seconds."""


@dataclass(frozen=True)
class BackboneConfig:
    """What a backbone replica needs to know.

    ``backbone_apps`` is (backbone, Serve application), of all that the replica may ask in turn; ``direct`` how it
    listens itself, or None; ``runtime`` the one that the operator fixed, or None. With 0 ``num_threads`` the cores of a
    machine are shared by the ``num_replicas`` of all backbones, see ``share_of_cores``.
    """

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
    head_memory_mb: int = 1024
    backbone_apps: tuple[tuple[str, str], ...] = ()
    direct: DirectConfig | None = None
    runtime: str | None = None
    num_replicas: int = 1


@dataclass(frozen=True)
class GatewayConfig:
    """What a gateway replica needs to know. ``backbone_apps`` is (backbone, Serve application), the default first."""

    listener: Listener
    backbone_apps: tuple[tuple[str, str], ...]
    storage_url: str
    versions: dict[str, str]
    storage_shared: bool
    storage_note: str
    tuning: TuningLimits = field(default_factory=TuningLimits)


class Backbone:
    """A replica of a backbone. Errors are returned, not raised: Ray would wrap them."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: BackboneConfig,
        metadata: Callable[[], Metadata],
        directory: Callable[[], DirectoryClient],
    ) -> None:
        """Load the weights, choose a runtime, listen.

        Args:
            config: What the replica needs to know.
            metadata: Makes the way to the metadata store, which need not be there yet.
            directory: Makes the way to the directory of endpoints, likewise.
        """
        # Here, so that gateways, which unpickle this module too, stay without torch.
        from trunkline_worker.backbones.catalogue import load_backbone
        from trunkline_worker.engine.local import LocalEngine

        keep_freed_memory()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
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
            num_threads=config.num_threads or _own_threads(config),
            clock=SystemClock(),
            max_queued_rows=config.max_queued_rows,
            head_capacity=config.head_capacity,
            head_bytes=config.head_memory_mb * 2**20,
            load_bottleneck=functools.partial(load_bottleneck, blobs),
            runtime=config.runtime,
        )
        await self._engine.start()
        spare_long_lived()
        self._endpoint = None
        if config.direct is not None:
            # Their own engine first: a head on local features alone runs anywhere, so it runs here.
            engines: dict[str, Engine] = {config.name: self._engine}
            engines.update({name: HandleEngine(app) for name, app in config.backbone_apps if name != config.name})
            backends = EndpointBackends(engines, metadata(), blobs)
            self._endpoint = await open_endpoint(
                functools.partial(_make_endpoint, config.direct, config.name, backends, directory())
            )

    async def describe(self, input_size: int) -> BackboneSpec | WireError:
        """See ``Engine.describe``."""
        return await _returned(self._engine.describe(input_size))

    async def stem(self, cut: str, input_size: int, precision: str) -> StemFile | WireError:
        """See ``Engine.stem``."""
        return await _returned(self._engine.stem(cut, input_size, precision))

    async def cut_cost(self, cut: str, input_size: int) -> CutCost | WireError:
        """See ``Engine.cut_cost``."""
        return await _returned(self._engine.cut_cost(cut, input_size))

    async def tune(self, cut: str, input_size: int, again: bool) -> Tuning | WireError:
        """See ``Engine.tune``. Other replicas take over what was measured when they start anew."""
        return await _returned(self._engine.tune(cut, input_size, again))

    async def predict(
        self,
        space: FeatureSpace,
        rows: Payload,
        model: ModelRecord,
        more_BE: npt.NDArray[np.float32] | None,
        timeout_s: float | None,
        caller: str = "",
        outliers: bool = False,
    ) -> Prediction | WireError:
        """See ``Engine.predict``."""
        return await _returned(
            self._engine.predict(
                space, rows, model, more_BE=more_BE, outliers=outliers, timeout_s=timeout_s, caller=caller
            )
        )

    async def extract(
        self, space: FeatureSpace, rows: Payload, slices: Sequence[str], timeout_s: float | None, caller: str = ""
    ) -> Extraction | WireError:
        """See ``Engine.extract``."""
        return await _returned(self._engine.extract(space, rows, slices, timeout_s=timeout_s, caller=caller))

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
        """Send callers elsewhere, let what is queued finish. There is no engine where loading failed."""
        endpoint = getattr(self, "_endpoint", None)
        if endpoint is not None:
            await endpoint.close()
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await engine.close()


def _make_endpoint(
    config: DirectConfig, backbone: str, backends: Backends, directory: DirectoryClient
) -> DirectEndpoint:
    return DirectEndpoint(
        config,
        backbone,
        backends,
        directory,
        place=find_place(config.host, config.gateway.host, ray.util.get_node_ip_address(), outward_host),
        replica=secrets.token_hex(16),
        node=ray.get_runtime_context().get_node_id(),
        clock=SystemClock(),
    )


def _own_threads(config: BackboneConfig) -> int:
    """Return the CPU threads of a replica where the operator names no number."""
    from trunkline_worker.engine.runtimes import find_device

    num_cores = os.cpu_count() or 1
    if find_device(config.device).type == "cuda":
        return num_cores
    num_nodes = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
    return share_of_cores(num_cores, config.num_replicas, num_nodes)


def share_of_cores(num_cores: int, num_replicas: int, num_nodes: int) -> int:
    """Return the cores of one replica where those of all backbones are spread evenly: one at least.

    More threads than cores, from several replicas, make all of them slower.
    """
    per_node = -(-num_replicas // max(num_nodes, 1))
    return max(1, num_cores // per_node)


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

    async def tune(self, cut: str = "", input_size: int = 0, again: bool = False) -> Tuning:
        """See ``Engine.tune``. One replica measures."""
        tuning: Tuning = await self._call("tune", None, cut, input_size, again, patience_s=PREPARE_TIMEOUT_S)
        self._specs.clear()  # they name the runtime
        return tuning

    async def predict(
        self,
        space: FeatureSpace,
        rows: Payload,
        model: ModelRecord,
        *,
        more_BE: npt.NDArray[np.float32] | None = None,
        outliers: bool = False,
        timeout_s: float | None = None,
        caller: str = "",
        wait: bool = False,
    ) -> Prediction:
        """See ``Engine.predict``. Rows wait where they came from, not a second time in the replica: OVERLOADED."""
        prediction: Prediction = await self._call(
            "predict", timeout_s, space, rows, model, more_BE, caller=caller, outliers=outliers
        )
        return prediction

    async def extract(
        self,
        space: FeatureSpace,
        rows: Payload,
        slices: Sequence[str] = (),
        *,
        timeout_s: float | None = None,
        caller: str = "",
        wait: bool = False,
    ) -> Extraction:
        """See ``Engine.extract``, and ``predict`` above."""
        extraction: Extraction = await self._call("extract", timeout_s, space, rows, tuple(slices), caller=caller)
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

    async def _call(
        self, method: str, timeout_s: float | None, *args: Any, patience_s: float | None = None, **keywords: Any
    ) -> Any:
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
            response = getattr(self._handle, method).remote(*args, *extra, **keywords)
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
        self,
        config: GatewayConfig,
        connect_metadata: Callable[[], Awaitable[Metadata]],
        directory: Callable[[], DirectoryClient],
    ) -> None:
        """Reach the metadata store, then listen.

        Args:
            config: What the replica needs to know.
            connect_metadata: Waits for the metadata store and returns the way to it.
            directory: Makes the way to the directory of endpoints.
        """
        keep_freed_memory()
        backends = Backends(
            engines={name: HandleEngine(app) for name, app in config.backbone_apps},
            metadata=await connect_metadata(),
            blobs=BlobStore(config.storage_url),
            versions=config.versions,
            storage_shared=config.storage_shared,
            storage_note=config.storage_note,
            tuning=config.tuning,
            endpoints=EndpointBook(
                directory(),
                clock=SystemClock(),
                node=ray.get_runtime_context().get_node_id(),
                is_local=config.listener.is_loopback,
                needs_tls=config.listener.is_tls,
            ),
        )
        spare_long_lived()
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
