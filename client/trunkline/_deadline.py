"""One deadline over all the calls and retries of an operation, and the pauses between tries."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from trunkline.errors import DeadlineExceededError

FIRST_DELAY_S = 0.1
"""Longest pause before the first repetition."""

LONGEST_DELAY_S = 5.0
"""Longest pause between two tries."""

BASE_TIMEOUT_S = 60.0
"""Deadline of an operation on many rows that states none: this much ..."""

ROW_TIMEOUT_S = 0.25
"""... and this much a row."""


class Deadline:
    """A moment on the monotonic clock, or never."""

    def __init__(self, timeout_s: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Start counting.

        Args:
            timeout_s: Seconds from now. None: no deadline.
            clock: Monotonic clock.
        """
        self.timeout_s = timeout_s
        self._clock = clock
        self._end = None if timeout_s is None else clock() + timeout_s

    def remaining(self) -> float | None:
        """Return the seconds left, 0 at least; None without a deadline."""
        return None if self._end is None else max(0.0, self._end - self._clock())

    def check(self, what: str = "") -> float | None:
        """Return the seconds left.

        Raises:
            DeadlineExceededError: None are left. No call is made then.
        """
        left = self.remaining()
        if left == 0.0:
            during = f" during {what}" if what else ""
            raise DeadlineExceededError(f"the {self.timeout_s:g} s allowed are over{during}")
        return left

    def allows(self, delay_s: float) -> bool:
        """Whether there is time for a pause and something after it."""
        left = self.remaining()
        return left is None or delay_s < left


def rows_deadline(timeout_s: float | None, num_rows: int) -> Deadline:
    """Return the deadline of an operation on many rows."""
    return Deadline(BASE_TIMEOUT_S + ROW_TIMEOUT_S * num_rows if timeout_s is None else timeout_s)


def retry_delay(attempt: int, asked_s: float = 0.0, *, random_float: Callable[[], float] = random.random) -> float:
    """Return how long to wait before a repetition, in seconds, with jitter.

    Args:
        attempt: How many tries have failed, from 1.
        asked_s: What the cluster asked for: never less than this.
        random_float: Draws from 0 to 1.
    """
    ceiling = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(max(attempt - 1, 0), 10))
    return asked_s + ceiling * (0.5 + 0.5 * random_float())
