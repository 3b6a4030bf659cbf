"""Which replicas listen themselves: the directory in the controller, and what gateways tell callers. No Ray here."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from trunkline_wire.hosts import is_loopback
from trunkline_wire.specs import Endpoint, Endpoints

from trunkline_worker.serving.auth import Principal
from trunkline_worker.serving.tickets import SECRET_BYTES, VALID_S, Ticket, holder_key, make_ticket
from trunkline_worker.store.clock import Clock

logger = logging.getLogger(__name__)

ANNOUNCE_S = 2.0
"""How often a replica gives a sign of life, in seconds."""

FORGET_S = 6.0
"""How long after its last sign of life a replica is forgotten, in seconds."""

LIST_TTL_S = 1.0
"""How long a gateway keeps what the directory said, in seconds."""

LIST_TIMEOUT_S = 1.0
"""How long a gateway waits for the directory, in seconds. Without an answer its callers go through the gateway."""


@dataclass(frozen=True)
class Announcement:
    """What a replica says of itself.

    Attributes:
        backbone: Which it holds.
        address: ``host:port`` where it listens.
        replica: Random; tells its starts apart.
        node: The machine, as Ray names it.
        tls: Whether it speaks TLS.
        tls_name: The name in its certificate, where that is not its address.
    """

    backbone: str
    address: str
    replica: str
    node: str = ""
    tls: bool = False
    tls_name: str = ""


@dataclass(frozen=True)
class Listing:
    """The replicas of a backbone that are alive, and the secret that their tickets are made with."""

    announcements: tuple[Announcement, ...]
    secret: bytes = field(repr=False)


class DirectoryClient(Protocol):
    """The way to the directory, wherever it is."""

    async def announce(self, announcement: Announcement, *, timeout_s: float) -> bytes:
        """Give a sign of life, and return the secret that tickets are made with.

        Raises:
            WireError: UNAVAILABLE.
        """

    async def withdraw(self, replica: str, *, timeout_s: float) -> None:
        """Take a replica out, for good.

        Raises:
            WireError: UNAVAILABLE.
        """

    async def list(self, backbone: str, *, timeout_s: float) -> Listing:
        """Return the replicas of a backbone.

        Raises:
            WireError: UNAVAILABLE.
        """


class Directory:
    """Who listens, in memory only: after a restart replicas announce themselves again, and get a new secret.

    Whoever is listed has been given the secret, so a ticket made with it is known to all of them.
    """

    def __init__(self, *, clock: Clock, secret: bytes | None = None) -> None:
        """Start empty, with a random secret unless one is given."""
        self._clock = clock
        self._secret = secret or secrets.token_bytes(SECRET_BYTES)
        self._heard: dict[str, tuple[float, Announcement]] = {}
        self._withdrawn: dict[str, float] = {}

    def announce(self, announcement: Announcement) -> bytes:
        """Note a sign of life, and return the secret."""
        self._forget()
        # One that was sent before the replica withdrew may arrive after it.
        if announcement.replica not in self._withdrawn:
            self._heard[announcement.replica] = (self._clock.monotonic(), announcement)
        return self._secret

    def withdraw(self, replica: str) -> None:
        """Take a replica out, for good."""
        self._forget()
        self._heard.pop(replica, None)
        self._withdrawn[replica] = self._clock.monotonic()

    def list(self, backbone: str) -> Listing:
        """Return the replicas of a backbone."""
        self._forget()
        return Listing(tuple(one for _, one in self._heard.values() if one.backbone == backbone), self._secret)

    def _forget(self) -> None:
        before = self._clock.monotonic() - FORGET_S
        self._heard = {name: heard for name, heard in self._heard.items() if heard[0] > before}
        self._withdrawn = {name: when for name, when in self._withdrawn.items() if when > before}


class EndpointBook:
    """What a gateway tells callers of endpoints. Used from one event loop."""

    def __init__(
        self,
        directory: DirectoryClient,
        *,
        clock: Clock,
        node: str = "",
        is_local: bool = True,
        needs_tls: bool = False,
        new_id: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """Start without knowing any.

        Args:
            directory: Is asked for them.
            clock: Tickets expire by it.
            node: The gateway's machine, as Ray names it.
            is_local: Whether all callers are on that machine: then, and only then, they reach replicas on its loopback.
            needs_tls: Whether replicas without TLS are kept from callers, who came with it.
            new_id: Returns so many random bytes.
        """
        self._directory = directory
        self._clock = clock
        self._node = node
        self._is_local = is_local
        self._needs_tls = needs_tls
        self._new_id = new_id
        self._known: dict[str, tuple[float, Listing]] = {}
        self._asking: dict[str, asyncio.Task[Listing | None]] = {}

    async def endpoints(self, backbone: str, principal: Principal) -> Endpoints:
        """Return a backbone's endpoints, with a ticket of the caller's. None, without an error, while nobody knows."""
        listing = await self._listing(backbone)
        if listing is None:
            return Endpoints()
        found = _alike([one for one in listing.announcements if self._is_fit(one)])
        if not found:
            return Endpoints()
        ticket = Ticket(principal, backbone, self._clock.now() + VALID_S)
        data = make_ticket(listing.secret, ticket, new_id=self._new_id)
        return Endpoints(
            endpoints=tuple(Endpoint(one.address, one.replica) for one in found),
            ticket=data,
            key=holder_key(listing.secret, data),
            valid_s=VALID_S,
            tls=found[0].tls,
            tls_name=found[0].tls_name,
        )

    def _is_fit(self, one: Announcement) -> bool:
        if self._needs_tls and not one.tls:
            return False
        return not is_loopback(one.address.rpartition(":")[0]) or (self._is_local and one.node == self._node)

    async def _listing(self, backbone: str) -> Listing | None:
        known = self._known.get(backbone)
        if known is not None and self._clock.monotonic() - known[0] < LIST_TTL_S:
            return known[1]
        task = self._asking.get(backbone)
        if task is None:  # whoever comes while it is asked waits for the same answer
            task = self._asking[backbone] = asyncio.ensure_future(self._ask(backbone))
            task.add_done_callback(lambda _: self._asking.pop(backbone, None))
        return await asyncio.shield(task)

    async def _ask(self, backbone: str) -> Listing | None:
        try:
            async with asyncio.timeout(LIST_TIMEOUT_S):
                listing = await self._directory.list(backbone, timeout_s=LIST_TIMEOUT_S)
        except Exception as error:  # whatever it is: callers can go through the gateway
            logger.warning("the directory of endpoints is away: %s: %s", type(error).__name__, error)
            # It starts again empty. What it said last is right until a replica would have been forgotten.
            known = self._known.get(backbone)
            return known[1] if known is not None and self._clock.monotonic() - known[0] < FORGET_S else None
        self._known[backbone] = (self._clock.monotonic(), listing)
        return listing


def _alike(announcements: list[Announcement]) -> list[Announcement]:
    """Return the most that speak TLS or not under one name: while settings change, not all of them do."""
    groups: dict[tuple[bool, str], list[Announcement]] = defaultdict(list)
    for one in announcements:
        groups[one.tls, one.tls_name].append(one)
    return max(groups.values(), key=len, default=[])
