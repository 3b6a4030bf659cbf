"""Labels of a dataset, and every check that can be made before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, ORDINAL, REGRESSION
from trunkline_wire.sizes import check_answers

# Shape suffix legend: N = rows, D = columns of the embedding, M = regression targets

_CHECK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Labels:
    """One class a row, or several, or numbers.

    Attributes:
        class_names: In the order of the model's outputs; empty for numbers.
        class_indices: (N,), into ``class_names``; of no use where ``targets`` are given.
        targets: (N, M), float32: numbers; with class names, 1 where the row is of the class and 0 where it is not.
        is_ordinal: Whether the classes stand in order, from the lowest to the highest.
    """

    class_names: tuple[str, ...] = ()
    class_indices: npt.NDArray[np.integer] | None = None
    targets: npt.NDArray[np.float32] | None = None
    is_ordinal: bool = False

    @property
    def task(self) -> str:
        """One of ``heads.TASKS``."""
        if not self.class_names:
            return REGRESSION
        if self.is_ordinal:
            return ORDINAL
        return CLASSIFICATION if self.targets is None else MULTI_LABEL

    @property
    def num_outputs(self) -> int:
        """Columns that the head puts out; of classes in order the thresholds between them."""
        if self.class_names:
            return len(self.class_names) - self.is_ordinal
        return 0 if self.targets is None or self.targets.ndim != 2 else self.targets.shape[1]

    def of_pictures(self, num_views: int) -> Labels:
        """Return one of every so many: the labels of pictures, whose views have them all."""
        if num_views == 1:
            return self
        indices, targets = self.class_indices, self.targets
        return replace(
            self,
            class_indices=None if indices is None else indices[::num_views],
            targets=None if targets is None else targets[::num_views],
        )

    def ordered(self, class_order: Sequence[str]) -> Labels:
        """Return the labels with their classes in an order, which means something from then on.

        Raises:
            WireError: BAD_LABELS if the order is not one of these classes.
        """
        if self.task != CLASSIFICATION or self.class_indices is None:
            raise _bad("classes in order need one class per row")
        if sorted(class_order) != sorted(self.class_names):
            raise _bad(
                f"the order names {len(class_order)} classes, {', '.join(class_order)[:80]}; the dataset has "
                f"{len(self.class_names)}, {', '.join(self.class_names)[:80]}: name each of them once"
            )
        place = {name: index for index, name in enumerate(class_order)}
        moved_K = np.array([place[name] for name in self.class_names], dtype=np.int64)
        indices = self.class_indices.astype(np.int64)
        if indices.size and int(indices.min()) >= 0 and int(indices.max()) < len(moved_K):  # else refused later
            indices = moved_K[indices]
        return replace(self, class_names=tuple(class_order), class_indices=indices, is_ordinal=True)


def check_labels(labels: Labels, num_rows: int, *, hold_out: bool) -> None:
    """Check that a head can be trained on these labels.

    Args:
        labels: What the user gave.
        num_rows: N.
        hold_out: Whether some of the rows will be set aside to measure the model.

    Raises:
        WireError: EMPTY_BATCH, BAD_LABELS or NOT_FINITE.
    """
    if num_rows == 0:
        raise WireError(ErrorCode.EMPTY_BATCH, "the dataset has no rows; upload some first")
    check_answers(num_rows, len(labels.class_names))
    if labels.task in (CLASSIFICATION, ORDINAL):
        _check_classes(labels, num_rows, hold_out=hold_out)
        return
    _check_targets(labels, num_rows, hold_out=hold_out)
    if labels.task == MULTI_LABEL:
        _check_multi(labels)


def _check_classes(labels: Labels, num_rows: int, *, hold_out: bool) -> None:
    indices = labels.class_indices
    if indices is None:
        raise _bad("the dataset has class names but no class per row")
    if indices.shape != (num_rows,):
        raise _bad(f"{num_rows} rows but labels of shape {indices.shape}; one label per row is needed")
    names = labels.class_names
    if indices.dtype.kind not in "iu":
        raise _bad(f"class indices must be whole numbers; got {indices.dtype}")
    if int(indices.min()) < 0 or int(indices.max()) >= len(names):
        bad = int(np.argmax((indices < 0) | (indices >= len(names))))
        raise _bad(f"row {bad} is of class {int(indices[bad])}; the dataset names classes 0 to {len(names) - 1}")
    counts = np.bincount(indices.astype(np.int64), minlength=len(names))
    if int((counts > 0).sum()) < 2:
        only = names[int(counts.argmax())]
        raise _bad(f"every row is of class {only[:80]!r}; a classifier needs rows of at least two classes")
    if not counts.all():
        missing = names[int(counts.argmin())]
        raise _bad(
            f"{int((counts == 0).sum())} classes have no row, the first is {missing[:80]!r}; add rows of it, or leave "
            "its name out"
        )
    if hold_out and int(counts.min()) < 2:
        single = names[int(counts.argmin())]
        raise _bad(
            f"class {single[:80]!r} has a single row; holding rows out needs at least 2 per class. Add rows of it, or "
            "set the validation fraction to 0"
        )


def _check_targets(labels: Labels, num_rows: int, *, hold_out: bool) -> None:
    targets = labels.targets
    if targets is None or targets.size == 0:
        raise _bad("the dataset has no labels; upload it with labels to train on it")
    if targets.ndim != 2 or targets.shape[0] != num_rows:
        raise _bad(f"{num_rows} rows but targets of shape {targets.shape}; (rows, outputs) is needed")
    finite = np.isfinite(targets).all(axis=1)
    if not finite.all():
        raise WireError(
            ErrorCode.NOT_FINITE,
            f"{int((~finite).sum())} of {num_rows} targets are NaN or infinite, the first is row "
            f"{int(finite.argmin())}",
        )
    needed = 3 if hold_out else 2
    if num_rows < needed:
        raise _bad(f"{num_rows} rows; at least {needed} are needed")


def _check_multi(labels: Labels) -> None:
    targets = labels.targets
    assert targets is not None
    names = labels.class_names
    if targets.shape[1] != len(names):
        raise _bad(f"{len(names)} classes but labels of shape {targets.shape}; one column per class is needed")
    odd = ((targets != 0) & (targets != 1)).any(axis=1)
    if odd.any():
        raise _bad(f"row {int(odd.argmax())} has a label that is neither 0 nor 1")
    for value, what in ((1, "with"), (0, "without")):
        missing = ~(targets == value).any(axis=0)
        if missing.any():
            raise _bad(
                f"no row is {what} {names[int(missing.argmax())][:80]!r}; there is nothing to tell apart. Add such "
                "rows, or leave the class out"
            )


def check_embedding(embedding_ND: torch.Tensor, num_rows_expected: int, num_columns_expected: int) -> None:
    """Check shape and finiteness, a piece at a time.

    Raises:
        WireError: SHAPE_MISMATCH or NOT_FINITE, naming the first bad row.
    """
    if embedding_ND.ndim != 2 or not embedding_ND.is_floating_point():
        raise WireError(
            ErrorCode.SHAPE_MISMATCH,
            f"an embedding is (rows, columns) of floating-point numbers; got {tuple(embedding_ND.shape)}, "
            f"{embedding_ND.dtype}",
        )
    if embedding_ND.shape[1] < num_columns_expected:
        raise WireError(
            ErrorCode.SHAPE_MISMATCH,
            f"slices reach column {num_columns_expected}; the embedding has {embedding_ND.shape[1]} columns",
        )
    if embedding_ND.shape[0] != num_rows_expected:
        raise _bad(f"{embedding_ND.shape[0]} rows but {num_rows_expected} labels; one label per row is needed")
    step = max(1, _CHECK_BYTES // max(1, 4 * embedding_ND.shape[1]))
    for start in range(0, embedding_ND.shape[0], step):
        finite = torch.isfinite(embedding_ND[start : start + step]).all(dim=1)
        if not bool(finite.all()):
            raise WireError(
                ErrorCode.NOT_FINITE,
                f"row {start + int((~finite).int().argmax())} of the embedding holds NaN or infinity; it could not be "
                "embedded. Leave that row out, or send it again",
            )


def _bad(message: str) -> WireError:
    return WireError(ErrorCode.BAD_LABELS, message)
