"""Checks of how the rows of a dataset belong together: in groups that are never split, and as views of one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_VIEWS
from trunkline_wire.rows import number_groups

# Shape suffix legend: N = rows, V = views of one picture, M = outputs, P = pictures

Groups = npt.NDArray[np.uint32]


def checked_views(
    num_rows: int, views: int, class_indices: npt.NDArray[np.uint32], targets_NM: npt.NDArray[np.float32] | None
) -> int:
    """Return how many rows are views of one picture, having checked that they are labelled alike.

    Args:
        num_rows: N.
        views: V. 0: 1.
        class_indices: One per row; empty unless every row is of one class.
        targets_NM: What was given instead.

    Raises:
        WireError: INVALID_ARGUMENT or BAD_LABELS.
    """
    if not 0 <= views <= MAX_VIEWS:
        raise _invalid(f"{views} views of a picture; 1 to {MAX_VIEWS} are possible")
    views = views or 1
    if num_rows % views:
        raise _invalid(f"{num_rows} rows are no whole number of pictures with {views} views each")
    if views > 1:
        labels = class_indices if targets_NM is None else targets_NM
        row = _first_unlike(labels, views)
        if row is not None:
            raise WireError(
                ErrorCode.BAD_LABELS,
                f"row {row} is a view of the picture in row {row - row % views} and has another label; give all views "
                "of a picture the same one",
            )
    return views


def checked_groups(num_rows: int, groups: Sequence[int] | npt.NDArray[np.integer] | None, views: int) -> Groups | None:
    """Return the group of each row, numbered in the order in which they come; None where rows are not grouped.

    Args:
        num_rows: N.
        groups: One per row, or none.
        views: So many rows are views of one picture.

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    given = np.asarray(() if groups is None else groups, dtype=np.int64)
    if not given.size:
        return None
    if given.shape != (num_rows,):
        raise _invalid(f"{given.size} groups for {num_rows} rows; give one for each row, or none")
    numbered_N = number_groups(given)
    if int(numbered_N.max()) == 0:
        raise _invalid(
            "all rows are in one group, so that none could be held out or left out; leave the groups out, or name them "
            "more finely"
        )
    row = _first_unlike(numbered_N, views)
    if row is not None:
        raise _invalid(
            f"row {row} is a view of the picture in row {row - row % views} and is in another group; give all views of "
            "a picture the same one"
        )
    return numbered_N.astype("<u4")


def check_held_groups(
    class_names: Sequence[str],
    classes_P: npt.NDArray[np.integer] | None,
    groups_P: npt.NDArray[np.integer],
    *,
    hold_out: bool,
) -> None:
    """Check that whole groups can be set aside and every class still be learnt.

    Args:
        class_names: In the order of the classes.
        classes_P: Class of each picture; None where they have several, or numbers.
        groups_P: Group of each picture.
        hold_out: Whether groups will be set aside to measure the model.

    Raises:
        WireError: BAD_LABELS, saying what to do.
    """
    if not hold_out or classes_P is None or not len(classes_P):
        return
    pairs = np.unique(np.stack([np.asarray(classes_P, dtype=np.int64), np.asarray(groups_P, dtype=np.int64)]), axis=1)
    num_groups_K = np.bincount(pairs[0], minlength=len(class_names))
    single_K = np.flatnonzero(num_groups_K == 1)
    if len(single_K):
        more = f" (and those of {len(single_K) - 1} more classes)" if len(single_K) > 1 else ""
        raise WireError(
            ErrorCode.BAD_LABELS,
            f"all rows of class {class_names[int(single_K[0])][:80]!r}{more} are in one group: held out, nothing of "
            "the class would be left to train on, and else it could not be measured. Add rows of it in another group, "
            "leave the class out, name groups more finely, or set the validation fraction to 0",
        )


def _first_unlike(values: npt.NDArray[np.generic], views: int) -> int | None:
    """Return the first row that differs from the first view of its picture."""
    by_picture = values.reshape(-1, views, *values.shape[1:])
    unlike = (by_picture != by_picture[:, :1]).reshape(len(by_picture) * views, -1).any(axis=1)
    return int(unlike.argmax()) if unlike.any() else None


def _invalid(message: str) -> WireError:
    return WireError(ErrorCode.INVALID_ARGUMENT, message)
