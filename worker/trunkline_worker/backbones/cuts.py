"""The points of a graph where exactly one tensor crosses, and the graph split there.

One pass over the nodes in order keeps the set of values that depend on the input and are still needed: where it holds a
single tensor, the graph can be cut.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from trunkline_wire.specs import INPUT_CUT

from trunkline_worker.backbones.trace import ENDS, SCOPE
from trunkline_worker.backbones.values import Value

_SAME_VALUE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
"""Modules that in evaluation mode return what they are given."""


@dataclass(frozen=True)
class Point:
    """A place between two nodes.

    Attributes:
        name: By module path, or the path and the operation.
        node: The node's name in the graph.
        ends: Paths of the modules whose output it is, the innermost first.
        crossing: Names of all values that cross there; a cut is a point where this is the node itself alone.
    """

    name: str
    node: str
    ends: tuple[str, ...]
    crossing: tuple[str, ...]

    @property
    def is_cut(self) -> bool:
        """Whether exactly one tensor crosses."""
        return self.crossing == (self.name,)


def points(
    module: fx.GraphModule, values: Mapping[str, Value], until: str, name_of: Callable[[Sequence[str]], str]
) -> list[Point]:
    """Return every point up to a node, in order; those where exactly one tensor crosses are the cuts.

    Args:
        module: The graph.
        values: What ``measure`` said.
        until: Name of the last node that counts.
        name_of: Paths of modules that end at a node, the innermost first, to the one that names it; empty for none.
    """
    nodes = needed(module.graph, values, until)
    place = {node: index for index, node in enumerate(nodes)}
    last_use = [max((place[user] for user in node.users if user in place), default=len(nodes)) for node in nodes]
    names = _Names(name_of)
    result: list[Point] = []
    named: dict[int, str] = {}
    alive: list[int] = []
    for index, node in enumerate(nodes):
        value = values[node.name]
        alive = [one for one in alive if last_use[one] > index]
        if not value.is_known:
            alive.append(index)
        if value.shape is None:
            named[index] = names.of(node)
            continue
        ends = tuple(node.meta.get(ENDS, ()))
        if alive == [index] and len(result) > 1 and result[-1].is_cut and _keeps_value(module, node):
            # The tensor of the cut before, under another name.
            before = result.pop()
            around = name_of(ends)
            ends = (*before.ends, *ends)
            # It keeps its name, unless it had no module's, or this is the end of a module around it.
            outer = around and (not before.ends or before.name.startswith(f"{around}."))
            named[index] = around if outer else before.name
            names.replace(before.name, named[index])
            result.append(Point(named[index], node.name, ends, (named[index],)))
            continue
        named[index] = names.of(node)
        result.append(Point(named[index], node.name, ends, tuple(named[one] for one in alive)))
    return result


def needed(graph: fx.Graph, values: Mapping[str, Value], until: str) -> list[fx.Node]:
    """Return the nodes that depend on the input and that ``until`` depends on, in order.

    What is made of the input's sizes alone, such as an encoding of places, does not depend on it: a part makes its own.
    """
    wanted: set[fx.Node] = {next(node for node in graph.nodes if node.name == until)}
    for node in reversed(graph.nodes):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    nodes: list[fx.Node] = []
    dependent: set[fx.Node] = set()
    for node in graph.nodes:
        if node in wanted and (node.op == "placeholder" or not dependent.isdisjoint(node.all_input_nodes)):
            nodes.append(node)
            if not values[node.name].is_known:
                dependent.add(node)
    return nodes


def _keeps_value(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), _SAME_VALUE)


class _Names:
    """Names nodes, each once."""

    def __init__(self, name_of: Callable[[Sequence[str]], str]) -> None:
        self._name_of = name_of
        self._taken: dict[str, int] = {INPUT_CUT: 0}

    def of(self, node: fx.Node) -> str:
        """Return a module's path where a module ends; else the path of the module around it and the operation."""
        name = INPUT_CUT if node.op == "placeholder" else self._name_of(node.meta.get(ENDS, ()))
        if not name:
            scope = node.meta.get(SCOPE, "")
            name = f"{scope}.{_operation(node)}" if scope else _operation(node)
        count = self._taken.get(name, 0)
        self._taken[name] = count + 1
        return f"{name}_{count}" if count else name

    def replace(self, name: str, by: str) -> None:
        """Take a name back, because its node got another."""
        if name != by:
            self._taken.pop(name, None)
            self._taken[by] = self._taken.get(by, 0) + 1


def _operation(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    return str(getattr(node.target, "__name__", node.name)).strip("_")


def part(
    module: fx.GraphModule,
    start: str,
    end: str,
    values: Mapping[str, Value],
    *,
    first: nn.Module | None = None,
    pools: Mapping[str, nn.Module] | None = None,
) -> fx.GraphModule:
    """Return the part of a graph between two of its nodes. Shares the weights.

    Args:
        module: The whole graph.
        start: Name of the node whose value is the part's input.
        end: Name of the node whose value is its output.
        values: What ``measure`` said of the whole graph.
        first: What the input goes through before anything else.
        pools: Node names to what becomes of these nodes' values, at once, so that large ones are not kept. The output
            is then all that comes of them, side by side in this order.
    """
    pools = pools or {}
    wanted = set(pools) or {end}
    for node in reversed(module.graph.nodes):
        if node.name in wanted and node.name != start and not values[node.name].is_known:
            wanted.update(one.name for one in node.all_input_nodes)
    graph = fx.Graph()
    extra: dict[str, nn.Module] = {} if first is None else {"trunkline_first": first}
    features = graph.placeholder("features")
    rows: fx.Node | None = None
    made: dict[str, Any] = {}
    pooled: dict[str, fx.Node] = {}
    for node in module.graph.nodes:
        if node.name == start:
            made[node.name] = features if first is None else graph.call_module("trunkline_first", (features,))
        elif node.name not in wanted:
            continue
        elif (number := values[node.name].constant) is not None:
            made[node.name] = number
        elif (factor := values[node.name].per_row) is not None:
            # A multiple of the batch size: worked out from this part's own input.
            rows = rows or graph.call_method("size", (features, 0))
            made[node.name] = rows if factor == 1 else graph.call_function(operator.mul, (rows, factor))
        else:
            made[node.name] = graph.node_copy(node, lambda one: made[one.name])
        if node.name in pools:
            extra[f"trunkline_pool_{len(pooled)}"] = pools[node.name]
            pooled[node.name] = graph.call_module(f"trunkline_pool_{len(pooled)}", (made[node.name],))
    if pools:
        graph.output(graph.call_function(torch.cat, ([pooled[name] for name in pools],), {"dim": 1}))
    else:
        graph.output(made[end])
    return fx.GraphModule(_Root(module, extra), graph, "Part")


class _Root(nn.Module):
    """Where a new graph finds what it calls."""

    def __init__(self, module: nn.Module, extra: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, child in (*module.named_children(), *extra.items()):
            self.add_module(name, child)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, value in vars(module).items():
            # Graphs of torch.export keep constants as plain tensors.
            if isinstance(value, torch.Tensor):
                setattr(self, name, value)
