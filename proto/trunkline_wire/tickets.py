"""What a caller shows to a replica in place of a token: a ticket, and with every call a proof that it is theirs.

The gateway gives out both, the ticket and its key. A call carries the ticket, a number that grows, and a MAC of the two
under the key; so whoever sees a call go by can neither repeat it nor make another one.
"""

from __future__ import annotations

import hmac

TICKET_METADATA = "trunkline-ticket-bin"
"""Metadata of a call to an endpoint: the ticket as the gateway gave it."""

PROOF_METADATA = "trunkline-proof-bin"
"""Metadata of a call to an endpoint: see ``make_proof``."""

_NUMBER_BYTES = 8
_MAC_BYTES = 16


def make_proof(key: bytes, ticket: bytes, replica: str, method: str, number: int) -> bytes:
    """Return the proof of one call.

    Args:
        key: The ticket's, from the gateway.
        ticket: The ticket.
        replica: ``Endpoint.replica`` of the one that is called.
        method: Full name, ``/package.Service/Method``.
        number: Never used before with this ticket and replica; from 1 on.
    """
    return number.to_bytes(_NUMBER_BYTES, "big") + _mac(key, ticket, replica, method, number)


def read_proof(key: bytes, ticket: bytes, replica: str, method: str, proof: bytes) -> int | None:
    """Return the number in a proof, or None for one that is not right. Compares in constant time."""
    if len(proof) != _NUMBER_BYTES + _MAC_BYTES:
        return None
    number = int.from_bytes(proof[:_NUMBER_BYTES], "big")
    right = hmac.compare_digest(proof[_NUMBER_BYTES:], _mac(key, ticket, replica, method, number))
    return number if right and number > 0 else None


def _mac(key: bytes, ticket: bytes, replica: str, method: str, number: int) -> bytes:
    parts = (b"call-v1", ticket, replica.encode(), method.encode(), number.to_bytes(_NUMBER_BYTES, "big"))
    text = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.digest(key, text, "sha256")[:_MAC_BYTES]
