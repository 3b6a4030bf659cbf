"""Timers over a manual clock: they fire when the clock is moved past them, and at no other time."""

import heapq
import itertools

from trunkline_worker.store.clock import ManualClock


class _Timer:
    def __init__(self, callback):
        self.callback = callback

    def cancel(self):
        self.callback = None


class ManualTimers:
    """Give ``later`` to whoever orders calls, and move the clock with ``advance``."""

    def __init__(self, clock: ManualClock):
        self.clock = clock
        self._due = []
        self._count = itertools.count()

    def later(self, delay_s, callback):
        timer = _Timer(callback)
        heapq.heappush(self._due, (self.clock.monotonic() + delay_s, next(self._count), timer))
        return timer

    def next_s(self):
        """Seconds until the next timer; None if there is none."""
        while self._due and self._due[0][2].callback is None:
            heapq.heappop(self._due)
        return self._due[0][0] - self.clock.monotonic() if self._due else None

    def advance(self, seconds):
        """Move the clock, and fire what became due, in order."""
        end = self.clock.monotonic() + seconds
        while (left := self.next_s()) is not None and self.clock.monotonic() + left <= end:
            self.clock.advance(max(left, 0.0))
            heapq.heappop(self._due)[2].callback()
        self.clock.advance(end - self.clock.monotonic())
