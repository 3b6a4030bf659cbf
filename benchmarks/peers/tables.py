"""The report: what was measured as Markdown tables. Pure: records in, text out."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from contestants import LOADS, SHARES, Contestant

NONE = "-"

QUIET_CORES = 0.1
"""What other processes may use. Eager torch suffers most: its threads wait for one another spinning."""


@dataclass(frozen=True)
class Closed:
    """One closed loop, as it was seen. Times in seconds; ``others`` is the cores that other processes kept busy."""

    contestant: str
    load: str
    rows_per_s: float
    p50_s: float
    p99_s: float
    rows: int
    failures: dict[str, int]
    server_cpu_s: float
    client_cpu_s: float
    others: float


@dataclass(frozen=True)
class Open:
    """One open loop.

    ``peer`` is whose best rate the load is a share of; ``contestant`` is who was measured: that peer, or Trunkline.
    """

    peer: str
    share: float
    rate: float
    contestant: str
    calls: int
    p50_s: float
    p99_s: float
    failures: dict[str, int]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return median, least and most; one value alone stands alone."""
    if not values:
        return NONE
    median = number(statistics.median(values), digits)
    return median if len(values) == 1 else f"{median} ({number(min(values), digits)} to {number(max(values), digits)})"


def number(value: float, digits: int = 0) -> str:
    """Return a number with so many decimals; an endless one, a call without an answer, in words."""
    return "failed" if math.isinf(value) else f"{value:.{digits}f}"


def disturbance(records: Sequence[Closed]) -> str:
    """Say how busy other processes kept the machine, and whether the figures are worth anything then."""
    if not records:
        return "Nothing was measured."
    median, most = statistics.median(each.others for each in records), max(each.others for each in records)
    verdict = "" if median <= QUIET_CORES else " **Not a quiet machine: do not quote these figures.**"
    return f"While somebody was measured others kept {median:.2f} cores busy (median; at most {most:.2f}).{verdict}"


def rates(records: Iterable[Closed]) -> dict[tuple[str, str], list[float]]:
    """Return rows a second of every round, by contestant and load."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for one in records:
        found[one.contestant, one.load].append(one.rows_per_s)
    return dict(found)


def best_rate(records: Iterable[Closed], contestant: str) -> float:
    """Return the highest of a contestant's median rates with one row a call; 0 if there is none."""
    single = {load.name for load in LOADS if load.rows_per_call == 1}
    found = rates(one for one in records if one.contestant == contestant and one.load in single)
    return max((statistics.median(values) for values in found.values()), default=0.0)


def rate_table(field: Sequence[Contestant], records: Sequence[Closed], status: Mapping[str, str]) -> str:
    """Return rows a second, a row for each contestant."""
    found = rates(records)
    rows = [["contestant", "", *(load.name for load in LOADS), "failed calls"]]
    for one in field:
        failures = sum((Counter(each.failures) for each in records if each.contestant == one.id), Counter())
        cells = [spread(found.get((one.id, load.name), [])) for load in LOADS]
        rows.append([one.label, one.variant, *cells, "see below" if status.get(one.id) else _failed(failures)])
    return markdown(rows)


def latency_table(field: Sequence[Contestant], records: Sequence[Closed]) -> str:
    """Return the medians over the rounds of p50 and p99 in milliseconds, one row a call."""
    single = [load for load in LOADS if load.rows_per_call == 1]
    rows = [["contestant", "", *(f"{load.name}: p50 / p99 ms" for load in single)]]
    for one in field:
        cells = []
        for load in single:
            seen = [each for each in records if each.contestant == one.id and each.load == load.name]
            cells.append(_both(seen))
        if any(cell != NONE for cell in cells):
            rows.append([one.label, one.variant, *cells])
    return markdown(rows)


def ratio_table(field: Sequence[Contestant], records: Sequence[Closed]) -> str:
    """Return how many times as many rows Trunkline answers: one number for each of its ways in."""
    found = rates(records)
    ours = [one for one in field if one.is_ours and any((one.id, load.name) in found for load in LOADS)]
    header = " / ".join(one.variant.partition(",")[0] for one in ours)
    rows = [["contestant", "", *(f"{load.name}: {header}" for load in LOADS)]]
    for one in field:
        if one.is_ours or not any((one.id, load.name) in found for load in LOADS):
            continue
        cells = []
        for load in LOADS:
            theirs = statistics.median(found.get((one.id, load.name), [math.nan]))
            cells.append(" / ".join(_ratio(found.get((each.id, load.name), []), theirs) for each in ours))
        rows.append([one.label, one.variant, *cells])
    return markdown(rows)


def cpu_table(field: Sequence[Contestant], records: Sequence[Closed]) -> str:
    """Return CPU milliseconds for a row, of the server and of the load generator, at each load."""
    rows = [["contestant", "", *(f"{load.name}: server / caller" for load in LOADS)]]
    for one in field:
        cells = []
        for load in LOADS:
            seen = [each for each in records if each.contestant == one.id and each.load == load.name and each.rows]
            cells.append(
                f"{_per_row(seen, lambda each: each.server_cpu_s)} / {_per_row(seen, lambda each: each.client_cpu_s)}"
                if seen
                else NONE
            )
        if any(cell != NONE for cell in cells):
            rows.append([one.label, one.variant, *cells])
    return markdown(rows)


def open_table(field: Sequence[Contestant], records: Sequence[Open]) -> str:
    """Return latencies at equal offered load: each peer at shares of its own best rate, and Trunkline at the same."""
    ours = [one for one in field if one.is_ours and any(each.contestant == one.id for each in records)]
    header = ["contestant", "", "offered rows/s", "theirs: p50 / p99 ms"]
    rows = [[*header, *(f"{one.label}, {one.variant.partition(',')[0]}: p50 / p99 ms" for one in ours), "failed calls"]]
    for one in field:
        for share in SHARES:
            seen = [each for each in records if each.peer == one.id and each.share == share]
            if not seen:
                continue
            offered = f"{seen[0].rate:.1f} ({share:.0%})"
            cells = [
                _both([each for each in seen if each.contestant == who]) for who in (one.id, *(x.id for x in ours))
            ]
            rows.append([one.label, one.variant, offered, *cells, _open_failures(seen)])
    return markdown(rows)


def _open_failures(seen: Sequence[Open]) -> str:
    parts = []
    for who in dict.fromkeys(each.contestant for each in seen):
        failures = sum((Counter(each.failures) for each in seen if each.contestant == who), Counter())
        if failures:
            calls = sum(each.calls for each in seen if each.contestant == who)
            parts.append(f"{who}: {_failed(failures)} of {calls}")
    return "; ".join(parts) or "0"


def _failed(failures: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in failures.most_common()) or "0"


def _both(seen: Sequence[Any]) -> str:
    if not seen:
        return NONE
    p50, p99 = (statistics.median(getattr(each, name) for each in seen) * 1000 for name in ("p50_s", "p99_s"))
    return f"{number(p50)} / {number(p99)}"


def _ratio(ours: Sequence[float], theirs: float) -> str:
    if not ours or math.isnan(theirs):
        return NONE
    return "endless" if theirs == 0 else f"{statistics.median(ours) / theirs:.2f}"


def _per_row(seen: Sequence[Closed], of: Callable[[Closed], float]) -> str:
    return f"{statistics.median(of(each) / each.rows for each in seen) * 1000:.1f}"
