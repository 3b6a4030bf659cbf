"""Groups of rows in whatever form the user has them: what is alike belongs together and is never split."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from trunkline.errors import InvalidArgumentError

# Shape suffix legend: N = rows

_HINT = "Give one group for each row: the patient, the camera, the film that it is from"


def encode_groups(groups: Any, num_rows: int) -> npt.NDArray[np.uint32] | None:
    """Check groups and bring them into the form that is sent: numbers, in the order in which groups first come.

    Args:
        groups: One for each row, anything that can be compared and hashed: a list, an array, a column of pandas, polars
            or pyarrow. None: rows are not grouped.
        num_rows: N.

    Raises:
        InvalidArgumentError: They are of another number than the rows, one is missing, or all are the same.
    """
    if groups is None:
        return None
    if isinstance(groups, (str, bytes)):
        raise InvalidArgumentError(
            f"groups is {groups!r}; a name of a column needs a table or a CSV file as images", hint=_HINT
        )
    values = _plain(groups)
    if len(values) != num_rows:
        raise InvalidArgumentError(f"{len(values)} groups for {num_rows} rows", hint=_HINT)
    number: dict[Any, int] = {}
    numbers = np.empty(num_rows, dtype=np.uint32)
    for row, value in enumerate(values):
        if _is_missing(value):
            raise InvalidArgumentError(
                f"the group of row {row} is missing", hint="Give it a group of its own, or leave the row out"
            )
        try:
            numbers[row] = number.setdefault(value, len(number))
        except TypeError:
            raise InvalidArgumentError(
                f"the group of row {row} is a {type(value).__name__}, which cannot be compared", hint=_HINT
            ) from None
    if len(number) == 1:
        raise InvalidArgumentError(
            f"all {num_rows} rows are in one group: none could be held out to measure a model",
            hint="Leave groups= out, or name groups more finely",
        )
    return numbers


def _plain(groups: Any) -> list[Any]:
    """Return groups as plain Python values."""
    for name in ("to_pylist", "to_list", "tolist"):
        convert = getattr(groups, name, None)
        if convert is not None:
            found = convert()
            return found if isinstance(found, list) else [found]
    try:
        return [one.item() if isinstance(one, np.generic) else one for one in groups]
    except TypeError:
        raise InvalidArgumentError(
            f"groups is a {type(groups).__name__}; expected a list or a column", hint=_HINT
        ) from None


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and value != value
