"""The one public address: a grpc.aio server with TLS, tokens, limits, health and reflection. No Ray in here."""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.protobuf.internal import api_implementation
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from trunkline_wire.limits import MAX_CONCURRENT_STREAMS, MAX_MESSAGE_BYTES
from trunkline_wire.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    dataset_pb2,
    dataset_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
    trunk_pb2,
    trunk_pb2_grpc,
)

from trunkline_worker.serving.auth import Tokens
from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.boundary import Boundary
from trunkline_worker.serving.budget import ByteBudget
from trunkline_worker.serving.servicers.catalog import CatalogServicer
from trunkline_worker.serving.servicers.datasets import DatasetServicer
from trunkline_worker.serving.servicers.inference import InferenceServicer
from trunkline_worker.serving.servicers.registry import RegistryServicer
from trunkline_worker.serving.servicers.training import TrainingServicer
from trunkline_worker.serving.servicers.trunk import TrunkServicer

logger = logging.getLogger(__name__)

SERVICES = (
    catalog_pb2.DESCRIPTOR.services_by_name["CatalogService"],
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    dataset_pb2.DESCRIPTOR.services_by_name["DatasetService"],
    training_pb2.DESCRIPTOR.services_by_name["TrainingService"],
    registry_pb2.DESCRIPTOR.services_by_name["RegistryService"],
    trunk_pb2.DESCRIPTOR.services_by_name["TrunkService"],
)
"""Descriptors of all services of the wire."""

MAX_CONCURRENT_RPCS = 1024
"""Calls in progress over all connections; what comes on top is refused with RESOURCE_EXHAUSTED."""

DRAIN_S = 15.0
"""How long calls in progress may take to finish when the gateway is told to stop, in seconds."""


@dataclass(frozen=True)
class Listener:
    """Where and how the gateway listens.

    Attributes:
        host: Address of an interface.
        port: 0 takes a free one.
        token_file: File of tokens; None only with ``insecure``.
        tls_cert: PEM file of the certificate chain.
        tls_key: PEM file of its private key.
        tls_client_ca: PEM file of the authority that client certificates must come from (mutual TLS).
        insecure: Allow plaintext on an address that is not loopback, or no tokens.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    insecure: bool = False

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    def check(self) -> None:
        """Refuse a listener that would be open to strangers.

        Raises:
            ValueError: Saying what is missing and how to mend it.
        """
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("TLS needs both a certificate and its key (--tls-cert and --tls-key)")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("client certificates need TLS (--tls-cert and --tls-key)")
        if self.insecure:
            return
        if not self.token_file:
            raise ValueError("a token file is needed (--token-file), or --insecure to let everyone in")
        if not self.is_loopback and not self.tls_cert:
            raise ValueError(
                f"listening on {self.host} needs TLS (--tls-cert and --tls-key), or --insecure to send tokens and data "
                "in the clear"
            )


class GatewayServer:
    """The gRPC server of a gateway replica."""

    def __init__(self, listener: Listener, backends: Backends, *, budget: ByteBudget | None = None) -> None:
        """Build the server; ``start`` binds it.

        Raises:
            ValueError: The listener is not safe, or a token file is not right.
            OSError: A file cannot be read.
        """
        if api_implementation.Type() != "upb":
            raise RuntimeError(f"protobuf runs on {api_implementation.Type()!r}; 'upb' is needed for speed and safety")
        listener.check()
        tokens = Tokens.read(Path(listener.token_file)) if listener.token_file else None
        self._listener = listener
        self._server = grpc.aio.server(
            interceptors=[Boundary(tokens)],
            maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS,
            options=[
                ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 1),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 15_000),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.http2.max_ping_strikes", 3),
                ("grpc.max_metadata_size", 16 * 1024),
            ],
        )
        budget = budget or ByteBudget()
        catalog_pb2_grpc.add_CatalogServiceServicer_to_server(CatalogServicer(backends), self._server)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(backends, budget), self._server)
        dataset_pb2_grpc.add_DatasetServiceServicer_to_server(DatasetServicer(backends, budget), self._server)
        training_pb2_grpc.add_TrainingServiceServicer_to_server(TrainingServicer(backends), self._server)
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(RegistryServicer(backends), self._server)
        trunk_pb2_grpc.add_TrunkServiceServicer_to_server(TrunkServicer(backends, budget), self._server)
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [service.full_name for service in SERVICES]
        reflection.enable_server_reflection(
            [*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME], self._server
        )
        self._health_names = ["", *names]
        self._stopping = False

    async def start(self) -> int:
        """Bind, serve, and return the port.

        Raises:
            RuntimeError: The port cannot be bound.
        """
        address = f"{self._listener.host}:{self._listener.port}"
        if self._listener.tls_cert and self._listener.tls_key:
            port = self._server.add_secure_port(address, self._credentials())
        else:
            port = self._server.add_insecure_port(address)
        if port == 0:
            raise RuntimeError(f"cannot listen on {address}")
        await self._server.start()
        await self.set_serving(True)
        logger.info("gateway listens on %s:%d", self._listener.host, port)
        return port

    async def set_serving(self, serving: bool) -> None:
        """Say through ``grpc.health.v1`` whether calls are welcome."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._health_names:
            await self._health.set(name, status)

    async def stop(self, grace_s: float = DRAIN_S) -> None:
        """Take no new calls, let those in progress finish, then end. More than once does nothing more."""
        if self._stopping:
            return
        self._stopping = True
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    def _credentials(self) -> grpc.ServerCredentials:
        cert, key = self._listener.tls_cert, self._listener.tls_key
        assert cert and key
        client_ca = Path(self._listener.tls_client_ca).read_bytes() if self._listener.tls_client_ca else None
        return grpc.ssl_server_credentials(
            [(Path(key).read_bytes(), Path(cert).read_bytes())],
            root_certificates=client_ca,
            require_client_auth=client_ca is not None,
        )
