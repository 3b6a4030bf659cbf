"""What every node of a graph gives and costs, found by running it with tensors that hold no data.

It is run at two batch sizes: that tells a row's shape from the batch, and which whole numbers are multiples of the
batch size, which a part of the graph can work out anew from its own input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from trunkline_worker.backbones.quiet import quiet

# Prime, and far from what networks divide their tensors by: a first dimension of this size is the batch.
_ROWS = (5, 7)


@dataclass(frozen=True)
class Value:
    """What a node of the graph gives.

    Attributes:
        shape: Of one row; None where it is no float tensor with one entry per row of the batch.
        per_row: For a whole number that is a multiple of the batch size: the factor. Else None.
        constant: For whole numbers that are the same in every batch, of a network that takes one input size only.
        macs: Multiply-adds per row of the node itself.
    """

    shape: tuple[int, ...] | None
    per_row: int | None
    constant: int | tuple[int, ...] | None
    macs: int

    @property
    def is_known(self) -> bool:
        """Whether a part needs not be given it."""
        return self.per_row is not None or self.constant is not None


def measure(module: fx.GraphModule, size: int, *, fixed: bool) -> dict[str, Value]:
    """Run a graph with tensors that hold no data, and say what each node gives.

    Args:
        module: The graph.
        size: Of the input, in pixels.
        fixed: Whether the graph is used at this size only.

    Raises:
        Exception: Whatever the network's layers raise for a size that they cannot take.
    """
    first, second = (_run(module, size, rows) for rows in _ROWS)
    values = {}
    for node in module.graph.nodes:
        one, macs = first[node.name]
        two, _ = second[node.name]
        constant = _constant(one, two) if fixed else None
        values[node.name] = Value(_row_shape(one, two), _factor(one, two), constant, macs // _ROWS[0])
    return values


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Meter(fx.Interpreter):
    """Keeps what each node gave and what it cost."""

    def __init__(self, module: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.seen: dict[str, tuple[Any, int]] = {}
        self._counter = counter

    def run_node(self, n: fx.Node) -> Any:
        before = self._counter.get_total_flops()
        result = super().run_node(n)
        macs = (self._counter.get_total_flops() - before) // 2
        kept = _Tensor(tuple(result.shape), result.dtype) if isinstance(result, torch.Tensor) else result
        self.seen[n.name] = (kept, macs)
        return result


def _run(module: fx.GraphModule, size: int, rows: int) -> dict[str, tuple[Any, int]]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation that the counter does not know
    try:
        with (
            quiet("torch._subclasses.fake_tensor"),
            torch.no_grad(),
            FakeTensorMode(allow_non_fake_inputs=True),
            FlopCounterMode(display=False) as counter,
        ):
            meter = _Meter(module, counter)
            meter.run(torch.empty(rows, 3, size, size))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return meter.seen


def _row_shape(one: Any, two: Any) -> tuple[int, ...] | None:
    if not (isinstance(one, _Tensor) and one.dtype.is_floating_point):
        return None
    shapes = [tuple(int(size) for size in value.shape) for value in (one, two)]
    if [shape[:1] for shape in shapes] != [(rows,) for rows in _ROWS] or shapes[0][1:] != shapes[1][1:]:
        return None
    return shapes[0][1:]


def _constant(one: Any, two: Any) -> int | tuple[int, ...] | None:
    if isinstance(one, (tuple, list)) and isinstance(two, (tuple, list)):
        same = _are_numbers(*one, *two) and tuple(one) == tuple(two)
        return tuple(int(size) for size in one) if same else None
    return int(one) if _are_numbers(one, two) and int(one) == int(two) else None


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) for value in values)


def _factor(one: Any, two: Any) -> int | None:
    if not _are_numbers(one, two):
        return None
    factor, rest = divmod(int(one), _ROWS[0])
    return factor if rest == 0 and factor * _ROWS[1] == int(two) and factor > 0 else None
