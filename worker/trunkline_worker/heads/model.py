"""Head modules: the trained task layers on an embedding, standardisation included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.heads.config import HeadConfig, invalid

# Shape suffix legend: B = rows, D = columns of the selected slices side by side, H = one layer's width, K = outputs

CLASSIFICATION = "classification"
REGRESSION = "regression"
TASKS = (CLASSIFICATION, REGRESSION)


class Head(nn.Module):
    """Standardise, then one linear layer or an MLP with ReLU.

    ``mean`` and ``scale`` are buffers, fitted on the training split by whoever trains the head. Parameters start at
    zero; ``reset_parameters`` draws them.

    Args:
        config: What the head is made of.
        num_features: D.
        num_outputs: K.
        device: Where the tensors lie. ``meta``: nowhere yet.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, config: HeadConfig, num_features: int, num_outputs: int, *, device: torch.device | str = "cpu"
    ) -> None:
        """Build the layers."""
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(num_features, device=device))
        self.register_buffer("scale", torch.ones(num_features, device=device))
        widths = (num_features, *config.hidden, num_outputs)
        self.layers = nn.ModuleList(
            # skip_init: the usual draw comes from the process-wide generator, which others may be using.
            nn.utils.skip_init(nn.Linear, inputs, outputs, device=device)
            for inputs, outputs in pairwise(widths)
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the weights: He's uniform for hidden layers, zero for the output layer, which then starts unbiased.

        Source: He et al. 2015, "Delving Deep into Rectifiers", for the bound.
        """
        with torch.no_grad():
            for layer in self.linears[:-1]:
                bound = math.sqrt(6.0 / layer.in_features)
                # Drawn on the CPU, so that every device starts from the same numbers.
                drawn = torch.rand(layer.weight.shape, generator=generator).mul_(2 * bound).sub_(bound)
                layer.weight.copy_(drawn)
                layer.bias.zero_()
            self.linears[-1].weight.zero_()
            self.linears[-1].bias.zero_()

    @property
    def linears(self) -> list[nn.Linear]:
        """The linear layers, from the embedding on."""
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def standardise(self, x_BD: Tensor) -> Tensor:
        """Shift and scale each column."""
        return (x_BD - self.mean) / self.scale

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return logits or values, (B, K), from raw columns."""
        return self.forward_standardised(self.standardise(x_BD))

    def forward_standardised(self, x_BD: Tensor, dropout_generator: torch.Generator | None = None) -> Tensor:
        """Return logits or values, (B, K), from standardised columns.

        Args:
            x_BD: What ``standardise`` returned.
            dropout_generator: Where the units to leave out are drawn from; none means that none is left out.
        """
        *hidden, output = self.linears
        x_BH = x_BD
        for layer in hidden:
            x_BH = torch.relu(layer(x_BH))
            if dropout_generator is not None and self.config.dropout > 0:
                keep = 1.0 - self.config.dropout
                drawn = torch.rand(x_BH.shape, generator=dropout_generator, device=dropout_generator.device)
                x_BH = x_BH * (drawn < keep).to(x_BH) / keep
        logits: Tensor = output(x_BH)
        return logits


@dataclass(frozen=True)
class TrainedHead:
    """A head with what its inputs and outputs mean: what a model is made of.

    Attributes:
        head: The module.
        task: ``classification`` or ``regression``.
        class_names: In the order of the output's columns; empty for regression.
        slices: Names of the embedding's slices, in the order in which their columns go in.
        slice_widths: Columns of each.

    Raises:
        WireError: INVALID_ARGUMENT if the parts contradict each other.
    """

    head: Head
    task: str
    class_names: tuple[str, ...]
    slices: tuple[str, ...]
    slice_widths: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that the parts fit each other."""
        if self.task not in TASKS:
            raise invalid(f"task {str(self.task)[:40]!r} is not known; one of {', '.join(TASKS)} is needed")
        _check_names(self.slices, "slice")
        _check_names(self.class_names, "class")
        if not self.slices or len(self.slices) != len(self.slice_widths) or min(self.slice_widths) < 1:
            raise invalid(f"{len(self.slices)} slices do not fit widths {self.slice_widths}")
        if sum(self.slice_widths) != self.head.mean.shape[0]:
            raise invalid(f"slices of {sum(self.slice_widths)} columns; the head takes {self.head.mean.shape[0]}")
        if self.task == CLASSIFICATION and (len(self.class_names) < 2 or len(self.class_names) != self.num_outputs):
            raise invalid(f"{len(self.class_names)} class names do not fit {self.num_outputs} outputs")
        if self.task == REGRESSION and self.class_names:
            raise invalid("a regression head has no class names")

    @property
    def config(self) -> HeadConfig:
        """What the head is made of."""
        return self.head.config

    @property
    def num_features(self) -> int:
        """Columns that go in."""
        return self.head.mean.shape[0]

    @property
    def num_outputs(self) -> int:
        """Columns that come out."""
        return self.head.linears[-1].out_features

    @property
    def size_bytes(self) -> int:
        """Memory that the tensors take."""
        return sum(one.numel() * one.element_size() for one in self.head.state_dict().values())

    def to(self, device: torch.device | str) -> TrainedHead:
        """Move the tensors to a device, in place, and return the head."""
        self.head.to(device)
        return self

    @torch.inference_mode()
    def predict(self, x_BD: Tensor) -> Tensor:
        """Return class probabilities, or values.

        Args:
            x_BD: The head's slices of the embedding, side by side, raw. Any floating-point type, any device.

        Shape:
            x_BD: (B, D); returns (B, K), float32, on the head's device.

        Raises:
            WireError: SHAPE_MISMATCH.
        """
        if x_BD.ndim != 2 or x_BD.shape[1] != self.num_features:
            raise WireError(
                ErrorCode.SHAPE_MISMATCH,
                f"the head takes (rows, {self.num_features}), slices {', '.join(self.slices)}; got {tuple(x_BD.shape)}",
            )
        outputs_BK: Tensor = self.head(x_BD.to(self.head.mean))
        return outputs_BK.softmax(dim=1) if self.task == CLASSIFICATION else outputs_BK


def _check_names(names: Sequence[str], what: str) -> None:
    if not all(isinstance(name, str) and name for name in names):
        raise invalid(f"every {what} has a name that is not empty")
    if len(set(names)) != len(names):
        raise invalid(f"a {what} name occurs twice")
