"""Whether what is asked for can be held in memory: checked on both sides before anything is sent or computed."""

from __future__ import annotations

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_ANSWERS


def check_answers(num_rows: int, num_classes: int) -> None:
    """Check that the scores of every row for every class fit in memory: training and measuring hold them at once.

    Raises:
        WireError: BAD_LABELS.
    """
    if num_rows * num_classes > MAX_ANSWERS:
        raise WireError(
            ErrorCode.BAD_LABELS,
            f"{num_rows} rows of {num_classes} classes: training holds a score of each row for each class, and "
            f"{num_rows * num_classes} are more than {MAX_ANSWERS}. Leave rare classes out, or train on fewer rows",
        )
