"""What every gRPC server of the cluster has: TLS, limits, the boundary, health, draining. No Ray in here."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.internal import api_implementation
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from trunkline_wire.hosts import is_loopback
from trunkline_wire.limits import MAX_CONCURRENT_STREAMS, MAX_MESSAGE_BYTES

from trunkline_worker.serving.addresses import host_port
from trunkline_worker.serving.auth import Authorise
from trunkline_worker.serving.boundary import Boundary
from trunkline_worker.serving.draining import Draining

logger = logging.getLogger(__name__)

MAX_CONCURRENT_RPCS = 1024
"""Calls in progress over all connections; what comes on top is refused with RESOURCE_EXHAUSTED."""

DRAIN_S = 15.0
"""How long calls in progress may take to finish when a server is told to stop, in seconds."""


@dataclass(frozen=True)
class Listener:
    """Where and how a server listens.

    Attributes:
        host: Address of an interface.
        port: 0 takes a free one.
        token_file: File of tokens; None only with ``insecure``, or where tickets are shown instead.
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
        return is_loopback(self.host)

    @property
    def is_tls(self) -> bool:
        """Whether callers must speak TLS."""
        return bool(self.tls_cert)

    def check(self) -> None:
        """Refuse a listener that would be open to strangers.

        Raises:
            ValueError: Saying what is missing and how to mend it.
        """
        self._check_files()
        if not self.insecure and not self.token_file:
            raise ValueError("a token file is needed (--token-file), or --insecure to let everyone in")
        self.check_transport()

    def check_transport(self) -> None:
        """Refuse a listener on which strangers could read what others send.

        Raises:
            ValueError: Saying what is missing and how to mend it.
        """
        self._check_files()
        if not self.insecure and not self.is_loopback and not self.tls_cert:
            raise ValueError(
                f"listening on {self.host} needs TLS (--tls-cert and --tls-key), or --insecure to send tokens and data "
                "in the clear"
            )

    def _check_files(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("TLS needs both a certificate and its key (--tls-cert and --tls-key)")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("client certificates need TLS (--tls-cert and --tls-key)")


class WireServer:
    """A server of some of the wire's services. Whoever extends it adds them to ``_server`` before ``start``."""

    def __init__(self, listener: Listener, authorise: Authorise, services: Sequence[Any], *, share_port: bool) -> None:
        """Build the server; ``start`` binds it.

        Args:
            listener: Where; it has been checked.
            authorise: Tells callers apart and turns them away.
            services: Descriptors of what will be served, for health.
            share_port: Whether other servers of this machine may listen on the same port.
        """
        if api_implementation.Type() != "upb":
            raise RuntimeError(f"protobuf runs on {api_implementation.Type()!r}; 'upb' is needed for speed and safety")
        self._listener = listener
        self._draining = Draining()
        self._server = grpc.aio.server(
            interceptors=[Boundary(authorise, self._draining)],
            maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS,
            options=[
                ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", int(share_port)),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 15_000),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.http2.max_ping_strikes", 3),
                ("grpc.max_metadata_size", 16 * 1024),
            ],
        )
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._health_names = ["", *(service.full_name for service in services)]
        self._stopping = False

    async def start(self, ports: Iterable[int] = ()) -> int:
        """Bind, serve, and return the port.

        Args:
            ports: Tried in turn. None: the listener's own.

        Raises:
            RuntimeError: No port can be bound.
            OSError: A file cannot be read.
        """
        port = self._bind(list(ports) or [self._listener.port])
        await self._server.start()
        await self.set_serving(True)
        logger.info("%s listens on %s", type(self).__name__, host_port(self._listener.host, port))
        return port

    async def set_serving(self, serving: bool) -> None:
        """Say through ``grpc.health.v1`` whether calls are welcome."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._health_names:
            await self._health.set(name, status)

    async def stop(self, grace_s: float = DRAIN_S) -> None:
        """Take no new calls, let those in progress finish, then end. More than once does nothing more.

        Streams read no further: they answer what they have read and end with UNAVAILABLE, so that callers send the rest
        elsewhere.
        """
        if self._stopping:
            return
        self._stopping = True
        await self._health.enter_graceful_shutdown()
        self._draining.begin()
        await self._server.stop(grace_s)

    def _bind(self, ports: Sequence[int]) -> int:
        credentials = self._credentials()
        for port in ports:
            address = host_port(self._listener.host, port)
            try:
                if credentials is None:
                    bound = self._server.add_insecure_port(address)
                else:
                    bound = self._server.add_secure_port(address, credentials)
            except RuntimeError:  # newer gRPC raises, older returns 0
                continue
            if bound:
                return int(bound)
        tried = str(ports[0]) if len(ports) == 1 else f"{ports[0]} to {ports[-1]}"
        raise RuntimeError(f"cannot listen on {host_port(self._listener.host, tried)}")

    def _credentials(self) -> grpc.ServerCredentials | None:
        cert, key = self._listener.tls_cert, self._listener.tls_key
        if not cert or not key:
            return None
        client_ca = Path(self._listener.tls_client_ca).read_bytes() if self._listener.tls_client_ca else None
        return grpc.ssl_server_credentials(
            [(Path(key).read_bytes(), Path(cert).read_bytes())],
            root_certificates=client_ca,
            require_client_auth=client_ca is not None,
        )
