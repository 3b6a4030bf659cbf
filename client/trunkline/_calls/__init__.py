"""All RPC logic: plain objects in, plain objects out. Nothing but this, ``_channel`` and ``_direct`` knows gRPC."""

from __future__ import annotations

from trunkline._calls.catalog import CatalogCalls, FetchedStem
from trunkline._calls.core import Caller
from trunkline._calls.datasets import Chunk, DatasetCalls
from trunkline._calls.inference import Batch, InferenceCalls, MoreRows, RawEmbedding, RawPrediction, Rows
from trunkline._calls.registry import RegistryCalls
from trunkline._calls.training import TrainingCalls
from trunkline._calls.trunk import TrunkCalls
from trunkline._channel import Connection
from trunkline._deadline import Deadline
from trunkline._direct import Direct
from trunkline.config import Settings

__all__ = ["Batch", "Calls", "Chunk", "FetchedStem", "MoreRows", "RawEmbedding", "RawPrediction", "Rows"]


class Calls:
    """Every call of every service, over one connection to the gateway and direct ones to replicas."""

    def __init__(self, settings: Settings) -> None:
        """Prepare; nothing is opened yet."""
        self.connection = Connection(settings)
        self.direct = Direct(settings, lambda name, timeout_s: self.catalog.endpoints(name, Deadline(timeout_s)))
        self.caller = Caller(self.connection, self.direct)
        self.catalog = CatalogCalls(self.caller)
        self.datasets = DatasetCalls(self.caller)
        self.inference = InferenceCalls(self.caller)
        self.registry = RegistryCalls(self.caller)
        self.training = TrainingCalls(self.caller)
        self.trunk = TrunkCalls(self.caller)

    def close(self) -> None:
        """Close the connections for good."""
        self.direct.close()
        self.connection.close()
