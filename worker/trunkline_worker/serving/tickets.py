"""Tickets: what the gateway gives a caller for a backbone's endpoints, and how an endpoint checks them.

A ticket says for whom, for which backbone and until when, under a MAC that gateways and endpoints can make. With every
call comes a proof that the ticket is the caller's: see ``trunkline_wire.tickets``. No Ray and no gRPC in here.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.tickets import PROOF_METADATA, TICKET_METADATA, read_proof

from trunkline_worker.serving.auth import NOBODY, Principal, Role, check_role, role_for

VALID_S = 60.0
"""How long a ticket is valid, in seconds. Then the caller must show its token again."""

LEEWAY_S = 5.0
"""How much longer an endpoint takes it, in seconds: clocks of two nodes are never quite the same."""

WINDOW = 4096
"""Calls arrive out of order. A number that lies further behind the highest than this is refused."""

CAPACITY = 10_000
"""Most tickets that an endpoint remembers, of about a kilobyte each. One is forgotten once it has expired."""

SECRET_BYTES = 32

_VERSION = 1
_HEAD = struct.Struct(">BBdHH")  # version, role, expiry, bytes of the tenant's and of the backbone's name
_ID_BYTES = 16
_MAC_BYTES = 32
_MIN_BYTES = _HEAD.size + _ID_BYTES + _MAC_BYTES
_MASK = (1 << WINDOW) - 1


class WallClock(Protocol):
    """The part of a clock that is needed here."""

    def now(self) -> float:
        """Return seconds since the epoch."""


@dataclass(frozen=True)
class Ticket:
    """What a ticket says. ``expiry`` is in seconds since the epoch."""

    principal: Principal
    backbone: str
    expiry: float


def make_ticket(secret: bytes, ticket: Ticket, *, new_id: Callable[[int], bytes]) -> bytes:
    """Return a ticket's bytes.

    Args:
        secret: Of the cluster.
        ticket: What it says.
        new_id: Returns so many random bytes, such as ``secrets.token_bytes``.
    """
    tenant, backbone = ticket.principal.tenant.encode(), ticket.backbone.encode()
    head = _HEAD.pack(_VERSION, ticket.principal.role, ticket.expiry, len(tenant), len(backbone))
    body = head + tenant + backbone + new_id(_ID_BYTES)
    return body + _mac(secret, body)


def holder_key(secret: bytes, ticket: bytes) -> bytes:
    """Return the key of a ticket, which its holder makes proofs with."""
    return hmac.digest(secret, b"holder-v1" + ticket, hashlib.sha256)


def read_ticket(secret: bytes, data: bytes) -> Ticket | None:
    """Return what a ticket says, or None for one that was not made with this secret. Says nothing of its expiry."""
    if len(data) < _MIN_BYTES or not hmac.compare_digest(data[-_MAC_BYTES:], _mac(secret, data[:-_MAC_BYTES])):
        return None
    # From here on it is one of ours.
    version, role, expiry, tenant_bytes, backbone_bytes = _HEAD.unpack_from(data)
    if version != _VERSION:
        return None
    names = data[_HEAD.size : -_ID_BYTES - _MAC_BYTES]
    tenant, backbone = names[:tenant_bytes].decode(), names[tenant_bytes : tenant_bytes + backbone_bytes].decode()
    return Ticket(Principal(tenant, Role(role)), backbone, expiry)


class Numbers:
    """The numbers that were used with a ticket, in a window below the highest."""

    __slots__ = ("_bits", "_highest")

    def __init__(self) -> None:
        """Start with none."""
        self._highest = 0
        self._bits = 0  # bit n: the number n below the highest was used

    def use(self, number: int) -> bool:
        """Return whether a number is new, and note that it is not any more."""
        ahead = number - self._highest
        if ahead > 0:
            self._bits = ((self._bits << ahead) & _MASK if ahead < WINDOW else 0) | 1
            self._highest = number
            return True
        if -ahead >= WINDOW or self._bits >> -ahead & 1:
            return False
        self._bits |= 1 << -ahead
        return True


@dataclass(slots=True)
class _Known:
    ticket: Ticket
    key: bytes
    numbers: Numbers


class TicketGate:
    """Lets callers of one replica in by their tickets. An ``Authorise``; used from one event loop."""

    def __init__(self, backbone: str, replica: str, *, clock: WallClock, capacity: int = CAPACITY) -> None:
        """Let nobody in until a secret is learnt.

        Args:
            backbone: Of this replica.
            replica: What it is called, as the gateway tells callers.
            clock: Tickets expire by it.
            capacity: Most tickets that are remembered.
        """
        self._backbone = backbone
        self._replica = replica
        self._clock = clock
        self._capacity = capacity
        self._secrets: tuple[bytes, ...] = ()
        self._known: OrderedDict[bytes, _Known] = OrderedDict()

    def __len__(self) -> int:
        """Return how many tickets are remembered."""
        return len(self._known)

    def learn(self, secret: bytes) -> None:
        """Take tickets of this secret, and still of the one before: a controller that starts again has a new one."""
        if secret not in self._secrets:
            self._secrets = (secret, *self._secrets[:1])

    def __call__(self, method: str, metadata: Mapping[str, str | bytes]) -> Principal:
        """Return who is calling, if they may.

        Raises:
            WireError: UNAUTHENTICATED, PERMISSION_DENIED; UNSUPPORTED for a method that is not there; UNAVAILABLE if
                no more tickets can be remembered.
        """
        needed = role_for(method)
        if needed is Role.ANYONE:
            return NOBODY
        data, proof = metadata.get(TICKET_METADATA), metadata.get(PROOF_METADATA)
        if not isinstance(data, bytes) or not isinstance(proof, bytes):
            raise _refused("a ticket and a proof are needed here; the gateway gives them: CatalogService/GetEndpoints")
        now = self._clock.now()
        known = self._known.get(data) or self._read(data)
        if now > known.ticket.expiry + LEEWAY_S:
            raise _refused("the ticket has expired; get another one from the gateway")
        number = read_proof(known.key, data, self._replica, method, proof)
        if number is None:
            raise _refused("the proof is not one of this ticket for this replica and method")
        check_role(known.ticket.principal, needed)
        # Remembered only now: whoever has seen a ticket, but not its key, must not be able to fill the memory.
        if data not in self._known:
            self._remember(data, known, now)
        if not known.numbers.use(number):
            raise _refused(f"number {number} was used with this ticket before, or is too far behind; count on")
        return known.ticket.principal

    def _read(self, data: bytes) -> _Known:
        for secret in self._secrets:
            ticket = read_ticket(secret, data)
            if ticket is None:
                continue
            if ticket.backbone != self._backbone:
                raise _refused(f"the ticket is for {ticket.backbone!r}, this is {self._backbone!r}; get one for it")
            return _Known(ticket, holder_key(secret, data), Numbers())
        raise _refused("the ticket is none of this cluster's now; get another one from the gateway")

    def _remember(self, data: bytes, known: _Known, now: float) -> None:
        # They were given out one after another, so the first ones expire first, but for clocks that differ.
        while self._known and now > next(iter(self._known.values())).ticket.expiry + LEEWAY_S:
            self._known.popitem(last=False)
        if len(self._known) >= self._capacity:
            for old in [one for one, other in self._known.items() if now > other.ticket.expiry + LEEWAY_S]:
                del self._known[old]
        if len(self._known) >= self._capacity:
            raise WireError(ErrorCode.UNAVAILABLE, "too many callers at this replica; go through the gateway")
        self._known[data] = known


def _refused(message: str) -> WireError:
    return WireError(ErrorCode.UNAUTHENTICATED, message)


def _mac(secret: bytes, body: bytes) -> bytes:
    return hmac.digest(secret, b"ticket-v1" + body, hashlib.sha256)
