"""Which rows are held out, which fold a row is in, which rows stand for all: seeded, and even over the classes.

Where rows are grouped, no group is split.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trunkline_worker.training.grouped import deal_groups, hold_out_groups

# Shape suffix legend: N = rows

Indices = npt.NDArray[np.int64]

HOLD_OUT, FOLDS, SUBSAMPLE, WEIGHTS, BATCHES, TRUST = range(6)
"""Purposes of random numbers: each has a stream of its own, so that a change in one leaves the others alone."""


def random_stream(seed: int, purpose: int) -> np.random.Generator:
    """Return the stream of random numbers of one purpose. ``seed`` may be any 64-bit number."""
    return np.random.default_rng([seed % 2**64, purpose])


def hold_out(
    classes_N: Indices | None,
    num_rows: int,
    fraction: float,
    random: np.random.Generator,
    groups_N: Indices | None = None,
) -> tuple[Indices, Indices]:
    """Split rows into those to train on and those to measure with, both ascending.

    Every class keeps at least one row on each side; with groups on that to train on, and on the other where they allow.

    Args:
        classes_N: Class of each row, or None for regression.
        num_rows: N.
        fraction: Of the rows to measure with. 0: none.
        random: Where the choice is drawn from.
        groups_N: Group of each row. None: each row is its own.
    """
    everything = np.arange(num_rows, dtype=np.int64)
    if fraction <= 0:
        return everything, everything[:0]
    if groups_N is not None:
        is_held_N = hold_out_groups(classes_N, groups_N, fraction, random)
        return everything[~is_held_N], everything[is_held_N]
    groups = [everything] if classes_N is None else _groups(classes_N)
    held = []
    for group in groups:
        count = min(max(1, round(fraction * len(group))), len(group) - 1)
        held.append(random.permutation(group)[:count])
    validation = np.sort(np.concatenate(held))
    return np.setdiff1d(everything, validation), validation


def keep_both(
    targets_NK: npt.NDArray[np.floating], training: Indices, validation: Indices, groups_N: Indices | None = None
) -> tuple[Indices, Indices]:
    """Move rows to the training side until every label has a row with it and one without it there.

    Groups move as a whole.

    Args:
        targets_NK: 0 and 1.
        training: Rows to train on, ascending.
        validation: Rows to measure with, ascending.
        groups_N: Group of each row. None: each row is its own.
    """
    is_held_N = np.zeros(len(targets_NK), dtype=bool)
    is_held_N[validation] = True
    positive_NK = targets_NK > 0
    # Moving rows only ever adds to the training side, so a label that is fine stays fine.
    for has in (positive_NK, ~positive_NK):
        for label in np.flatnonzero(~has[training].any(axis=0)):
            if not (has[:, label] & ~is_held_N).any():
                moved = np.flatnonzero(has[:, label])[:1]
                is_held_N[moved if groups_N is None else np.isin(groups_N, groups_N[moved])] = False
    return np.flatnonzero(~is_held_N).astype(np.int64), np.flatnonzero(is_held_N).astype(np.int64)


def folds(
    classes_N: Indices | None,
    num_rows: int,
    num_folds: int,
    random: np.random.Generator,
    groups_N: Indices | None = None,
) -> Indices:
    """Return the fold of each row: folds of equal size, and each class spread over as many as it has rows.

    With groups as nearly so as they allow; there must be as many groups as folds.
    """
    if groups_N is not None:
        return deal_groups(classes_N, groups_N, num_folds, random)
    everything = np.arange(num_rows, dtype=np.int64)
    groups = [everything] if classes_N is None else _groups(classes_N)
    # Dealt like cards, on from class to class, so that rare classes do not all end up in the first folds.
    order = np.concatenate([random.permutation(group) for group in groups])
    fold_N = np.empty(num_rows, dtype=np.int64)
    fold_N[order] = np.arange(num_rows) % num_folds
    return fold_N


def subsample(
    classes_N: Indices | None,
    num_rows: int,
    max_rows: int,
    max_classes: int,
    random: np.random.Generator,
    groups_N: Indices | None = None,
) -> Indices:
    """Return at most ``max_rows`` rows of at most ``max_classes`` classes, ascending, the classes' shares kept.

    Every class chosen keeps at least two rows where it has them. Where there are more classes than wanted, those of a
    single row go last: nothing can be compared by them.

    With groups, rows are drawn as they are without, so that as many groups as can be take part; of each class two at
    least, where it has them. What is drawn of a group still belongs together.
    """
    if classes_N is None:
        drawn = random.permutation(num_rows)
        return np.sort(_two_groups_first(drawn, groups_N)[:max_rows]).astype(np.int64)
    groups = _groups(classes_N)
    if len(groups) > max_classes:
        drawn = random.permutation(len(groups))
        single = np.array([len(groups[one]) == 1 for one in drawn])
        groups = [groups[one] for one in np.sort(drawn[np.argsort(single, kind="stable")][:max_classes])]
    total = sum(len(group) for group in groups)
    share = min(1.0, max_rows / total)
    kept = [
        _two_groups_first(random.permutation(group), groups_N)[: max(2, int(share * len(group)))] for group in groups
    ]
    return np.sort(np.concatenate(kept))


def _two_groups_first(rows: Indices, groups_N: Indices | None) -> Indices:
    """Return rows so that the first two are of different groups, where there are any."""
    if groups_N is None:
        return rows
    other = np.flatnonzero(groups_N[rows] != groups_N[rows[0]])[:1]
    return np.concatenate([rows[:1], rows[other], np.delete(rows[1:], other - 1)])


def num_groups(groups_N: Indices | None, num_rows: int) -> int:
    """Return how many groups there are; where rows are not grouped, how many rows."""
    return num_rows if groups_N is None else len(np.unique(groups_N))


def _groups(classes_N: Indices) -> list[Indices]:
    """Return the rows of each class that has any."""
    order = np.argsort(classes_N, kind="stable").astype(np.int64)
    bounds = np.flatnonzero(np.diff(classes_N[order])) + 1
    return np.split(order, bounds)
