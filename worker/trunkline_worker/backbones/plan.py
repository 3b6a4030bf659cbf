"""What a traced network is cut, tapped and pooled at."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import INPUT_CUT

from trunkline_worker.backbones.cuts import Point, needed, points
from trunkline_worker.backbones.embedding import Tap, TapPool
from trunkline_worker.backbones.layout import channel_axis
from trunkline_worker.backbones.stages import Stages
from trunkline_worker.backbones.trace import Traced
from trunkline_worker.backbones.values import Value

_CLASSIFIER_MODULES = (nn.Linear, nn.Conv2d)
_CLASSIFIER_FUNCTIONS = (
    nn.functional.linear,
    nn.functional.conv2d,
    torch.ops.aten.linear.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.addmm.default,
)


@dataclass(frozen=True)
class Cut:
    """A point of a graph where exactly one tensor crosses.

    Attributes:
        name: By module path.
        node: Of the graph.
        shape: Of one row at the network's own input size.
        channel_axis: Which axis of a row counts channels.
        num_parameters: Trained numbers before it.
    """

    name: str
    node: str
    shape: tuple[int, ...]
    channel_axis: int
    num_parameters: int


@dataclass(frozen=True)
class Plan:
    """Where one network is cut, tapped and pooled. Holds names of nodes, not nodes: it stays true for a copy.

    Attributes:
        backbone: The network's name, for messages.
        values: What every node gives, at the network's own input size.
        nodes: Names of the nodes that the output is made of, in order.
        points: Every point, in order.
        cuts: Those where exactly one tensor crosses, from ``input`` to ``pooled``.
        taps: Ends of stages.
        pooled: The last cut: what enters the classifier.
        output: Name of the node with the network's own output.
    """

    backbone: str
    values: Mapping[str, Value]
    nodes: tuple[str, ...]
    points: tuple[Point, ...]
    cuts: tuple[Cut, ...]
    taps: tuple[Tap, ...]
    pooled: Cut
    output: str

    def find(self, name: str) -> Cut:
        """Return the cut of that name.

        Raises:
            WireError: See ``Backbone.check_cut``.
        """
        for cut in self.cuts:
            if cut.name == name:
                return cut
        raise self._no_cut(name)

    def taps_behind(self, cut: str) -> list[Tap]:
        """Return the taps at a cut or behind it: the tensor at a cut can itself be tapped."""
        place = {one.name: index for index, one in enumerate(self.cuts)}
        return [tap for tap in self.taps if place[tap.name] >= place[self.find(cut).name]]

    def costs(self, values: Mapping[str, Value]) -> dict[str, int]:
        """Return the multiply-adds per row up to and with each node, of the values measured at some input size."""
        total, costs = 0, {}
        for name in self.nodes:
            total += values[name].macs
            costs[name] = total
        return costs

    def _no_cut(self, name: str) -> WireError:
        known = [cut.name for cut in self.cuts]
        for index, point in enumerate(self.points):
            if name != point.name and name not in point.ends:
                continue
            if point.name in known:
                return WireError(
                    ErrorCode.INVALID_ARGUMENT, f"the cut at {name[:80]!r} of {self.backbone} is called {point.name!r}"
                )
            before = [one.name for one in self.points[:index] if one.name in known]
            after = [one.name for one in self.points[index:] if one.name in known]
            nearest = f"{before[-1]!r} before it" + (f" and {after[0]!r} after it" if after else "")
            why = (
                "it lies behind the embedding"
                if point.is_cut
                else f"{len(point.crossing)} tensors cross there, {_listed(point.crossing)}"
            )
            return WireError(
                ErrorCode.INVALID_ARGUMENT,
                f"{self.backbone} cannot be cut at {name[:80]!r}: {why}. The nearest cuts: {nearest}",
            )
        near = difflib.get_close_matches(name[:80], known, n=3, cutoff=0.6)
        hint = f" Did you mean {' or '.join(repr(one) for one in near)}?" if near else ""
        stages = ", ".join([INPUT_CUT, *(tap.name for tap in self.taps)])
        return WireError(
            ErrorCode.NOT_FOUND,
            f"{self.backbone} has no cut {name[:80]!r}.{hint} It has {len(known)} cuts; where its stages end: {stages}",
        )


def make_plan(backbone: str, network: nn.Module, traced: Traced) -> Plan:
    """Find a network's cuts, taps and classifier.

    Args:
        backbone: Its name, for messages.
        network: Its modules, for their paths.
        traced: Its graph.

    Raises:
        WireError: UNSUPPORTED where it does not return one tensor of numbers for each row.
    """
    module, values = traced.module, traced.values
    output = _output(backbone, module.graph, values)
    found = points(module, values, output, lambda ends: min(ends, key=len, default=""))
    stages = Stages(network, module.graph, values, found)
    found = points(module, values, output, stages.name_of)
    nodes = needed(module.graph, values, output)
    pooled = _pooled(module, nodes, values, found)
    numbers = _parameters_before(module, nodes)
    cuts = []
    for point in found[: found.index(pooled) + 1]:
        shape = values[point.node].shape
        if point.is_cut and shape is not None:
            cuts.append(Cut(point.name, point.node, shape, channel_axis(shape), numbers[point.node]))
    by_node = {cut.node: cut for cut in cuts}
    taps = [by_node[node] for node in stages.taps if node in by_node and node != pooled.node]
    return Plan(
        backbone=backbone,
        values=values,
        nodes=tuple(node.name for node in nodes),
        points=tuple(found),
        cuts=tuple(cuts),
        taps=tuple(Tap(cut.name, cut.node, TapPool(cut.shape), cut.shape[cut.channel_axis]) for cut in taps),
        pooled=cuts[-1],
        output=output,
    )


def _output(backbone: str, graph: fx.Graph, values: Mapping[str, Value]) -> str:
    """Return the name of the node with the logits."""
    returned = next(node for node in graph.nodes if node.op == "output").args[0]
    if isinstance(returned, (tuple, list)) and len(returned) == 1:
        (returned,) = returned
    if not isinstance(returned, fx.Node) or len(values[returned.name].shape or ()) != 1:
        raise WireError(
            ErrorCode.UNSUPPORTED,
            f"{backbone} must return one float tensor of shape (rows, outputs), and nothing beside it",
        )
    return returned.name


def _pooled(
    module: fx.GraphModule, nodes: Sequence[fx.Node], values: Mapping[str, Value], found: Sequence[Point]
) -> Point:
    """Return the cut before the network's classifier, or the output of a network that has none of its own.

    The classifier is the last linear layer or convolution. If a layer with weights of its own, such as a normalisation,
    follows, or if its output is added to something else place by place, the network ends in features. And what enters
    the classifier must be one tensor.
    """
    cuts = [point for point in found if point.is_cut]
    place = {node.name: index for index, node in enumerate(nodes)}
    crossing_alone = {cut.node for cut in cuts}
    macs = list(itertools.accumulate(values[node.name].macs for node in nodes))
    for node in reversed(nodes):
        if _is_weighted(module, node):
            if node.name not in crossing_alone and len(values[node.name].shape or ()) != 1:
                break
            before = [cut for cut in cuts if place[cut.node] < place[node.name]]
            # Where most of the network lies between, several tensors go in side by side.
            whole = bool(before) and 2 * macs[place[before[-1].node]] >= macs[-1]
            return before[-1] if whole else cuts[-1]
        if node.op == "call_module" and any(True for _ in module.get_submodule(str(node.target)).parameters()):
            break
    return cuts[-1]


def _is_weighted(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), _CLASSIFIER_MODULES)
    return node.op == "call_function" and node.target in _CLASSIFIER_FUNCTIONS


def _parameters_before(module: fx.GraphModule, nodes: Sequence[fx.Node]) -> dict[str, int]:
    """Return how many trained numbers are read up to and with each of the nodes."""
    dependent = set(nodes)
    counted: set[int] = set()
    total, result = 0, {}

    def read_by(node: fx.Node) -> Iterator[nn.Parameter]:
        if node.op == "call_module":
            yield from module.get_submodule(str(node.target)).parameters()
        elif node.op == "get_attr" and isinstance(value := _attribute(module, str(node.target)), nn.Parameter):
            yield value
        for one in node.all_input_nodes:
            if one not in dependent:
                yield from read_by(one)

    for node in nodes:
        for parameter in read_by(node):
            if id(parameter) not in counted:
                counted.add(id(parameter))
                total += parameter.numel()
        result[node.name] = total
    return result


def _attribute(module: nn.Module, path: str) -> object:
    value: object = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _listed(names: Sequence[str]) -> str:
    shown = [repr(name) for name in names[:4]]
    return ", ".join(shown) + (" and others" if len(names) > 4 else "")
