"""How good a configuration's outputs on held-out rows are: what a sweep is won by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from trunkline_wire.fits import HUBER, QUANTILE
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, ORDINAL, REGRESSION

from trunkline_worker.heads.model import class_probabilities
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.fit import quantile_of
from trunkline_worker.training.metrics import badness
from trunkline_worker.training.weighing import class_weights, label_weights

# Shape suffix legend: B = rows, K = outputs, or classes

_WON_BY = {
    CLASSIFICATION: "cross_entropy",
    ORDINAL: "cross_entropy",
    MULTI_LABEL: "binary_cross_entropy",
    REGRESSION: "r2",
}
_WON_BY_LOSS = {HUBER: "mae", QUANTILE: "pinball"}
"""Where squared errors are not what is minimised, they are not what is won by."""


@dataclass(frozen=True)
class Judge:
    """Says how good outputs are: higher is better.

    Attributes:
        metric: One of the task's.
        task: One of ``heads.TASKS``.
        quantile: Which quantile the values are meant to be; 0: they are means.
        weights: How much the rows of each class count, (K,); of labels, how much presence and absence do. Empty: all
            alike. Only the cross-entropies heed them.
    """

    metric: str
    task: str
    quantile: float = 0.0
    weights: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, spec: JobSpec, task: str, truth: Tensor, num_classes: int) -> Judge:
        """Judge by the metric that a job selects by; where it names none, by its loss, weights included.

        Args:
            spec: The job.
            task: One of ``heads.TASKS``.
            truth: Of the training rows, whose classes are weighed.
            num_classes: Of one class a row.
        """
        metric = spec.select_by or _WON_BY_LOSS.get(spec.loss.kind, _WON_BY[task])
        weights: tuple[Tensor, ...] = ()
        if not spec.select_by and spec.loss.is_weighted:
            if task == MULTI_LABEL:
                weights = label_weights(spec.loss, truth) or ()
            else:
                weights_K = class_weights(spec.loss, truth, num_classes)
                weights = () if weights_K is None else (weights_K,)
        return cls(metric, task, quantile_of(spec), tuple(one.cpu() for one in weights))

    @property
    def name(self) -> str:
        """What is judged by, in a word."""
        return f"weighted {self.metric}" if self.weights else self.metric

    def __call__(self, outputs: Tensor, truth: Tensor) -> float:
        """Judge logits, or values in the targets' own units, by the truth."""
        if not self.weights:
            return -badness(self.task, self.metric, outputs, truth, quantile=self.quantile)
        loss, weights = self._losses(outputs.double().cpu(), truth.cpu())
        # Rows none of which counts say nothing.
        return -float((weights * loss).sum() / weights.sum())

    def _losses(self, outputs: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        if self.task == MULTI_LABEL:
            present_K, absent_K = self.weights
            loss_BK = functional.binary_cross_entropy_with_logits(outputs, truth.double(), reduction="none")
            return loss_BK, torch.where(truth > 0.5, present_K, absent_K)
        if self.task == CLASSIFICATION:
            return functional.cross_entropy(outputs, truth, reduction="none"), self.weights[0][truth]
        tiny = torch.finfo(torch.float64).tiny
        own_B = class_probabilities(outputs).gather(1, truth[:, None]).squeeze(1)
        return -own_B.clamp(min=tiny).log(), self.weights[0][truth]
