"""The numbers of many heads of one shape, stacked: their pass over rows, and AdamW's step for each at its own rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from trunkline_wire.fits import LossConfig
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL

from trunkline_worker.heads.layers import activate
from trunkline_worker.heads.model import Head
from trunkline_worker.training.objective import class_losses, label_losses, number_losses

# Shape suffix legend: F = folds, C = configurations, B = rows, D = columns, G = units before a layer, H = units behind
# it, V = C times H, K = outputs


@dataclass(frozen=True)
class Stack:
    """One head for each fold and configuration.

    Attributes:
        weights: Of each layer, (F, C, H, G).
        biases: Of each layer, (F, C, H).
        activation: Behind each hidden layer, by name.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    activation: str

    @classmethod
    def of(cls, heads: Sequence[Head], num_configurations: int, device: torch.device) -> Stack:
        """Copy a head's numbers for each fold, the same ones for every configuration."""

        def copies(parameters: Sequence[Tensor]) -> Tensor:
            stacked = torch.stack([one.detach() for one in parameters]).to(device)
            return stacked[:, None].repeat(1, num_configurations, *[1] * (stacked.ndim - 1)).requires_grad_()

        layers = list(zip(*(head.linears for head in heads), strict=True))
        return cls(
            [copies([one.weight for one in layer]) for layer in layers],
            [copies([one.bias for one in layer]) for layer in layers],
            heads[0].config.activation,
        )

    @property
    def parameters(self) -> list[Tensor]:
        """All tensors, weights first."""
        return [*self.weights, *self.biases]

    @torch.no_grad()
    def member(self, fold: int, configuration: int) -> Stack:
        """Return a single head."""

        def picked(some: Sequence[Tensor]) -> list[Tensor]:
            return [one[fold : fold + 1, configuration : configuration + 1] for one in some]

        return Stack(picked(self.weights), picked(self.biases), self.activation)

    def forward(self, x_FBD: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """Return logits or values, (F, C, K, B), from standardised columns.

        Args:
            x_FBD: Rows of each fold.
            masks: What the units of each hidden layer are multiplied by, (F, C, H, B). None: nothing is left out.
        """
        # The heads of a fold read the same rows, so that their first layers are one product. Units stand before rows,
        # so that gradients come out as the weights lie.
        side_by_side_FVD = self.weights[0].flatten(1, 2)
        first_FVB = torch.baddbmm(self.biases[0].flatten(1)[:, :, None], side_by_side_FVD, x_FBD.transpose(1, 2))
        x_FCGB = first_FVB.unflatten(1, self.biases[0].shape[1:])
        for index, (weight_FCHG, bias_FCH) in enumerate(zip(self.weights[1:], self.biases[1:], strict=True)):
            x_FCGB = activate(x_FCGB, self.activation)
            if masks:
                x_FCGB = x_FCGB * masks[index]
            x_FCGB = torch.matmul(weight_FCHG, x_FCGB) + bias_FCH[..., None]
        return x_FCGB


def stacked_losses(
    task: str, config: LossConfig, outputs_FCKB: Tensor, truth: Tensor, weights: Sequence[Tensor] | None
) -> Tensor:
    """Return each head's loss, (F, C), as ``Objective.loss`` has it: the mean over rows, summed over outputs.

    Args:
        task: ``classification``, ``multi_label`` or ``regression``.
        config: Which loss.
        outputs_FCKB: Logits, or values.
        truth: Of each fold's rows: class indices, (F, B); 0 and 1, or standardised targets, (F, B, K).
        weights: How much each class counts in each fold, (F, K); of labels, how much presence and absence do. None: all
            alike.
    """
    if task == CLASSIFICATION:
        index_FCB = truth[:, None].expand(-1, outputs_FCKB.shape[1], -1)
        loss_FCB = class_losses(config, outputs_FCKB.flatten(0, 1), index_FCB.flatten(0, 1)).view(index_FCB.shape)
        if weights is None:
            return loss_FCB.mean(dim=2)
        weights_F1B = weights[0].to(loss_FCB).gather(1, truth)[:, None]
        total_F1 = weights_F1B.sum(dim=2).clamp(min=torch.finfo(loss_FCB.dtype).tiny)
        return (weights_F1B * loss_FCB).sum(dim=2) / total_F1
    truth_FCKB = truth.transpose(1, 2)[:, None].to(outputs_FCKB).expand_as(outputs_FCKB)
    if task == MULTI_LABEL:
        loss_FCKB = label_losses(config, outputs_FCKB, truth_FCKB)
        if weights is not None:
            present_F1K1, absent_F1K1 = (one.to(loss_FCKB)[:, None, :, None] for one in weights)
            loss_FCKB = torch.where(truth_FCKB > 0.5, present_F1K1, absent_F1K1) * loss_FCKB
    else:
        loss_FCKB = number_losses(config, outputs_FCKB, truth_FCKB)
    return loss_FCKB.sum(dim=2).mean(dim=2)


class StackedAdamW:
    """AdamW, with a decay and a learning rate for each configuration.

    Adam's step is the learning rate times a direction that does not depend on it. So torch's own fused kernel finds the
    directions, as steps from zero at a rate of 1, and each configuration goes along its own at its own rate.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".

    Args:
        stack: What is trained, in place.
        decay_C: By which a weight shrinks in a step, times the rate. Biases are free.
        clip_norm: Longest gradient of a head; 0: any.
    """

    def __init__(self, stack: Stack, decay_C: Tensor, clip_norm: float) -> None:
        """Start with no moments."""
        self._stack = stack
        self._decay_C = decay_C
        self._clip_norm = clip_norm
        self._directions = [torch.zeros_like(one).requires_grad_(False) for one in stack.parameters]
        self._adam = torch.optim.Adam(self._directions, lr=1.0, fused=True)

    @torch.no_grad()
    def step(self, loss: Tensor, rate_C: Tensor) -> None:
        """Go one step down the gradients of a loss."""
        parameters = self._stack.parameters
        gradients = torch.autograd.grad(loss, parameters)
        if self._clip_norm:
            norms_FC = torch.stack([torch.linalg.vector_norm(one.flatten(2), dim=2) for one in gradients]).norm(dim=0)
            # As torch's own, with its small addend.
            share_FC = (self._clip_norm / (norms_FC + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(_over(share_FC, gradient))
        for direction, gradient in zip(self._directions, gradients, strict=True):
            direction.grad = gradient
        self._adam.step()
        for weight in self._stack.weights:
            weight.mul_((1.0 - rate_C * self._decay_C).view(-1, *[1] * (weight.ndim - 2)))
        for direction, parameter in zip(self._directions, parameters, strict=True):
            parameter.addcmul_(direction, rate_C.view(-1, *[1] * (parameter.ndim - 2)))
            direction.zero_()


def _over(values_FC: Tensor, like: Tensor) -> Tensor:
    return values_FC.view(*values_FC.shape, *[1] * (like.ndim - 2))
