"""The pictures of the report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import plots
from contestants import AS_DOCUMENTED, LOADS, Contestant
from tables import Closed, Open, rates

_LOAD = next(load for load in LOADS if load.callers == 64)


def draw(
    folder: Path, name: str, field: Sequence[Contestant], closed: Sequence[Closed], opened: Sequence[Open]
) -> None:
    """Draw rows a second as bars, and the 99th percentile over the offered load."""
    found = rates(closed)
    bars = [
        plots.Bar(f"{one.label}, {one.variant}", statistics.median(found[one.id, _LOAD.name]), one.is_ours)
        for one in field
        if (one.id, _LOAD.name) in found
    ]
    if bars:
        plots.bars(folder / f"{name}_rows.svg", f"Rows a second, {_LOAD.name}, one row a call", bars)
    series = _series(field, opened)
    if series:
        plots.scatter(
            folder / f"{name}_latency.svg",
            "99th percentile of latency at equal offered load",
            "offered rows a second (log)",
            "p99, milliseconds",
            series,
        )


def _series(field: Sequence[Contestant], opened: Sequence[Open]) -> list[plots.Series]:
    """Return a line for each peer as documented, and one for Trunkline at all the rates; failed calls have no point."""
    series = []
    for one in field:
        if not one.is_ours and one.variant != AS_DOCUMENTED:
            continue
        seen = sorted((each.rate, 1000 * each.p99_s) for each in opened if each.contestant == one.id)
        points = [(rate, p99, "") for rate, p99 in seen if not math.isinf(p99)]
        if points:
            label = f"{one.label}, {one.variant.partition(',')[0]}" if one.is_ours else one.label
            series.append(plots.Series(label, points, named=False))
    return series
