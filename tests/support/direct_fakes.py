"""A gateway and replicas that listen themselves, without Ray: one event loop, engines that compute on pixels."""

import asyncio

import serving_fakes as fakes
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.tickets import PROOF_METADATA, TICKET_METADATA, make_proof
from trunkline_worker.serving.addresses import Place
from trunkline_worker.serving.direct import DirectConfig, DirectEndpoint, EndpointBackends
from trunkline_worker.serving.endpoints import Directory, EndpointBook
from trunkline_worker.serving.server import Listener
from trunkline_worker.store.clock import SystemClock

NODE = "this-node"


class LocalDirectory:
    """``DirectoryClient`` over a directory in this process. ``away`` is what a controller under restart looks like."""

    def __init__(self, clock=None):
        self.clock = clock or SystemClock()
        self.directory = Directory(clock=self.clock)
        self.away = False
        self.announced = asyncio.Event()

    def restart(self):
        """Forget everything, the secret too."""
        self.directory = Directory(clock=self.clock)
        self.announced.clear()

    async def announce(self, announcement, *, timeout_s):
        self._check()
        secret = self.directory.announce(announcement)
        self.announced.set()
        return secret

    async def withdraw(self, replica, *, timeout_s):
        self._check()
        self.directory.withdraw(replica)

    async def list(self, backbone, *, timeout_s):
        self._check()
        return self.directory.list(backbone)

    def _check(self):
        if self.away:
            raise WireError(ErrorCode.UNAVAILABLE, "the controller is away", retry_delay_s=1.0)


class DirectCluster(fakes.GatewayThread):
    """A gateway that knows of endpoints. Start replicas with ``replica``."""

    def __init__(self, folder, backbones=("fake",), **listener):
        self.clock = SystemClock()
        self.directory = LocalDirectory(self.clock)
        self.replicas = []
        self.listener = Listener(**{"port": 0, **listener})
        self.book = EndpointBook(self.directory, clock=self.clock, node=NODE, needs_tls=self.listener.is_tls)
        super().__init__(folder, backbones, endpoints=self.book, **listener)

    def replica(self, name="r1", backbone="fake", *, host="127.0.0.1", ports=(), clock=None, engines=None, **listener):
        """Start a replica and wait until it is announced. Returns the endpoint."""
        config = DirectConfig(Listener(**listener) if listener else self.listener, ports=ports)
        backends = EndpointBackends(engines or {backbone: self.engines[backbone]}, self.metadata, self.blobs)

        async def start():
            endpoint = DirectEndpoint(
                config,
                backbone,
                backends,
                self.directory,
                place=Place(host, host),
                replica=name,
                node=NODE,
                clock=clock or self.clock,
            )
            self.directory.announced.clear()
            self.replicas.append(endpoint)
            endpoint.address = await endpoint.start()
            await self.directory.announced.wait()
            await asyncio.sleep(0)  # the secret is learnt right after
            return endpoint

        return self.run(start())

    def close(self):
        for one in self.replicas:
            self.run(one.close(2.0))
        super().close()


class Caller:
    """Makes the metadata of calls to one replica: a ticket and proofs."""

    def __init__(self, endpoints, replica=None, number=0):
        self.ticket, self.key = endpoints.ticket, endpoints.key
        self.replica = replica or endpoints.endpoints[0].replica
        self.number = number

    def metadata(self, method, number=None):
        """Return what goes with one call of a method, ``Service/Method``."""
        if number is None:
            self.number += 1
            number = self.number
        full = f"/trunkline_wire.v1.{method}"
        return (
            (TICKET_METADATA, self.ticket),
            (PROOF_METADATA, make_proof(self.key, self.ticket, self.replica, full, number)),
        )
