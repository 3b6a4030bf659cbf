"""From numbers to places in a drawing, with ticks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from trunkline._report.text import number

_ROUND = (1.0, 2.0, 5.0, 10.0)
_MOST_TICKS = 6
_NARROWEST = 1e-9
"""Spans below this share of the numbers themselves are not resolved."""

_LARGEST = 1e250
"""Beyond it, and below its inverse, numbers have no place of their own: their differences would not be finite."""

LOG_SPAN = 100.0
"""From this ratio of the largest to the smallest on, numbers are better seen on a logarithmic scale."""


@dataclass(frozen=True)
class Tick:
    """A round number of a scale, and the text beside it."""

    value: float
    text: str


@dataclass(frozen=True)
class Scale:
    """The numbers along one side of a drawing, from its first tick to its last one."""

    ticks: tuple[Tick, ...]
    is_log: bool = False

    @property
    def low(self) -> float:
        """Where it starts."""
        return self.ticks[0].value

    @property
    def high(self) -> float:
        """Where it ends."""
        return self.ticks[-1].value

    def share(self, value: float) -> float:
        """Return how far along a number lies: 0 to 1."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / (high - low)


def scale_of(values: Iterable[float], *, is_log: bool = False, whole: bool = False) -> Scale:
    """Return a scale on which all of these numbers lie.

    Args:
        values: Finite numbers; above 0 for a logarithmic scale.
        is_log: Whether it is one.
        whole: Whether only whole numbers make sense.
    """
    found = [min(max(float(one), -_LARGEST), _LARGEST) for one in values] or [0.0]
    low, high = min(found), max(found)
    if is_log:
        return _log_scale(max(low, 1 / _LARGEST), max(high, 1 / _LARGEST))
    return _linear_scale(low, high, whole)


def unit_scale() -> Scale:
    """Return the scale of shares and probabilities."""
    return Scale(tuple(Tick(one / 5, f"{one / 5:.1f}") for one in range(6)))


def percent_scale() -> Scale:
    """Return the scale of shares in per cent."""
    return Scale(tuple(Tick(20.0 * one, f"{20 * one}") for one in range(6)))


def _linear_scale(low: float, high: float, whole: bool) -> Scale:
    if high - low <= max(_NARROWEST * max(abs(low), abs(high)), 1 / _LARGEST):
        pad = 0.1 * abs(low) or 1.0
        low, high = low - pad, high + pad
    step = _step((high - low) / (_MOST_TICKS - 1))
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + _NARROWEST), math.ceil(high / step - _NARROWEST)
    if first == last:
        last += 1
    values = [one * step for one in range(first, last + 1)]
    return Scale(tuple(Tick(one, _tick_text(one, step, max(abs(values[0]), abs(values[-1])))) for one in values))


def _step(least: float) -> float:
    """Return the smallest round number that is no less."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in _ROUND if factor * power >= least * (1 - _NARROWEST))


def _tick_text(value: float, step: float, largest: float) -> str:
    if step >= 1e-5 and largest < 1e7:
        places = max(0, -math.floor(math.log10(step) + _NARROWEST))
        return f"{value + 0.0:,.{places}f}"
    digits = 1 + max(0, math.floor(math.log10(largest)) - math.floor(math.log10(step) + _NARROWEST))
    return number(value, digits)


def _log_scale(low: float, high: float) -> Scale:
    first, last = math.floor(math.log10(low) + _NARROWEST), math.ceil(math.log10(high) - _NARROWEST)
    stride = math.ceil(max(1, last - first) / _MOST_TICKS)
    last = first + stride * math.ceil(max(1, last - first) / stride)
    powers = range(first, last + 1, stride)
    return Scale(tuple(Tick(10.0**one, number(10.0**one)) for one in powers), is_log=True)
