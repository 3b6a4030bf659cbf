"""Whether trained blocks are better than the head alone: row by row, on rows that neither has seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, REGRESSION

from trunkline_worker.training.fit import target_scale
from trunkline_worker.training.trust.bootstrap import difference
from trunkline_worker.training.trust.calibration import fit_temperature

# Shape suffix legend: N = held-out rows, K = outputs

Values = npt.NDArray[np.float64]
_Goodness = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Verdict:
    """What the comparison said.

    Attributes:
        is_better: Whether the whole interval lies above 0.
        metric: By what rows were compared.
        gain: Mean over the rows; above 0 where the blocks are better.
        low: End of its 95 % interval.
        high: The other one.
        reason: In a sentence.
    """

    is_better: bool
    metric: str
    gain: float
    low: float
    high: float
    reason: str


def _cross_entropy(outputs_NK: Tensor, truth_N: Tensor) -> Tensor:
    return -functional.cross_entropy(outputs_NK, truth_N, reduction="none")


def _accuracy(outputs_NK: Tensor, truth_N: Tensor) -> Tensor:
    return (outputs_NK.argmax(dim=1) == truth_N).double()


def _binary_cross_entropy(outputs_NK: Tensor, truth_NK: Tensor) -> Tensor:
    return -functional.binary_cross_entropy_with_logits(outputs_NK, truth_NK, reduction="none").mean(dim=1)


def _subset_accuracy(outputs_NK: Tensor, truth_NK: Tensor) -> Tensor:
    return ((outputs_NK > 0) == (truth_NK > 0.5)).all(dim=1).double()


def _mse(outputs_NK: Tensor, truth_NK: Tensor) -> Tensor:
    return -(outputs_NK - truth_NK).square().mean(dim=1)


def _mae(outputs_NK: Tensor, truth_NK: Tensor) -> Tensor:
    return -(outputs_NK - truth_NK).abs().mean(dim=1)


_BY_ROW: dict[str, dict[str, _Goodness]] = {
    CLASSIFICATION: {"cross_entropy": _cross_entropy, "accuracy": _accuracy},
    MULTI_LABEL: {"binary_cross_entropy": _binary_cross_entropy, "subset_accuracy": _subset_accuracy},
    REGRESSION: {"mse": _mse, "mae": _mae},
}
"""What every row says by itself, the default first; minus what is better when lower."""


def compare(
    task: str,
    select_by: str,
    before_NK: Tensor,
    after_NK: Tensor,
    truth: Tensor,
    generator: np.random.Generator,
) -> Verdict:
    """Say whether one model is better than another beyond what chance explains.

    The 95 % interval of the mean difference over the same rows must lie above 0. Probabilities are compared at the
    temperature that suits each best: a model is not better for having been less sure of itself. Of several numbers
    each counts in standard deviations of its own, whatever it is measured in.

    Args:
        task: ``classification``, ``multi_label`` or ``regression``.
        select_by: The metric; the task's loss where it is none that rows have one by one, or empty.
        before_NK: Outputs of the head alone, for held-out rows.
        after_NK: Of the head on trained blocks.
        truth: As ``measure`` takes it.
        generator: Where rows are drawn from.
    """
    by_row = _BY_ROW[task]
    metric = select_by if select_by in by_row else next(iter(by_row))
    if task != CLASSIFICATION:
        truth = truth.double()
    scale_K, unit = truth.new_ones(()), ""
    if task == REGRESSION and before_NK.shape[1] > 1 and len(truth):
        _, scale_K = target_scale(truth)
        truth, unit = truth / scale_K, " in standard deviations"
    values: list[Values] = []
    for outputs_NK in (before_NK, after_NK):
        outputs_NK = outputs_NK.double() / scale_K / fit_temperature(task, outputs_NK, truth)
        values.append(by_row[metric](outputs_NK, truth).numpy().astype(np.float64))
    before_N, after_N = values
    gain = float((after_N - before_N).mean()) if len(after_N) else 0.0
    interval = difference(after_N, before_N, generator)
    low, high = interval or (-np.inf, np.inf)
    where = f"{metric}{unit} a row, {len(after_N)} held-out rows: gain {gain:+.4g}"
    if interval is None:
        reason = f"not kept: too few held-out rows to tell a gain from chance ({where})"
        return Verdict(False, metric, gain, low, high, reason)
    where += f", 95 % interval {low:+.4g} to {high:+.4g}"
    if low > 0:
        reason = f"kept: better beyond chance ({where})"
    elif high < 0:
        reason = f"not kept: worse beyond chance ({where})"
    else:
        reason = f"not kept: what they gain may be chance ({where}); more rows would tell"
    return Verdict(bool(low > 0), metric, gain, float(low), float(high), reason)
