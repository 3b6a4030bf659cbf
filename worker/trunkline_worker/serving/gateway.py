"""The public address: a server of all services of the wire, for callers with a token. No Ray in here."""

from __future__ import annotations

from pathlib import Path

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection
from trunkline_wire.bulk_rpc import add_inference_servicer
from trunkline_wire.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    dataset_pb2,
    dataset_pb2_grpc,
    inference_pb2,
    registry_pb2,
    registry_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
    trunk_pb2,
    trunk_pb2_grpc,
)

from trunkline_worker.serving.auth import Tokens, by_tokens
from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.budget import ByteBudget
from trunkline_worker.serving.server import Listener, WireServer
from trunkline_worker.serving.servicers.catalog import CatalogServicer
from trunkline_worker.serving.servicers.datasets import DatasetServicer
from trunkline_worker.serving.servicers.inference import InferenceServicer
from trunkline_worker.serving.servicers.registry import RegistryServicer
from trunkline_worker.serving.servicers.training import TrainingServicer
from trunkline_worker.serving.servicers.trunk import TrunkServicer

SERVICES = (
    catalog_pb2.DESCRIPTOR.services_by_name["CatalogService"],
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    dataset_pb2.DESCRIPTOR.services_by_name["DatasetService"],
    training_pb2.DESCRIPTOR.services_by_name["TrainingService"],
    registry_pb2.DESCRIPTOR.services_by_name["RegistryService"],
    trunk_pb2.DESCRIPTOR.services_by_name["TrunkService"],
)
"""Descriptors of all services of the wire."""


class GatewayServer(WireServer):
    """The gRPC server of a gateway replica."""

    def __init__(self, listener: Listener, backends: Backends, *, budget: ByteBudget | None = None) -> None:
        """Build the server; ``start`` binds it.

        Raises:
            ValueError: The listener is not safe, or a token file is not right.
            OSError: A file cannot be read.
        """
        listener.check()
        tokens = Tokens.read(Path(listener.token_file)) if listener.token_file else None
        # Gateways of one machine share their port.
        super().__init__(listener, by_tokens(tokens), SERVICES, share_port=True)
        budget = budget or ByteBudget()
        catalog_pb2_grpc.add_CatalogServiceServicer_to_server(CatalogServicer(backends), self._server)
        add_inference_servicer(InferenceServicer(backends, budget), self._server)
        dataset_pb2_grpc.add_DatasetServiceServicer_to_server(DatasetServicer(backends, budget), self._server)
        training_pb2_grpc.add_TrainingServiceServicer_to_server(TrainingServicer(backends), self._server)
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(RegistryServicer(backends), self._server)
        trunk_pb2_grpc.add_TrunkServiceServicer_to_server(TrunkServicer(backends, budget), self._server)
        names = [service.full_name for service in SERVICES]
        reflection.enable_server_reflection(
            [*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME], self._server
        )
