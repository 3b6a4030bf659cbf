"""Tells the streams of a server that it is about to end. No gRPC in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trunkline_wire.errors import ErrorCode, WireError


class Draining:
    """Whether a server is about to end. Used from one event loop."""

    def __init__(self) -> None:
        """Start with a server that goes on."""
        self._begun = False
        self._calls: dict[object, Callable[[], object]] = {}

    @property
    def begun(self) -> bool:
        """Whether the server is about to end."""
        return self._begun

    def begin(self) -> None:
        """Tell everyone who watches. More than once does nothing more."""
        if self._begun:
            return
        self._begun = True
        for call in list(self._calls.values()):
            call()

    @contextmanager
    def watched(self, call: Callable[[], object]) -> Iterator[None]:
        """Have something called when the server is about to end, or at once if it is already."""
        if self._begun:
            call()
        key = object()
        self._calls[key] = call
        try:
            yield
        finally:
            del self._calls[key]


def ending() -> WireError:
    """Return what a stream ends with whose server is about to end: all that was read has been answered."""
    return WireError(
        ErrorCode.UNAVAILABLE, "this server is about to end; send again elsewhere what it has not answered"
    )
