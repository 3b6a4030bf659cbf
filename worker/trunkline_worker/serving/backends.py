"""What the servicers stand on: engines, metadata and storage. Built by the gateway, or by a test without Ray."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from trunkline_wire.bottleneck import Bottleneck
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.engine.api import Engine
from trunkline_worker.serving.endpoints import EndpointBook
from trunkline_worker.store.blobs import BlobStore


class Metadata(Protocol):
    """Calls into the metadata store by name, wherever it lives."""

    async def call(self, name: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Call ``area.method``, for example ``rows.missing``.

        Raises:
            WireError: As the method does; UNAVAILABLE where the store cannot be reached in time.
        """

    async def wait_for_events(self, tenant: str, job_id: str, after_seq: int, timeout_s: float) -> list[Any]:
        """Return a job's events after a sequence number, waiting for one up to a time."""


@dataclass(frozen=True)
class TuningLimits:
    """What fine-tuning may take: workers of a run, and MiB of each for the features that it trains on."""

    max_workers: int = 1
    memory_mb: int = 8192


@dataclass(frozen=True)
class Backends:
    """What the servicers stand on.

    Attributes:
        engines: By backbone name; the first is the default.
        metadata: Rows, datasets, jobs and models.
        blobs: Chunks, stems and heads.
        versions: Library to version, for ``GetServerInfo``.
        storage_shared: Whether every node reads what another one wrote.
        storage_note: What was found out about it.
        bottlenecks: Those found last, by tenant and hash.
        endpoints: Which replicas listen themselves; None where nothing is said of them.
        tuning: What fine-tuning may take.
    """

    engines: Mapping[str, Engine]
    metadata: Metadata
    blobs: BlobStore
    versions: Mapping[str, str] = field(default_factory=dict)
    storage_shared: bool = True
    storage_note: str = ""
    bottlenecks: OrderedDict[tuple[str, str], Bottleneck] = field(default_factory=OrderedDict, compare=False)
    endpoints: EndpointBook | None = None
    tuning: TuningLimits = field(default_factory=TuningLimits)

    def engine(self, name: str) -> Engine:
        """Return the engine of a backbone.

        Raises:
            WireError: NOT_FOUND.
        """
        engine = self.engines.get(name)
        if engine is None:
            raise WireError(
                ErrorCode.NOT_FOUND, f"no backbone {name[:80]!r} here; there is {', '.join(sorted(self.engines))}"
            )
        return engine

    @property
    def default_backbone(self) -> str:
        """Return the name of the cluster's first backbone."""
        return next(iter(self.engines))
