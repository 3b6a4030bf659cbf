"""All RPC logic: plain objects in, plain objects out. Beside ``_channel`` the only place that knows gRPC."""

from __future__ import annotations

from trunkline._calls.catalog import CatalogCalls, FetchedStem
from trunkline._calls.core import Caller
from trunkline._calls.datasets import Chunk, DatasetCalls
from trunkline._calls.inference import Batch, InferenceCalls, MoreRows, RawEmbedding, RawPrediction, Rows
from trunkline._calls.registry import RegistryCalls
from trunkline._calls.training import TrainingCalls
from trunkline._calls.trunk import TrunkCalls
from trunkline._channel import Connection
from trunkline.config import Settings

__all__ = ["Batch", "Calls", "Chunk", "FetchedStem", "MoreRows", "RawEmbedding", "RawPrediction", "Rows"]


class Calls:
    """Every call of every service, over one connection."""

    def __init__(self, settings: Settings) -> None:
        """Prepare; nothing is opened yet."""
        self.connection = Connection(settings)
        self.caller = Caller(self.connection)
        self.catalog = CatalogCalls(self.caller)
        self.datasets = DatasetCalls(self.caller)
        self.inference = InferenceCalls(self.caller)
        self.registry = RegistryCalls(self.caller)
        self.training = TrainingCalls(self.caller)
        self.trunk = TrunkCalls(self.caller)

    def close(self) -> None:
        """Close the connection for good."""
        self.connection.close()
