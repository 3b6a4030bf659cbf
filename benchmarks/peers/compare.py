"""Whether a contestant answers what the reference answers. One that does not is reported as wrong, and not timed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Shape suffix legend: B = rows, K = classes

EXACT_TOLERANCE = 1e-4
"""Largest difference of a probability where both sides compute in float32."""

INEXACT_TOLERANCE = 1e-2
"""The same where one side computes in fewer bits."""

_INEXACT = ("bf16", "fp16", "int8")


def tolerance(runtime: str) -> float:
    """Return the largest difference that is allowed of a runtime, by its name."""
    return INEXACT_TOLERANCE if any(one in runtime for one in _INEXACT) else EXACT_TOLERANCE


def what_is_wrong(got_BK: npt.NDArray[np.float32], expected_BK: npt.NDArray[np.float32], allowed: float) -> str:
    """Return in words how an answer differs from the reference, or an empty text."""
    if got_BK.shape != expected_BK.shape:
        return f"answered {got_BK.shape}; {expected_BK.shape} was expected"
    if not np.isfinite(got_BK).all():
        return "answered NaN or infinity"
    other = int((got_BK.argmax(axis=1) != expected_BK.argmax(axis=1)).sum())
    if other:
        return f"another class in {other} of {len(got_BK)} rows"
    difference = float(np.abs(got_BK - expected_BK).max())
    return f"differs by {difference:.1e}; at most {allowed:.0e} is allowed" if difference > allowed else ""
