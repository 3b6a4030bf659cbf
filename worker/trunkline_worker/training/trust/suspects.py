"""Labels that are probably wrong: rows that a classifier, fitted without them, is sure are of another class.

Source: Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels", for thresholds
by class (section 3.1); what they count, the confident joint's off-diagonal cells, is listed here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import invalid

from trunkline_worker.store.evaluations import LabelSuspect
from trunkline_worker.training.grouped import apart
from trunkline_worker.training.softmax import held_out_logs
from trunkline_worker.training.split import Indices, folds, num_groups
from trunkline_worker.training.trust.checks import as_tensor, check_columns, check_probabilities

# Shape suffix legend: N = rows, D = columns, R = columns of the basis in use, K = classes

_LEAST_ROWS = 2
"""Of a class. With one, whoever leaves the row out knows nothing of its class."""


def find_suspects(probabilities_NK: Tensor, classes_N: Indices, groups_N: Indices | None = None) -> list[LabelSuspect]:
    """Return the rows whose label is doubtful, the most doubtful first.

    A row is one of a class for sure if its probability is at least the mean that rows given this class have for it. So
    a class that is hard to tell asks for less, and rows that may be anything are left alone. A class with fewer than
    two rows, or with rows in a single group, is neither doubted nor suggested.

    Args:
        probabilities_NK: Each row's by a classifier that was fitted without it.
        classes_N: Class that each row was given.
        groups_N: Group of each row. None: each is its own.

    Raises:
        WireError: INVALID_ARGUMENT, SHAPE_MISMATCH, NOT_FINITE or BAD_LABELS.
    """
    check_probabilities(probabilities_NK, as_tensor(classes_N).to(probabilities_NK.device))
    probability_NK = probabilities_NK.double().cpu().numpy()
    num_rows, num_classes = probability_NK.shape
    own_N = probability_NK[np.arange(num_rows), classes_N]
    count_K = np.bincount(classes_N, minlength=num_classes)
    known_K = count_K >= _LEAST_ROWS
    if groups_N is not None:
        known_K[classes_N] = apart(classes_N, groups_N, num_rows)
    mean_K = np.bincount(classes_N, weights=own_N, minlength=num_classes) / np.maximum(count_K, 1)
    threshold_K = np.where(known_K, mean_K, np.inf)
    sure_NK = np.where(probability_NK >= threshold_K, probability_NK, -np.inf)
    suggested_N = sure_NK.argmax(axis=1)
    # Where no class is sure this is minus infinity.
    margin_N = sure_NK.max(axis=1) - own_N
    doubtful = np.flatnonzero((margin_N > 0) & known_K[classes_N])
    doubtful = doubtful[np.argsort(-margin_N[doubtful], kind="stable")]
    return [
        LabelSuspect(int(row), int(classes_N[row]), int(suggested_N[row]), float(margin_N[row])) for row in doubtful
    ]


def cross_validated_probabilities(
    x_ND: Tensor,
    classes_N: Indices,
    num_classes: int,
    l2: float,
    generator: np.random.Generator,
    num_folds: int = 5,
    *,
    groups_N: Indices | None = None,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return each row's probabilities, (N, K), float64, by a linear softmax head fitted to the other folds.

    Args:
        x_ND: Standardised rows.
        classes_N: Class of each row.
        num_classes: K. A class without rows has probability 0.
        l2: scikit-learn's 1 / C.
        generator: Where the folds are drawn from.
        num_folds: At most so many; no more than rows or groups.
        groups_N: Group of each row, two groups at least; no fold splits one. None: each is its own.
        check: Called between steps; may raise to stop.

    Returns:
        Where a row is the only one of its class, or all of them are in its group, nothing is known of it: all classes
        are equally likely.

    Raises:
        WireError: SHAPE_MISMATCH, EMPTY_BATCH, NOT_FINITE; BAD_LABELS; INVALID_ARGUMENT for fewer than two folds.
    """
    check_columns(x_ND, classes_N, num_classes)
    num_rows = x_ND.shape[0]
    if num_folds < 2:
        raise invalid(f"at least two folds are needed; got {num_folds}")
    if num_rows < 2:
        raise WireError(ErrorCode.EMPTY_BATCH, "one row cannot be compared with others; give at least two")
    present, dense, counts = np.unique(classes_N, return_inverse=True, return_counts=True)
    num_folds = min(num_folds, num_groups(groups_N, num_rows))
    if num_folds < 2:
        raise WireError(ErrorCode.EMPTY_BATCH, "one group cannot be compared with others; give at least two")
    fold_N = torch.from_numpy(folds(classes_N, num_rows, num_folds, generator, groups_N)).to(x_ND.device)
    dense_N = torch.from_numpy(dense.astype(np.int64)).to(x_ND.device)
    held_NK = held_out_logs(x_ND, dense_N, len(present), fold_N, l2, check=check).double().exp()
    probability_NK = held_NK.new_zeros((num_rows, num_classes))
    probability_NK[:, torch.from_numpy(present).to(x_ND.device)] = held_NK
    alone_N = counts[dense] < _LEAST_ROWS
    if groups_N is not None:
        alone_N = ~apart(classes_N, groups_N, num_rows)
    probability_NK[torch.from_numpy(alone_N).to(x_ND.device)] = 1.0 / num_classes
    return probability_NK
