"""Heads ready to serve: the numbers of each in one piece of memory, many of one structure in one pass.

The numbers are not kept side by side in a bank: copying those of the heads that a batch needs costs the same from
anywhere, and this way a head is a thing of its own, which can come and go while others run.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import weakref
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from trunkline_wire.heads import CONV, ORDINAL, PROTOTYPE, TAIL, HeadConfig

from trunkline_worker.heads.artefact import MakeTail, head_from_bytes
from trunkline_worker.heads.inputs import HeadInput, TailModule
from trunkline_worker.heads.layers import activate
from trunkline_worker.heads.model import Head, TrainedHead, answers, check_columns

# Shape suffix legend: G = heads in one pass, N = rows of each, D = columns of all inputs, H = one layer's width,
# K = outputs, P = numbers of a head, I = inputs, F = common width of fused inputs

MAX_GATHERED = 2**17
"""Matrices of up to this many numbers are copied side by side and multiplied in one call. Reading and writing a larger
one costs more than the call that is saved: it is multiplied where it lies."""

_CHUNK_BYTES = 2**21  # Copies of one pass: so few that the product still finds them in the processor's cache

_known: weakref.WeakValueDictionary[tuple[object, ...], Structure] = weakref.WeakValueDictionary()
_known_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor lies among a head's numbers."""

    start: int
    stop: int
    shape: tuple[int, ...]


class Structure:
    """All about a head but its numbers. Heads share a pass if they share this object.

    Attributes:
        config: What the head is made of.
        inputs: What goes in.
        num_outputs: Columns of the output layer.
        task: What the outputs mean.
        places: Where each tensor lies, by its name in the head's state.
        num_features: D.
        num_gathered: Numbers, from the first one on, that a pass of several heads copies.
        gathered_names: The tensors that these make up, in order.
        gathered_sizes: Numbers of each.
    """

    def __init__(self, config: HeadConfig, inputs: tuple[HeadInput, ...], num_outputs: int, task: str) -> None:
        """Lay out the numbers. Use ``structure_of``: structures made here are never shared."""
        self.config = config
        self.inputs = inputs
        self.num_outputs = num_outputs
        self.task = task
        module = Head(config, inputs, num_outputs, device="meta")
        self.norm_eps = [float(norm.eps) for norm in module.norms]  # type: ignore[arg-type]
        shapes = {name: tuple(one.shape) for name, one in module.state_dict().items()}
        large = {name for name, shape in shapes.items() if len(shape) > 1 and math.prod(shape) > MAX_GATHERED}
        self.places: dict[str, _Place] = {}
        start = 0
        for name in sorted(shapes, key=lambda name: name in large):
            stop = start + math.prod(shapes[name])
            self.places[name] = _Place(start, stop, shapes[name])
            start = stop
        self.num_features = sum(one.num_columns for one in inputs)
        self.gathered_names = [name for name in self.places if name not in large]
        self.gathered_sizes = [math.prod(shapes[name]) for name in self.gathered_names]
        self.num_gathered = sum(self.gathered_sizes)


def structure_of(head: TrainedHead) -> Structure:
    """Return the structure of a head; the same object for as long as any head of that structure is there."""
    config = dataclasses.replace(head.config, dropout=0.0)  # matters to training alone
    key = (config, head.inputs, head.head.output.out_features, head.task)
    with _known_lock:
        known = _known.get(key)
        if known is None:
            known = _known[key] = Structure(*key)
        return known


class PackedHead:
    """A head on the CPU that can only predict, without the module: its numbers and little else.

    Attributes:
        structure: What the numbers mean.
        flat_P: All of them, float32.
        gathered: Those that a pass of several heads copies; a view.
    """

    __slots__ = ("flat_P", "gathered", "structure")

    def __init__(self, structure: Structure, flat_P: Tensor) -> None:
        """Wrap numbers laid out as the structure says."""
        self.structure = structure
        self.flat_P = flat_P
        self.gathered = flat_P if structure.num_gathered == len(flat_P) else flat_P[: structure.num_gathered]

    @property
    def slices(self) -> tuple[str, ...]:
        """Names of the first input's slices."""
        return self.structure.inputs[0].slices

    @property
    def num_features(self) -> int:
        """Columns that go in."""
        return self.structure.num_features

    @property
    def more_width(self) -> int:
        """Columns of the inputs behind the first."""
        return sum(one.num_columns for one in self.structure.inputs[1:])

    @property
    def num_outputs(self) -> int:
        """Columns of the answer."""
        return self.structure.num_outputs + (self.structure.task == ORDINAL)

    @property
    def size_bytes(self) -> int:
        """Memory that the numbers take."""
        return self.flat_P.numel() * self.flat_P.element_size()

    def matrix(self, name: str) -> Tensor:
        """Return one tensor by its name in the head's state; a view."""
        place = self.structure.places[name]
        return self.flat_P[place.start : place.stop].view(place.shape)

    def predict(self, x_BD: Tensor) -> Tensor:
        """Return class probabilities, or values, (B, K). As ``TrainedHead.predict``."""
        if x_BD.ndim != 2:
            check_columns(self.structure.inputs, x_BD)
        return predict_stacked([self], x_BD.unsqueeze(0))[0]


def pack(head: TrainedHead) -> PackedHead | TrainedHead:
    """Return the head in the form in which it can be stacked; convolutions and tails, which cannot, as they are."""
    if head.config.kind in (CONV, TAIL):
        return head
    structure = structure_of(head)
    state = head.head.state_dict()
    flat_P = torch.cat([state[name].detach().to("cpu", torch.float32).reshape(-1) for name in structure.places])
    return PackedHead(structure, flat_P)


def packed_from_bytes(
    data: bytes, *, make_tail: MakeTail | None = None, device: torch.device | str = "cpu"
) -> PackedHead | TrainedHead:
    """Return the head that ``head_to_bytes`` wrote, ready to serve.

    Args:
        data: The bytes.
        make_tail: As for ``head_from_bytes``.
        device: Where the blocks of a tail run. Every other head stays on the CPU.

    Raises:
        WireError: As ``head_from_bytes`` does.
    """
    head = head_from_bytes(data, make_tail=make_tail)
    if head.head.tail is None:
        return pack(head)
    cast(TailModule, head.head.tail).merge()
    return head.to(device)


@torch.inference_mode()
def predict_stacked(heads: Sequence[PackedHead], x_GND: Tensor) -> Tensor:
    """Return what each head says of its own rows.

    Every head's outputs come from its own numbers and its own rows alone, by a product of the same shape however many
    heads are in the pass. So NaN in one stays there, and a head's outputs differ from those of the head run alone by
    rounding at most: by ``1e-6`` of what the magnitudes of the terms that were summed up come to, usually by nothing.

    Args:
        heads: One or more that share a structure.
        x_GND: The columns of all inputs, raw; the rows of each head. Any floating-point type, any device.

    Shape:
        x_GND: (G, N, D); returns (G, N, K), float32.

    Raises:
        ValueError: If the heads differ in structure, or are not as many as G.
        WireError: SHAPE_MISMATCH.
    """
    structure = heads[0].structure
    if len(heads) != len(x_GND) or any(one.structure is not structure for one in heads):
        raise ValueError(f"{len(heads)} heads for {len(x_GND)} groups of rows, or heads of several structures")
    if x_GND.shape[2] != structure.num_features:
        check_columns(structure.inputs, x_GND[0])
    x_GND = x_GND.to(heads[0].flat_P)
    chunk = max(1, _CHUNK_BYTES // (4 * structure.num_gathered))
    parts = [
        _forward(_Numbers(structure, heads[start : start + chunk]), x_GND[start : start + chunk])
        for start in range(0, len(heads), chunk)
    ]
    outputs_GNK = parts[0] if len(parts) == 1 else torch.cat(parts)
    return answers(outputs_GNK, structure.task)


class _Numbers:
    """The numbers of some heads, side by side."""

    def __init__(self, structure: Structure, heads: Sequence[PackedHead]) -> None:
        self.structure = structure
        self._heads = heads
        gathered = [one.gathered for one in heads]
        gathered_GP = gathered[0].unsqueeze(0) if len(gathered) == 1 else torch.stack(gathered)
        parts = gathered_GP.split(structure.gathered_sizes, dim=1)
        self._parts = dict(zip(structure.gathered_names, parts, strict=True))

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor of every head, flat, (G, numbers)."""
        return self._parts[name]

    def linear(self, name: str, x_GND: Tensor) -> Tensor:
        """Apply a linear layer of every head to its rows."""
        bias_GK = self[f"{name}.bias"]
        weight = f"{name}.weight"
        weights = self._parts.get(weight)
        if weights is not None:
            weights_GKD = weights.view(len(bias_GK), *self.structure.places[weight].shape)
            return torch.baddbmm(bias_GK.unsqueeze(1), x_GND, weights_GKD.transpose(1, 2))
        outputs_GNK = x_GND.new_empty(*x_GND.shape[:2], bias_GK.shape[1])
        for index, head in enumerate(self._heads):
            torch.addmm(bias_GK[index], x_GND[index], head.matrix(weight).t(), out=outputs_GNK[index])
        return outputs_GNK

    def norm(self, name: str, x_GNH: Tensor, eps: float) -> Tensor:
        """Apply a batch normalisation of every head, as one over the channels of all."""
        num_heads, num_rows, width = x_GNH.shape
        mean, var, weight, bias = (
            self[f"{name}.{part}"].reshape(-1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        x_NC = x_GNH.transpose(0, 1).reshape(num_rows, num_heads * width)
        normed_NC = functional.batch_norm(x_NC, mean, var, weight, bias, training=False, eps=eps)
        return normed_NC.view(num_rows, num_heads, width).transpose(0, 1)


def _forward(numbers: _Numbers, x_GND: Tensor) -> Tensor:
    """Return logits or values, (G, N, K): ``Head.forward`` for several heads."""
    config = numbers.structure.config
    x_GND = (x_GND - numbers["mean"].unsqueeze(1)).div_(numbers["scale"].unsqueeze(1))
    x_GNH = functional.normalize(x_GND, dim=2) if config.kind == PROTOTYPE else _fused(numbers, x_GND)
    for index in range(len(config.hidden)):
        x_GNH = numbers.linear(f"layers.{index}", x_GNH)
        if config.batch_norm:
            x_GNH = numbers.norm(f"norms.{index}", x_GNH, numbers.structure.norm_eps[index])
        x_GNH = activate(x_GNH, config.activation)
    return numbers.linear(f"layers.{len(config.hidden)}", x_GNH)


def _fused(numbers: _Numbers, x_GND: Tensor) -> Tensor:
    structure = numbers.structure
    if "fusion.projections.0.weight" not in structure.places:
        return x_GND
    vectors = x_GND.split([one.num_columns for one in structure.inputs], dim=2)
    projected = [numbers.linear(f"fusion.projections.{index}", one) for index, one in enumerate(vectors)]
    x_GNIF = torch.stack(projected, dim=2)
    if "fusion.gate.weight" not in structure.places:
        return x_GNIF.sum(dim=2)
    weights_GNIF = numbers.linear("fusion.gate", x_GNIF.flatten(2)).view_as(x_GNIF).softmax(dim=2)
    return (weights_GNIF * x_GNIF).sum(dim=2)
