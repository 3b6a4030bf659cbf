"""A backbone's replica that listens itself: the servicers of the gateway over the engine in this process. No Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from trunkline_wire.bulk_rpc import add_inference_servicer
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.v1 import inference_pb2, trunk_pb2, trunk_pb2_grpc

from trunkline_worker.engine.api import Engine
from trunkline_worker.serving.addresses import Place, host_port
from trunkline_worker.serving.auth import Authorise
from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.budget import ByteBudget
from trunkline_worker.serving.endpoints import ANNOUNCE_S, Announcement, DirectoryClient
from trunkline_worker.serving.server import DRAIN_S, Listener, WireServer
from trunkline_worker.serving.servicers.inference import InferenceServicer
from trunkline_worker.serving.servicers.trunk import TrunkServicer
from trunkline_worker.serving.tickets import TicketGate, WallClock

logger = logging.getLogger(__name__)

SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    trunk_pb2.DESCRIPTOR.services_by_name["TrunkService"],
)
"""Descriptors of the services that a replica answers itself."""

ANNOUNCE_TIMEOUT_S = 2.0
"""How long one sign of life may take, in seconds."""


@dataclass(frozen=True)
class DirectConfig:
    """How replicas listen.

    Attributes:
        gateway: The gateway's host, certificates and rules, which are the replicas' too. Its port and tokens are not.
        host: What the operator says of the address; may be empty.
        ports: Tried in turn; none for any that is free.
        tls_name: The name in the certificate; empty for the first one that stands there.
    """

    gateway: Listener
    host: str = ""
    ports: tuple[int, ...] = ()
    tls_name: str = ""


@dataclass(frozen=True)
class EndpointBackends(Backends):
    """What the servicers of a replica stand on."""

    def engine(self, name: str) -> Engine:
        """Return the engine of a backbone.

        Raises:
            WireError: UNAVAILABLE for one that this replica was not told of; the gateway knows whether there is one.
        """
        if name not in self.engines:
            raise WireError(
                ErrorCode.UNAVAILABLE,
                f"backbone {name[:80]!r} is not reached from this replica of {self.default_backbone}; go through the "
                "gateway",
            )
        return super().engine(name)


class EndpointServer(WireServer):
    """The gRPC server of a backbone's replica."""

    def __init__(
        self, listener: Listener, backends: Backends, authorise: Authorise, *, budget: ByteBudget | None = None
    ) -> None:
        """Build the server; ``start`` binds it.

        Raises:
            ValueError: The listener is not safe.
            OSError: A file cannot be read.
        """
        listener.check_transport()
        super().__init__(listener, authorise, SERVICES, share_port=False)
        budget = budget or ByteBudget()
        add_inference_servicer(InferenceServicer(backends, budget), self._server)
        trunk_pb2_grpc.add_TrunkServiceServicer_to_server(TrunkServicer(backends, budget), self._server)


class Announcer:
    """Gives the directory signs of life, and learns its secret. Used from one event loop."""

    def __init__(
        self,
        directory: DirectoryClient,
        announcement: Announcement,
        learn: Callable[[bytes], None],
        *,
        interval_s: float = ANNOUNCE_S,
    ) -> None:
        """Keep what to say; ``start`` begins.

        Args:
            directory: Is told.
            announcement: What.
            learn: Is called with the secret each time.
            interval_s: Pause between two signs of life, in seconds.
        """
        self._directory = directory
        self._announcement = announcement
        self._learn = learn
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None
        self._is_away = False

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.ensure_future(self._forever())

    async def close(self) -> None:
        """Withdraw; a directory that is away forgets by itself."""
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None
        with contextlib.suppress(WireError, TimeoutError):
            async with asyncio.timeout(ANNOUNCE_TIMEOUT_S):
                await self._directory.withdraw(self._announcement.replica, timeout_s=ANNOUNCE_TIMEOUT_S)

    async def _forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(ANNOUNCE_TIMEOUT_S):
                    self._learn(await self._directory.announce(self._announcement, timeout_s=ANNOUNCE_TIMEOUT_S))
                self._is_away = False
            except (WireError, TimeoutError) as error:
                if not self._is_away:
                    logger.warning("the directory of endpoints is away: %s", error)
                self._is_away = True
            except Exception:
                logger.exception("signs of life go on after an error")
            await asyncio.sleep(self._interval_s)


class DirectEndpoint:
    """A replica's own address: server, tickets, signs of life."""

    def __init__(
        self,
        config: DirectConfig,
        backbone: str,
        backends: Backends,
        directory: DirectoryClient,
        *,
        place: Place,
        replica: str,
        node: str,
        clock: WallClock,
    ) -> None:
        """Prepare; ``start`` begins.

        Args:
            config: How to listen.
            backbone: Of this replica.
            backends: What the servicers stand on.
            directory: Where the replica is announced.
            place: Where to listen.
            replica: Random; tells starts apart.
            node: The machine, as Ray names it.
            clock: Tickets expire by it.

        Raises:
            ValueError: The listener is not safe.
            OSError: A file cannot be read.
        """
        listener = replace(config.gateway, host=place.host, port=0)
        self._ports = config.ports
        self._place = place
        self._gate = TicketGate(backbone, replica, clock=clock)
        self._server = EndpointServer(listener, backends, self._gate)
        self._directory = directory
        name = ""
        if listener.tls_cert:
            name = config.tls_name or certificate_name(Path(listener.tls_cert).read_bytes())
        self._announcement = Announcement(backbone, "", replica, node, listener.is_tls, name)
        self._announcer: Announcer | None = None

    async def start(self) -> str:
        """Listen, tell the directory, and return the address.

        Raises:
            RuntimeError: No port can be bound.
        """
        port = await self._server.start(self._ports)
        announcement = replace(self._announcement, address=host_port(self._place.announced, port))
        self._announcer = Announcer(self._directory, announcement, self._gate.learn)
        self._announcer.start()
        return announcement.address

    async def close(self, grace_s: float = DRAIN_S) -> None:
        """Withdraw, then drain and end."""
        if self._announcer is not None:
            await self._announcer.close()
        await self._server.stop(grace_s)


async def open_endpoint(make: Callable[[], DirectEndpoint]) -> DirectEndpoint | None:
    """Start an endpoint. Where that cannot be, say why in the log; all calls go through the gateway then."""
    try:
        endpoint = make()
        address = await endpoint.start()
    except Exception as error:  # whatever it is: callers can go through the gateway
        logger.warning("this replica does not listen itself, all calls go through the gateway: %s", error)
        return None
    logger.info("this replica listens on %s", address)
    return endpoint


def certificate_name(pem: bytes) -> str:
    """Return the first DNS name in a certificate, or an empty text: then it is checked against the address.

    Raises:
        ValueError: It is no certificate.
    """
    from cryptography import x509

    certificate = x509.load_pem_x509_certificates(pem)[0]
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ""
    found = names.get_values_for_type(x509.DNSName)
    return found[0].replace("*", "replica", 1) if found else ""  # any name that the wildcard covers
