"""How long each measurement may take, so that a run ends in time; and who comes when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

_PREPARE_S = 50.0
_START_S = 5.0
_RESTART_S = 15.0
_CLUSTER_S = 34.0
_DRAIN_S = 1.0
_VISIT_S = 0.7
"""What things other than measuring take on two cores, in seconds: rough, they only share out what is left."""

_CLOSED_PART = 0.6
_LEAST_S = 0.6


@dataclass(frozen=True)
class Plan:
    """Seconds of one closed loop, before its last answers are waited for, and of one open loop."""

    closed_s: float
    open_s: float


def make_plan(
    minutes: float,
    *,
    rounds: int,
    num_contestants: int,
    num_loads: int,
    num_resting: int,
    num_restarting: int,
    num_open: int,
) -> Plan:
    """Share out the time of a run.

    Args:
        minutes: That the run may take. Less than it needs: every measurement is as short as it can be.
        rounds: Visits to each contestant.
        num_contestants: Contestants.
        num_loads: Closed loops of a visit.
        num_resting: Servers that are started once.
        num_restarting: Servers that are started in every round.
        num_open: Open loops of the whole run.
    """
    visits = rounds * num_contestants
    fixed_s = _PREPARE_S + _START_S * num_resting + rounds * (_RESTART_S * num_restarting + _CLUSTER_S)
    left_s = max(0.0, 60 * minutes - fixed_s - visits * _VISIT_S)
    part = _CLOSED_PART if num_open else 1.0
    closed_s = part * left_s / max(1, visits * num_loads) - _DRAIN_S
    open_s = (1 - part) * left_s / max(1, num_open) - _DRAIN_S / 2
    return Plan(max(_LEAST_S, closed_s), max(_LEAST_S, open_s))


def rotated(items: Sequence[T], steps: int) -> list[T]:
    """Return the items with so many of the first ones put behind the others."""
    steps %= max(1, len(items))
    return [*items[steps:], *items[:steps]]


def order(blocks: Sequence[T], round_number: int, rounds: int, last: T) -> list[T]:
    """Return who comes when in a round: in turn, from another one on each time; in the last round one comes last.

    By then the rates of all others are known, at which that one is measured too.
    """
    step = round_number * max(1, len(blocks) // max(1, rounds))
    turn = rotated(blocks, step)
    if round_number == rounds - 1:
        turn = [*(one for one in turn if one is not last), last]
    return turn
