"""Which slices of the embedding to train on: sets worth trying, and two rounds of scoring them.

Source: Evci et al. 2022, "Head2Toe: Utilizing Intermediate Representations for Better Transfer Learning", for the idea
of choosing from every depth instead of the last layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import Tensor
from trunkline_wire.specs import SliceSpec

from trunkline_worker.training.scoring import Candidate, score_sets, slice_kernels

# Shape suffix legend: N = rows, D = columns, M = outputs

MAX_ROWS = 256
MAX_CLASSES = 64
MAX_TARGETS = 64
"""What stands for the whole in the selection. Its cost grows with the cube of the rows."""

_TIE = 1e-3
"""Scores are rounded to this, far below their noise, before they are compared: the narrower of two equals wins."""

_NUM_EXTENDED = 2
"""Candidates that the second round extends by one more slice each."""

_KIND = re.compile(r"(?P<tap>.+)[./:_](?P<kind>mean|std|grid)\d*")


def candidate_sets(slices: Sequence[SliceSpec]) -> list[tuple[str, ...]]:
    """Return the sets of the first round, without repeats, each in the embedding's order.

    Each slice alone; per tap what it has (mean and std, all three); neighbouring taps' grids, or means where a tap has
    no grid, by two and three; all of one kind; all means and stds; everything.
    """
    order = [one.name for one in slices]
    kinds: dict[str, list[str]] = {"mean": [], "std": [], "grid": []}
    taps: dict[str, dict[str, str]] = {}
    for name in order:
        match = _KIND.fullmatch(name)
        if match is not None:
            kinds[match["kind"]].append(name)
            taps.setdefault(match["tap"], {})[match["kind"]] = name
    sets: list[list[str]] = [[name] for name in order]
    for tap in taps.values():
        sets.append([tap[kind] for kind in ("mean", "std") if kind in tap])
        sets.append(list(tap.values()))
    finest = [tap.get("grid") or tap.get("mean") or tap["std"] for tap in taps.values()]
    sets += [finest[start : start + size] for size in (2, 3) for start in range(len(finest) - size + 1)]
    sets += [kinds["mean"], kinds["std"], kinds["grid"], kinds["mean"] + kinds["std"], order]
    return _distinct(sets, order)


def extended_sets(ranked: Sequence[Candidate], slices: Sequence[SliceSpec]) -> list[tuple[str, ...]]:
    """Return the sets of the second round: the best two and three single slices and grids, and the best ones extended.

    Args:
        ranked: The first round, best first.
        slices: All slices.
    """
    order = [one.name for one in slices]
    singles = [one.slices[0] for one in ranked if len(one.slices) == 1]
    grids = [name for name in singles if (match := _KIND.fullmatch(name)) and match["kind"] == "grid"]
    sets = [names[:size] for names in (singles, grids) for size in (2, 3)]
    for candidate in ranked[:_NUM_EXTENDED]:
        sets += [[*candidate.slices, name] for name in order if name not in candidate.slices]
    known = {one.slices for one in ranked}
    return [one for one in _distinct(sets, order) if one not in known]


def _distinct(sets: Sequence[Sequence[str]], order: Sequence[str]) -> list[tuple[str, ...]]:
    result = dict.fromkeys(tuple(name for name in order if name in one) for one in sets)
    return [one for one in result if one]


def select_slices(
    x_ND: Tensor,
    slices: Sequence[SliceSpec],
    task: str,
    truth: Tensor,
    *,
    groups_N: Tensor | None = None,
    counted_N: Tensor | None = None,
    check: Callable[[float], None],
) -> list[Candidate]:
    """Score sets of slices; the best comes first.

    Args:
        x_ND: Raw embedding of the rows that stand for all.
        slices: Which columns are which.
        task: ``classification`` or ``regression``.
        truth: Class indices, (N,), counted from 0 without gaps; or targets, (N, M).
        groups_N: As for ``score_sets``.
        counted_N: Likewise.
        check: Called with the fraction done; may raise to stop.
    """
    kernels = slice_kernels(x_ND, slices)
    widths = {one.name: one.width for one in slices}

    def score(sets: Sequence[tuple[str, ...]], start: float, stop: float) -> list[Candidate]:
        return score_sets(
            *(sets, kernels, widths, task, truth),
            groups_N=groups_N,
            counted_N=counted_N,
            check=lambda done: check(start + (stop - start) * done),
        )

    ranked = _rank(score(candidate_sets(slices), 0.0, 0.6))
    second = extended_sets(ranked, slices)
    return _rank([*ranked, *score(second, 0.6, 1.0)] if second else ranked)


def _rank(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Sort best first; scores that are equal after rounding by width, then as they came."""
    return sorted(candidates, key=lambda one: (-round(one.score / _TIE), one.width))
