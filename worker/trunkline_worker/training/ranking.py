"""What goes by the order of scores alone: areas under curves over thresholds, as scikit-learn has them.

scikit-learn checks and sorts a column anew for each of its metrics; beside a fit of some milliseconds that is the most
of a training. Here a column is sorted once for both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# Shape suffix legend: N = rows, K = columns, T = distinct scores, highest first


def ranked(member_NK: npt.NDArray[np.bool_], scores_NK: npt.NDArray[np.floating[Any]]) -> tuple[float, float]:
    """Return the area under the ROC curve and the average precision, each the mean over the columns.

    Args:
        member_NK: What is true. Every column has rows of both kinds.
        scores_NK: Higher where a row is thought to be a member. Rows of one score are told together.
    """
    num_rows, num_columns = scores_NK.shape
    area = precision = 0.0
    for member_N, score_N in zip(member_NK.T, scores_NK.T, strict=True):
        order_N = np.argsort(-score_N, kind="stable")
        sorted_N = score_N[order_N]
        last_T = np.append(np.flatnonzero(sorted_N[1:] != sorted_N[:-1]), num_rows - 1)
        right_T = np.cumsum(member_N[order_N])[last_T]  # members among the rows of at least this score
        said_T = last_T + 1
        wrong_T = said_T - right_T
        num_right, num_wrong = right_T[-1], wrong_T[-1]
        gained_T = np.diff(right_T, prepend=0)
        # Of pairs of a member and another row: those in order, and half of those of one score.
        area += float((gained_T * (num_wrong - wrong_T + 0.5 * np.diff(wrong_T, prepend=0))).sum()) / (
            float(num_right) * float(num_wrong)
        )
        precision += float((gained_T * (right_T / said_T)).sum()) / float(num_right)
    return area / num_columns, precision / num_columns
