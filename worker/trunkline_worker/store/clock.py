"""The clock, passed in wherever time matters, so that a test can hold it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where time comes from."""

    def now(self) -> float:
        """Return seconds since the epoch. What is written down; may jump when the machine's clock is set."""

    def monotonic(self) -> float:
        """Return seconds since some fixed moment of this process. Never goes back."""


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        """Return seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Return the machine's monotonic reading, in seconds."""
        return time.monotonic()


class ManualClock:
    """A clock that stands still until it is told to move."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        """Start at ``now`` seconds since the epoch."""
        self._now = now
        self._monotonic = 0.0

    def now(self) -> float:
        """Return seconds since the epoch."""
        return self._now

    def monotonic(self) -> float:
        """Return the seconds by which the clock was advanced."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let time pass.

        Raises:
            ValueError: If ``seconds`` is negative.
        """
        if seconds < 0:
            raise ValueError(f"time cannot go back by {-seconds} s; use set_wall for a clock that was set")
        self._now += seconds
        self._monotonic += seconds

    def set_wall(self, now: float) -> None:
        """Set the wall clock, as an operator or NTP would; the monotonic reading stays."""
        self._now = now
