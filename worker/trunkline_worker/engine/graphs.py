"""Forward passes that can be differentiated, and the last of them kept for the backward passes that may follow.

Keeping them is a cache: it spares a training step its second forward pass, and changes no bit of any answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

# Shape suffix legend: B = rows, D = outputs

MAX_GRAPHS = 16
"""Most passes that are kept."""

Inputs = tuple[Tensor, ...]
"""What a pass is differentiated by: features, (B, ...), then, if there is one, the weight and bias of a decoder."""


class Function(nn.Module):
    """A part of a network, behind a decoder that comes as a value."""

    def __init__(self, part: nn.Module, channel_axis: int) -> None:
        """Keep the part.

        Args:
            part: Features in, (B, D) out.
            channel_axis: Which axis of a row of features counts channels.
        """
        super().__init__()
        self.part = part
        self.channel_axis = channel_axis
        self._row_bytes: dict[tuple[int, torch.Size], int] = {}

    def forward(self, features: Tensor, *decoder: Tensor) -> Tensor:
        """Return the outputs, (B, D), float32."""
        if decoder:
            axis = self.channel_axis + 1
            features = functional.linear(features.movedim(axis, -1), *decoder).movedim(-1, axis)
        # A tensor of its own: the network's first layer may work in place.
        outputs_BD: Tensor = self.part(features.clone(memory_format=torch.contiguous_format)).float()
        return outputs_BD

    def graph_bytes(self, inputs: Inputs) -> int:
        """Return how many bytes a pass holds until it is differentiated, weights left out.

        Found out with one row: what is counted here takes the place of autograd's check that nothing was overwritten
        that it saved, so such a pass is good for nothing else.
        """
        kind = (len(inputs), inputs[0].shape[1:])
        if kind not in self._row_bytes:
            self._row_bytes[kind] = self._count((inputs[0][:1], *inputs[1:]))
        return self._row_bytes[kind] * len(inputs[0])

    def _count(self, inputs: Sequence[Tensor]) -> int:
        weights = {one.untyped_storage().data_ptr() for one in (*self.parameters(), *self.buffers())}
        saved: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        leaves = [one.detach().clone().requires_grad_() for one in inputs]
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            outputs_BD = self(*leaves)
        for tensor in (*leaves, outputs_BD):
            count(tensor)
        return sum(saved.values())


@dataclass(frozen=True)
class Graph:
    """What one forward pass leaves behind."""

    function: Function
    inputs: Inputs
    outputs_BD: Tensor

    @classmethod
    def run(cls, function: Function, inputs: Inputs) -> Graph:
        """Run a function forward."""
        with torch.enable_grad():
            return cls(function, inputs, function(*inputs))

    def gradients(self, gradient_BD: Tensor) -> Inputs:
        """Return the gradients of the inputs. Once only: the pass is used up."""
        return torch.autograd.grad(self.outputs_BD, self.inputs, gradient_BD)

    def is_pass_of(self, function: Function, inputs: Inputs) -> bool:
        """Whether this is what that function makes of inputs with these very bits."""
        return (
            function is self.function
            and len(inputs) == len(self.inputs)
            and all(_same_bits(one, other) for one, other in zip(inputs, self.inputs, strict=True))
        )

    @property
    def num_bytes(self) -> int:
        """Memory that it holds."""
        return self.function.graph_bytes(self.inputs)


class Graphs:
    """Keeps the last passes, within bounds. Used from one thread."""

    def __init__(self, max_bytes: int) -> None:
        """Start empty.

        Args:
            max_bytes: Most memory that they may hold together.
        """
        self._max_bytes = max_bytes
        self._kept: list[Graph] = []

    def __len__(self) -> int:
        """Return how many are kept."""
        return len(self._kept)

    def forward(self, function: Function, inputs: Inputs) -> Tensor:
        """Run a function and return its outputs. The pass is kept if there can be room for it."""
        room = self._max_bytes - function.graph_bytes(inputs)
        if room < 0:
            with torch.no_grad():
                outputs_BD: Tensor = function(*inputs)
            return outputs_BD
        while len(self._kept) >= MAX_GRAPHS or sum(one.num_bytes for one in self._kept) > room:
            del self._kept[0]
        graph = Graph.run(function, inputs)
        self._kept.append(graph)
        return graph.outputs_BD.detach()

    def take(self, function: Function, inputs: Inputs) -> Graph:
        """Return the pass of a function over some inputs, which is kept no longer; a new one if it was not."""
        for index, graph in enumerate(self._kept):
            if graph.is_pass_of(function, inputs):
                return self._kept.pop(index)
        return Graph.run(function, inputs)

    def clear(self) -> None:
        """Forget them all."""
        self._kept.clear()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.detach().view(torch.int32), other.detach().view(torch.int32))
