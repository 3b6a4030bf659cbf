"""A bound on what all callers together keep in a gateway's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trunkline_wire.errors import ErrorCode, WireError

MAX_HELD_BYTES = 2**30
"""Bytes of requests that a gateway replica works on at a time."""

RETRY_DELAY_S = 0.5


class ByteBudget:
    """Counts the bytes of requests in progress. Used from one event loop."""

    def __init__(self, limit: int = MAX_HELD_BYTES) -> None:
        """Start with nothing held."""
        self.limit = limit
        self._held = 0

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Hold a request's bytes while it is worked on.

        Raises:
            WireError: OVERLOADED where the budget is used up; nothing of the request has been worked on.
        """
        if self._held + num_bytes > self.limit:
            raise WireError(
                ErrorCode.OVERLOADED, "the gateway's memory is in use; try again", retry_delay_s=RETRY_DELAY_S
            )
        self._held += num_bytes
        try:
            yield
        finally:
            self._held -= num_bytes
