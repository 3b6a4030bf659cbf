"""Splits that keep groups whole: what is held out, and folds, both as even over the classes as the groups allow.

scikit-learn's StratifiedGroupKFold deals folds alike, but only so many equal ones: it holds out no chosen fraction, and
nothing in it keeps the last group of a class for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Shape suffix legend: N = rows, G = groups, K = classes

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Counts:
    """How many rows of each class the groups have.

    Attributes:
        of_group: For each group its classes, and the rows of each.
        sizes_G: Rows of each group.
        rows_K: Rows of each class.
        groups_K: Groups of each class.
    """

    of_group: Sequence[Sequence[tuple[int, int]]]
    sizes_G: Indices
    rows_K: Indices
    groups_K: Indices

    @classmethod
    def of(cls, classes_N: Indices | None, dense_N: Indices) -> _Counts:
        classes_N = np.zeros_like(dense_N) if classes_N is None else np.unique(classes_N, return_inverse=True)[1]
        num_groups, num_classes = int(dense_N.max()) + 1, int(classes_N.max()) + 1
        pairs, counts = np.unique(dense_N * num_classes + classes_N, return_counts=True)
        of_group: list[list[tuple[int, int]]] = [[] for _ in range(num_groups)]
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            of_group[pair // num_classes].append((pair % num_classes, count))
        return cls(
            of_group,
            np.bincount(dense_N),
            np.bincount(classes_N),
            np.bincount(pairs % num_classes, minlength=num_classes),
        )


def hold_out_groups(
    classes_N: Indices | None, groups_N: npt.NDArray[np.integer], fraction: float, random: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Return which rows are held out, whole groups of them.

    Groups come in random order, and one is held out where that brings the held-out rows of each class closer to the
    fraction. A group that is the last of a class to train on never is. Classes of which nothing is held out then get
    their smallest group held out, where that may be; so does the whole, where all groups are too large.

    Args:
        classes_N: Class of each row. None: there are none.
        groups_N: Group of each row, two at least.
        fraction: Of the rows to hold out.
        random: Where the order is drawn from.
    """
    _, dense_N = np.unique(groups_N, return_inverse=True)
    counts = _Counts.of(classes_N, dense_N)
    left_K = counts.groups_K.tolist()
    wanted = [max(1.0, fraction * one) for one in counts.rows_K.tolist()]
    held = [0] * len(wanted)
    is_held_G = np.zeros(len(counts.of_group), dtype=bool)

    def may_go(group: int) -> bool:
        return all(left_K[one] > 1 for one, _ in counts.of_group[group])

    def take(group: int) -> None:
        is_held_G[group] = True
        for one, count in counts.of_group[group]:
            held[one] += count
            left_K[one] -= 1

    order = random.permutation(len(counts.of_group)).tolist()
    for group in order:
        # The change of the squared distance, each class on its own scale.
        change = sum(
            count * (2 * (held[one] - wanted[one]) + count) / wanted[one] for one, count in counts.of_group[group]
        )
        if change < 0 and may_go(group):
            take(group)
    by_size = sorted(order, key=lambda group: int(counts.sizes_G[group]))
    for group in by_size:
        if not is_held_G[group] and may_go(group) and any(not held[one] for one, _ in counts.of_group[group]):
            take(group)
    held_N: npt.NDArray[np.bool_] = is_held_G[dense_N]
    return held_N


def deal_groups(
    classes_N: Indices | None, groups_N: npt.NDArray[np.integer], num_folds: int, random: np.random.Generator
) -> Indices:
    """Return the fold of each row: no group in two of them, sizes and classes as even as the groups allow.

    The largest groups are dealt first, each into the fold that has the least of its classes.

    Args:
        classes_N: Class of each row. None: there are none.
        groups_N: Group of each row.
        num_folds: Folds, no more than groups.
        random: Where the order of equals is drawn from.
    """
    _, dense_N = np.unique(groups_N, return_inverse=True)
    counts = _Counts.of(classes_N, dense_N)
    rows_K, num_rows = counts.rows_K.tolist(), len(dense_N)
    filled: list[dict[int, int]] = [{} for _ in range(num_folds)]
    sizes = [0] * num_folds
    fold_G = np.empty(len(counts.of_group), dtype=np.int64)
    order = random.permutation(len(counts.of_group))
    order = order[np.argsort(-counts.sizes_G[order], kind="stable")]
    for group in order.tolist():
        own = counts.of_group[group]

        def load(fold: int, own: Sequence[tuple[int, int]] = own) -> tuple[float, int]:
            of_classes = sum(count * filled[fold].get(one, 0) / rows_K[one] ** 2 for one, count in own)
            size = sum(count for _, count in own)
            # The classes come first; among folds with as much of them, the smallest is filled.
            return of_classes + size * sizes[fold] / num_rows**2, fold

        empty = [fold for fold in range(num_folds) if not sizes[fold]]
        fold = empty[0] if empty else min(range(num_folds), key=load)
        fold_G[group] = fold
        sizes[fold] += int(counts.sizes_G[group])
        for one, count in own:
            filled[fold][one] = filled[fold].get(one, 0) + count
    fold_N: Indices = fold_G[dense_N]
    return fold_N


def apart(classes_N: Indices | None, groups_N: npt.NDArray[np.integer] | None, num_rows: int) -> npt.NDArray[np.bool_]:
    """Return for each row whether one of another group has its class: whether anything is known of it, left out.

    Args:
        classes_N: Class of each row. None: there are none.
        groups_N: Group of each row. None: each row is its own.
        num_rows: N.
    """
    classes_N = np.zeros(num_rows, dtype=np.int64) if classes_N is None else classes_N
    groups_N = np.arange(num_rows) if groups_N is None else groups_N
    _, dense_N = np.unique(groups_N, return_inverse=True)
    counts = _Counts.of(classes_N, dense_N)
    is_apart_N: npt.NDArray[np.bool_] = counts.groups_K[np.unique(classes_N, return_inverse=True)[1]] > 1
    return is_apart_N
