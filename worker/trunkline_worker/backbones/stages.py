"""The ends of a backbone's stages: what is tapped, and what cuts are called by.

Networks of every family are built from a main sequence of blocks, somewhere in their tree of modules: ``layer1`` to
``layer4``, ``features.0`` to ``features.7``, ``encoder.layers.encoder_layer_0`` and so on. The tree is taken apart,
level by level, until that sequence lies open. A stage ends where the shape of a row changes from one block to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from trunkline_worker.backbones.cuts import Point
from trunkline_worker.backbones.layout import is_picture, num_places
from trunkline_worker.backbones.trace import SCOPE
from trunkline_worker.backbones.values import Value

MIN_TAPS = 4
"""A network whose blocks are all of one shape, such as a vision transformer, is tapped at this many depths."""

MAX_TAPS = 8
"""A network whose shape changes more often is tapped once for each resolution."""

_MOST_OF_IT = 0.8
_WEIGHT_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.MultiheadAttention)


@dataclass(frozen=True)
class _Item:
    """A module in the sequence that a network is made of, and the node with its output."""

    path: str
    node: str
    shape: tuple[int, ...]
    is_block: bool


class Stages:
    """Takes a network apart until its main sequence lies open.

    Attributes:
        taps: Names of the nodes at the ends of stages, by depth.
    """

    def __init__(
        self, network: nn.Module, graph: fx.Graph, values: Mapping[str, Value], points: Sequence[Point]
    ) -> None:
        """Find them.

        Args:
            network: With the module paths that the graph's nodes carry.
            graph: Of the network.
            values: What ``cuts.measure`` said.
            points: What ``cuts.points`` said, under any names.
        """
        self._network = network
        self._values = values
        self._place = {point.node: index for index, point in enumerate(points)}
        self._end_of = {path: point.node for point in points if point.is_cut for path in point.ends}
        self._macs = _macs_by_path(graph, values)
        self._opened = {""}
        items = self._open("")
        while (wide := self._widest(items)) is not None:
            self._opened.add(wide.path)
            index = items.index(wide)
            items = [*items[:index], *self._open(wide.path), *items[index + 1 :]]
        self.taps = self._taps(items)

    def name_of(self, ends: Sequence[str]) -> str:
        """Return the outermost of the modules that end at a node, of those that were not taken apart."""
        return min((path for path in ends if path not in self._opened), key=lambda one: one.count("."), default="")

    def _open(self, path: str) -> list[_Item]:
        """Return the modules inside one that end in a picture, in order. Lists of modules are seen through."""
        items = []
        for name, child in self._network.get_submodule(path).named_children():
            inner = f"{path}.{name}" if path else name
            node = self._end_of.get(inner)
            shape = self._values[node].shape if node else None
            if node and shape is not None and is_picture(shape):
                items.append(_Item(inner, node, shape, _num_weight_layers(child) > 1))
            elif isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                self._opened.add(inner)
                items.extend(self._open(inner))
        return sorted(items, key=lambda one: self._place[one.node])

    def _widest(self, items: Sequence[_Item]) -> _Item | None:
        """Return the module that must be opened: the only block, or one that is most of the network."""
        blocks = [one for one in items if one.is_block]
        for one in blocks:
            inside = self._open(one.path)
            is_most = self._macs.get(one.path, 0) > _MOST_OF_IT * self._macs[""]
            deep = [inner for inner in inside if inner.is_block]
            if len(blocks) == 1 and (deep or len({inner.shape for inner in inside}) > 1):
                return one
            if is_most and len({inner.shape for inner in deep}) > 1:
                return one
        return None

    def _taps(self, items: Sequence[_Item]) -> list[str]:
        runs = self._runs(items, _same_stage)
        if len(runs) > MAX_TAPS:
            runs = self._runs(items, lambda one, following: num_places(one.shape) == num_places(following.shape))
        blocks = [run for run in runs if run[0].is_block]
        while len(blocks) < MIN_TAPS and max((len(run) for run in blocks), default=0) > 1:
            longest = max(blocks, key=len)
            index, half = runs.index(longest), len(longest) // 2
            runs[index : index + 1] = [longest[:half], longest[half:]]
            blocks = [run for run in runs if run[0].is_block]
        return [run[-1].node for run in runs]

    def _runs(self, items: Sequence[_Item], together: Callable[[_Item, _Item], bool]) -> list[list[_Item]]:
        sizes = {num_places(one.shape) for one in items if one.is_block}
        runs: list[list[_Item]] = []
        for one in items:
            if not one.is_block and num_places(one.shape) in sizes:
                continue  # a single layer counts only at a resolution at which no block ends
            if runs and together(runs[-1][-1], one):
                runs[-1].append(one)
            else:
                runs.append([one])
        return runs


def _same_stage(one: _Item, following: _Item) -> bool:
    if one.is_block and following.is_block:
        return one.shape == following.shape
    return not one.is_block and not following.is_block and num_places(one.shape) == num_places(following.shape)


def _num_weight_layers(module: nn.Module) -> int:
    return sum(isinstance(one, _WEIGHT_LAYERS) for one in module.modules())


def _macs_by_path(graph: fx.Graph, values: Mapping[str, Value]) -> dict[str, int]:
    macs = {"": 0}
    for node in graph.nodes:
        cost = values[node.name].macs
        parts = str(node.meta.get(SCOPE, "")).split(".")
        for path in {".".join(parts[:depth]) for depth in range(len(parts) + 1)}:
            macs[path] = macs.get(path, 0) + cost
    return macs
