"""How long a batch that could run now should wait for more rows: mostly not at all.

A device that is busy needs no waiting: what arrives while it computes is in the next batch, so batches grow with the
load by themselves, up to what the load needs. On an idle device a wait delays everybody and, where rows come
independently of each other, gains nothing: a batch that runs at once is over sooner, and its successor is larger.

One case is different: callers who send their next rows once they have the answer to their last. When a batch of 64 of
them ends, the first one is back some 100 us later. Run at once, its row makes a batch alone; the other 63 make the
next one, and one row is left over again: two batches for the work of one. Waiting the millisecond until they are back
saves the fixed cost of a batch. So two things are learnt, of each group of rows by itself:

- what a batch costs: a fixed part and one per row, by least squares over the latest batches. The fixed part is
  taken from the lower end of what they allow, so that noise does not look like it. Where batches bring nothing, as
  on a CPU that is busy with a single row, it is 0 and nothing ever waits;
- how many of the rows of a batch are followed by others soon after its end, and how soon. Where callers do not come
  back, or only after a pause, nothing waits.

Where most come back in time, n rows that are here wait for k that are expected within s seconds exactly if
n * s < k * fixed cost, that is, if the wait costs less, in rows times seconds, than the batch that is saved. That is
asked again with each arrival; the wait
is over at the latest when the fixed cost, ``MAX_WAIT_S`` or the time in which rows usually come back has passed since
the last batch ended.
"""

from __future__ import annotations

import math

MAX_WAIT_S = 0.005
"""Longest wait after the end of a batch, in seconds."""

TIMER_S = 0.001
"""What the event loop's timers may be late, in seconds: waits that pay for less are not worth one."""

_FORGET = 0.97
"""Weight of the batches before, with each new one: about the last thirty count."""

_MIN_WEIGHT = 8.0
"""Batches that must be known before anything waits."""

_MIN_SPREAD = 0.1
"""Sizes must differ by this, relative to their mean, to tell a fixed cost from one per row."""

_WORTH = 0.25
"""A fixed cost of less than this, relative to a row's own, is not worth a wait."""

_MOST = 0.75
"""Share of the rows that must usually come back in time. Where fewer do, the others make a batch of their own in any
case, and none is saved."""

_TRY_EVERY = 16
"""Where all batches are of one size, one in so many waits all the same, to find out what a larger one costs. Two
callers who always just miss each other would never share a batch otherwise."""

_SMOOTHING = 0.3


class BatchCost:
    """What a batch costs: ``fixed_s`` seconds, and ``row_s`` for each row. Both 0 as long as it is not ``known``."""

    __slots__ = ("_n", "_nn", "_nt", "_t", "_tt", "_weight", "fixed_s", "known", "row_s")

    def __init__(self) -> None:
        """Start without knowledge."""
        self.known = False
        self.fixed_s = 0.0
        self.row_s = 0.0
        self._weight = self._n = self._t = self._nn = self._nt = self._tt = 0.0

    def add(self, num_rows: int, seconds: float) -> None:
        """Learn from a batch."""
        self._weight = _FORGET * self._weight + 1.0
        self._n = _FORGET * self._n + num_rows
        self._t = _FORGET * self._t + seconds
        self._nn = _FORGET * self._nn + num_rows * num_rows
        self._nt = _FORGET * self._nt + num_rows * seconds
        self._tt = _FORGET * self._tt + seconds * seconds
        if self._weight >= _MIN_WEIGHT:
            self._fit()

    def seconds(self, num_rows: int) -> float:
        """Return what a batch of so many rows is expected to take."""
        return self.fixed_s + num_rows * self.row_s

    def guess_s(self) -> float:
        """Return the fixed cost, or, where all batches were alike, half of what they took."""
        if self.known or self._weight < _MIN_WEIGHT:
            return self.fixed_s
        return 0.5 * self._t / self._weight

    def _fit(self) -> None:
        weight = self._weight
        mean_n, mean_t = self._n / weight, self._t / weight
        var_n = self._nn / weight - mean_n * mean_n
        if var_n < (_MIN_SPREAD * mean_n) ** 2:
            return  # batches are all alike: what is known stays
        cov = self._nt / weight - mean_n * mean_t
        slope = cov / var_n
        var_t = max(self._tt / weight - mean_t * mean_t - slope * cov, 0.0)
        error = math.sqrt(var_t / (weight - 2.0) * (1.0 + mean_n * mean_n / var_n))
        self.known = True
        self.row_s = max(slope, 0.0)
        self.fixed_s = min(max(mean_t - slope * mean_n - 2.0 * error, 0.0), mean_t)


class Pace:
    """Decides for one group of rows. All times are readings of one monotonic clock, in seconds.

    Attributes:
        cost: What batches cost.
        returning: Share of the rows of a batch that are followed by others soon after its end, from 0 to 1.
        return_s: How long after that end the last of these come.
    """

    __slots__ = (
        "_answered",
        "_arrived",
        "_back",
        "_ended",
        "_gone",
        "_last_s",
        "_until_try",
        "cost",
        "return_s",
        "returning",
    )

    def __init__(self) -> None:
        """Start without knowledge: nothing waits."""
        self.cost = BatchCost()
        self.returning = 0.0
        self.return_s = 0.0
        self._until_try = _TRY_EVERY
        self._ended = -math.inf
        self._answered = 0
        self._arrived = 0
        self._last_s = 0.0
        self._back = self._gone = 0.0

    def arrived(self, num_rows: int, now: float) -> None:
        """Note that rows came."""
        if self._answered:
            since = now - self._ended
            if since <= self._horizon():
                self._arrived += num_rows
                self._last_s = since
            else:
                self._learn()

    def ended(self, num_rows: int, seconds: float, now: float) -> None:
        """Note that a batch ended, and what it cost."""
        if self._answered:
            self._learn()
        self.cost.add(num_rows, seconds)
        self._until_try = (self._until_try or _TRY_EVERY) - 1
        self._ended, self._answered, self._arrived, self._last_s = now, num_rows, 0, 0.0

    def wait_s(self, num_rows: int, room: int, now: float, deadline: float | None = None) -> float:
        """Return how long to wait for more rows; 0: run. Ask again with each arrival.

        Args:
            num_rows: That wait.
            room: Most rows in a batch.
            now: The clock.
            deadline: The earliest of those that wait: they must still have the time to run.
        """
        if not self._answered or num_rows >= room or self.returning < _MOST:
            return 0.0
        fixed_s = self.cost.guess_s()
        if fixed_s < _WORTH * self.cost.row_s or (self._until_try and not self.cost.known):
            return 0.0
        # Half as much again as they usually need, since the last of them is not always as quick.
        left_s = self._ended + min(1.5 * self.return_s, self._horizon()) - now
        expected = min(self.returning * self._answered - self._arrived, room - num_rows)
        if left_s <= 0.0 or expected < 0.5 or num_rows * max(left_s, TIMER_S) >= expected * fixed_s:
            return 0.0
        if deadline is not None and now + left_s + self.cost.seconds(room) >= deadline:
            return 0.0
        return left_s

    def _horizon(self) -> float:
        return min(self.cost.guess_s(), MAX_WAIT_S)

    def _learn(self) -> None:
        """Take the end of a batch as past, and keep what it taught."""
        if self._horizon() > 0.0:
            self._gone = (1.0 - _SMOOTHING) * self._gone + self._answered
            self._back = (1.0 - _SMOOTHING) * self._back + min(self._arrived, self._answered)
            self.returning = self._back / self._gone
            if self._arrived:
                self.return_s += _SMOOTHING * (self._last_s - self.return_s)
        self._answered = 0
