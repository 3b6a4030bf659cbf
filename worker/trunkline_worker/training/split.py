"""Which rows are held out, which fold a row is in, which rows stand for all: seeded, and even over the classes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Shape suffix legend: N = rows

Indices = npt.NDArray[np.int64]

HOLD_OUT, FOLDS, SUBSAMPLE, WEIGHTS, BATCHES, TRUST = range(6)
"""Purposes of random numbers: each has a stream of its own, so that a change in one leaves the others alone."""


def random_stream(seed: int, purpose: int) -> np.random.Generator:
    """Return the stream of random numbers of one purpose. ``seed`` may be any 64-bit number."""
    return np.random.default_rng([seed % 2**64, purpose])


def hold_out(
    classes_N: Indices | None, num_rows: int, fraction: float, random: np.random.Generator
) -> tuple[Indices, Indices]:
    """Split rows into those to train on and those to measure with, both ascending.

    Every class keeps at least one row on each side.

    Args:
        classes_N: Class of each row, or None for regression.
        num_rows: N.
        fraction: Of the rows to measure with. 0: none.
        random: Where the choice is drawn from.
    """
    everything = np.arange(num_rows, dtype=np.int64)
    if fraction <= 0:
        return everything, everything[:0]
    groups = [everything] if classes_N is None else _groups(classes_N)
    held = []
    for group in groups:
        count = min(max(1, round(fraction * len(group))), len(group) - 1)
        held.append(random.permutation(group)[:count])
    validation = np.sort(np.concatenate(held))
    return np.setdiff1d(everything, validation), validation


def keep_both(targets_NK: npt.NDArray[np.floating], training: Indices, validation: Indices) -> tuple[Indices, Indices]:
    """Move rows to the training side until every label has a row with it and one without it there.

    Args:
        targets_NK: 0 and 1.
        training: Rows to train on, ascending.
        validation: Rows to measure with, ascending.
    """
    is_held_N = np.zeros(len(targets_NK), dtype=bool)
    is_held_N[validation] = True
    positive_NK = targets_NK > 0
    # Moving rows only ever adds to the training side, so a label that is fine stays fine.
    for has in (positive_NK, ~positive_NK):
        for label in np.flatnonzero(~has[training].any(axis=0)):
            if not (has[:, label] & ~is_held_N).any():
                is_held_N[np.flatnonzero(has[:, label])[:1]] = False
    return np.flatnonzero(~is_held_N).astype(np.int64), np.flatnonzero(is_held_N).astype(np.int64)


def folds(classes_N: Indices | None, num_rows: int, num_folds: int, random: np.random.Generator) -> Indices:
    """Return the fold of each row: folds of equal size, and each class spread over as many as it has rows."""
    everything = np.arange(num_rows, dtype=np.int64)
    groups = [everything] if classes_N is None else _groups(classes_N)
    # Dealt like cards, on from class to class, so that rare classes do not all end up in the first folds.
    order = np.concatenate([random.permutation(group) for group in groups])
    fold_N = np.empty(num_rows, dtype=np.int64)
    fold_N[order] = np.arange(num_rows) % num_folds
    return fold_N


def subsample(
    classes_N: Indices | None, num_rows: int, max_rows: int, max_classes: int, random: np.random.Generator
) -> Indices:
    """Return at most ``max_rows`` rows of at most ``max_classes`` classes, ascending, the classes' shares kept.

    Every class chosen keeps at least two rows where it has them. Where there are more classes than wanted, those of a
    single row go last: nothing can be compared by them.
    """
    if classes_N is None:
        return np.sort(random.permutation(num_rows)[:max_rows]).astype(np.int64)
    groups = _groups(classes_N)
    if len(groups) > max_classes:
        drawn = random.permutation(len(groups))
        single = np.array([len(groups[one]) == 1 for one in drawn])
        groups = [groups[one] for one in np.sort(drawn[np.argsort(single, kind="stable")][:max_classes])]
    total = sum(len(group) for group in groups)
    share = min(1.0, max_rows / total)
    kept = [random.permutation(group)[: max(2, int(share * len(group)))] for group in groups]
    return np.sort(np.concatenate(kept))


def _groups(classes_N: Indices) -> list[Indices]:
    """Return the rows of each class that has any."""
    order = np.argsort(classes_N, kind="stable").astype(np.int64)
    bounds = np.flatnonzero(np.diff(classes_N[order])) + 1
    return np.split(order, bounds)
