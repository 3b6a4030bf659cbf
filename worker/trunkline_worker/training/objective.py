"""What minibatches minimise: the mean loss of their rows."""

from __future__ import annotations

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
        return number_losses(self.config, outputs, truth).sum(dim=1).mean()

    def _of_classes(self, outputs_BK: Tensor, truth_B: Tensor) -> Tensor:
        loss_B = class_losses(self.config, outputs_BK, truth_B)
        if self.weights_K is None:
            return loss_B.mean()
        weights_B = self.weights_K.to(outputs_BK)[truth_B]
        # A batch of rows that do not count teaches nothing.
        return (weights_B * loss_B).sum() / weights_B.sum().clamp(min=torch.finfo(weights_B.dtype).tiny)

    def _of_labels(self, outputs_BK: Tensor, truth_BK: Tensor) -> Tensor:
        loss_BK = label_losses(self.config, outputs_BK, truth_BK)
        if self.weights_K is None:
            return loss_BK
        present_K = self.weights_K.to(outputs_BK)
        absent_K = torch.ones_like(present_K) if self.absent_K is None else self.absent_K.to(outputs_BK)
        return torch.where(truth_BK > 0.5, present_K, absent_K) * loss_BK


def class_losses(config: LossConfig, outputs: Tensor, truth: Tensor) -> Tensor:
    """Return the loss of each row of one class.

    Args:
        config: Cross-entropy or focal, smoothed or not.
        outputs: Logits, classes along axis 1: (B, K), or (B, K, ...).
        truth: Class indices: (B,), or (B, ...).
    """
    smoothing = config.label_smoothing
    if config.kind != FOCAL:
        # Weighed by hand elsewhere: torch's own weighs the smoothed part by the other classes.
        return functional.cross_entropy(outputs, truth, reduction="none", label_smoothing=smoothing)
    log = outputs.log_softmax(dim=1)
    own = log.gather(1, truth.unsqueeze(1)).squeeze(1)
    loss = -((1.0 - own.exp()) ** config.focal_gamma) * own
    return (1.0 - smoothing) * loss - smoothing * log.mean(dim=1) if smoothing else loss


def label_losses(config: LossConfig, outputs: Tensor, truth: Tensor) -> Tensor:
    """Return the loss of each label, of the outputs' shape, where a row may have several. ``truth`` is 0 or 1."""
    smoothing = config.label_smoothing
    truth = truth.to(outputs)
    target = truth * (1.0 - smoothing) + 0.5 * smoothing
    loss = functional.binary_cross_entropy_with_logits(outputs, target, reduction="none")
    if config.kind == FOCAL:
        right = torch.where(truth > 0.5, outputs, -outputs).sigmoid()
        loss = (1.0 - right) ** config.focal_gamma * loss
    return loss


def number_losses(config: LossConfig, outputs: Tensor, truth: Tensor) -> Tensor:
    """Return the loss of each number, of the outputs' shape."""
    if config.kind == HUBER:
        return functional.huber_loss(outputs, truth, reduction="none", delta=config.huber_delta)
    if config.kind == QUANTILE:
        # The pinball loss. Source: Koenker and Bassett 1978, "Regression Quantiles".
        return torch.maximum(config.quantile * (truth - outputs), (config.quantile - 1.0) * (truth - outputs))
    return 0.5 * (outputs - truth).square()
