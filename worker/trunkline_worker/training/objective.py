"""What minibatches minimise: the mean loss of their rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from trunkline_wire.fits import FOCAL, HUBER, QUANTILE, LossConfig
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL

# Shape suffix legend: B = rows of a minibatch, K = outputs


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        task: ``classification``, ``multi_label`` or ``regression``, whose targets are standardised.
        config: Which loss, with its numbers.
        weights_K: How much a class counts; of labels, how much one does that is there. None: all alike.
        absent_K: Of labels: how much one counts that is not there. None: 1.
    """

    task: str
    config: LossConfig
    weights_K: Tensor | None = None
    absent_K: Tensor | None = None

    def loss(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """Return the mean over rows, weighed by their classes; of several outputs a row, their sum's."""
        if self.task == CLASSIFICATION:
            return self._of_classes(outputs, truth)
        if self.task == MULTI_LABEL:
            return self._of_labels(outputs, truth).sum(dim=1).mean()
        return _of_numbers(self.config)(outputs, truth).sum(dim=1).mean()

    def _of_classes(self, outputs_BK: Tensor, truth_B: Tensor) -> Tensor:
        weights_K = None if self.weights_K is None else self.weights_K.to(outputs_BK)
        smoothing = self.config.label_smoothing
        if self.config.kind != FOCAL:
            # Weighed by hand: torch's own weighs the smoothed part by the other classes.
            loss_B = functional.cross_entropy(outputs_BK, truth_B, reduction="none", label_smoothing=smoothing)
        else:
            log_BK = outputs_BK.log_softmax(dim=1)
            log_B = log_BK.gather(1, truth_B[:, None]).squeeze(1)
            loss_B = -((1.0 - log_B.exp()) ** self.config.focal_gamma) * log_B
            if smoothing:
                loss_B = (1.0 - smoothing) * loss_B - smoothing * log_BK.mean(dim=1)
        if weights_K is None:
            return loss_B.mean()
        weights_B = weights_K[truth_B]
        # A batch of rows that do not count teaches nothing.
        return (weights_B * loss_B).sum() / weights_B.sum().clamp(min=torch.finfo(weights_B.dtype).tiny)

    def _of_labels(self, outputs_BK: Tensor, truth_BK: Tensor) -> Tensor:
        smoothing = self.config.label_smoothing
        truth_BK = truth_BK.to(outputs_BK)
        target_BK = truth_BK * (1.0 - smoothing) + 0.5 * smoothing
        loss_BK = functional.binary_cross_entropy_with_logits(outputs_BK, target_BK, reduction="none")
        if self.config.kind == FOCAL:
            right_BK = torch.where(truth_BK > 0.5, outputs_BK, -outputs_BK).sigmoid()
            loss_BK = (1.0 - right_BK) ** self.config.focal_gamma * loss_BK
        if self.weights_K is None:
            return loss_BK
        present_K = self.weights_K.to(outputs_BK)
        absent_K = torch.ones_like(present_K) if self.absent_K is None else self.absent_K.to(outputs_BK)
        return torch.where(truth_BK > 0.5, present_K, absent_K) * loss_BK


def _of_numbers(config: LossConfig) -> Callable[[Tensor, Tensor], Tensor]:
    if config.kind == HUBER:
        return lambda outputs, truth: functional.huber_loss(outputs, truth, reduction="none", delta=config.huber_delta)
    if config.kind == QUANTILE:
        # The pinball loss. Source: Koenker and Bassett 1978, "Regression Quantiles".
        return lambda outputs, truth: torch.maximum(
            config.quantile * (truth - outputs), (config.quantile - 1.0) * (truth - outputs)
        )
    return lambda outputs, truth: 0.5 * (outputs - truth).square()
