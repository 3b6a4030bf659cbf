"""One replica that listens itself: the channel to it, and what is shown with every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import grpc
from trunkline_wire.errors import REQUEST_ID_METADATA
from trunkline_wire.specs import Endpoint
from trunkline_wire.tickets import PROOF_METADATA, TICKET_METADATA, make_proof

Metadata = tuple[tuple[str, str | bytes], ...]

_HEALTH_CHECK = "/grpc.health.v1.Health/Check"


class Replica:
    """A channel to a replica, and the ticket that lets its holder in there.

    Attributes:
        endpoint: Where it listens, and which start of it that is.
        is_connected: Whether it was reached.
        is_shut: Whether it has refused the ticket that it was shown last.
        outstanding: Rows without an answer. Guarded by the pool.
        num_calls: Calls and streams under way. Guarded by the pool.
    """

    def __init__(
        self, endpoint: Endpoint, channel: grpc.Channel, numbers: Iterator[int], shown: tuple[bytes, bytes]
    ) -> None:
        """Keep the channel; ``connect`` starts it.

        Args:
            endpoint: Where it leads.
            channel: Not connected yet.
            numbers: For proofs. Grows for as long as this process knows of the replica, whatever the ticket.
            shown: The first ticket to be shown, and its key.
        """
        self.endpoint = endpoint
        self.is_connected = False
        self.is_shut = False
        self.outstanding = 0
        self.num_calls = 0
        self._channel = channel
        self._numbers = numbers
        self._shown = shown
        self._stubs: dict[type[Any], Any] = {}

    @property
    def ticket(self) -> bytes:
        """The ticket that is shown now."""
        return self._shown[0]

    def renew(self, ticket: bytes, key: bytes) -> None:
        """Show another ticket from now on."""
        self._shown = (ticket, key)
        self.is_shut = False

    def connect(self, timeout_s: float, on_outcome: Callable[[Replica, str], None]) -> None:
        """Connect, ask for its health, and tell how that went: why it cannot be used, or nothing. In gRPC's thread.

        Not by watching the channel: a thread that waits inside gRPC for as long as the channel is open would keep
        gRPC from preparing a fork, and children would crash.
        """
        check = self._channel.unary_unary(_HEALTH_CHECK)
        call = check.future(b"", timeout=timeout_s)
        call.add_done_callback(lambda done: on_outcome(self, self._why_not(done)))

    def _why_not(self, call: Any) -> str:
        code, address = call.code(), self.endpoint.address
        # HealthCheckResponse {status = 1 (varint)}; SERVING is 1. Whoever does not know the question is there, too.
        if code is grpc.StatusCode.UNIMPLEMENTED or (code is grpc.StatusCode.OK and call.result()[:2] == b"\x08\x01"):
            return ""
        if code is grpc.StatusCode.OK:
            return f"{address} takes no calls now"
        return f"no connection to {address}: {(call.details() or code.name).rsplit('last error: ', 1)[-1]}"

    def close(self) -> None:
        """Close the channel. What is under way on it ends."""
        self._channel.close()

    def method(self, stub: type[Any], method: str) -> Any:
        """Return a method of a service there."""
        made = self._stubs.get(stub)
        if made is None:
            made = self._stubs[stub] = stub(self._channel)
        return getattr(made, method)

    def show(self, stub: type[Any], method: str, request_id: str) -> tuple[bytes, Metadata]:
        """Return what is shown with one call or stream: the ticket, and the metadata with it.

        A proof is good for one call alone, so this is asked for every one.
        """
        ticket, key = self._shown
        proof = make_proof(key, ticket, self.endpoint.replica, _full_name(stub.__name__, method), next(self._numbers))
        return ticket, ((REQUEST_ID_METADATA, request_id), (TICKET_METADATA, ticket), (PROOF_METADATA, proof))


@lru_cache(maxsize=64)
def _full_name(stub: str, method: str) -> str:
    return f"/trunkline_wire.v1.{stub.removesuffix('Stub')}/{method}"
