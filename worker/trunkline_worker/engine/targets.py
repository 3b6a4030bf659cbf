"""Where the rows of a request go, and with whose rows they can share a batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from trunkline_wire.bottleneck import Bottleneck
from trunkline_wire.specs import BackboneSpec, CutSpec, SliceSpec, map_tap

from trunkline_worker.engine.choice import trunk_slices
from trunkline_worker.engine.multihead import Columns


class TrunkKey(NamedTuple):
    """Rows of equal keys share a pass of the trunk.

    ``whole``: the slice that comes out, where it is all of a tap's features; empty for the embedding.
    """

    cut: str
    input_size: int
    whole: str = ""


class LocalKey(NamedTuple):
    """Rows of local features with equal keys share a batch. The width keeps clients apart that name theirs alike."""

    local_model: str
    width: int


@dataclass(frozen=True)
class Target:
    """Where the rows of a request enter the network, and what is wanted behind.

    Attributes:
        spec: The backbone at the rows' input size.
        cut: Where they enter.
        precision: Of the stem that made them.
        slices: What is wanted, side by side from column 0.
        bottleneck: Turns the rows into the features at the cut first, if they are codes.
    """

    spec: BackboneSpec
    cut: CutSpec
    precision: str
    slices: tuple[SliceSpec, ...]
    bottleneck: Bottleneck | None = None

    @cached_property
    def key(self) -> TrunkKey:
        """The group of the rows."""
        name = self.slices[0].name
        return TrunkKey(self.cut.name, self.spec.preprocessing.input_size, "" if map_tap(name) is None else name)

    @cached_property
    def columns(self) -> Columns:
        """Where the slices lie in what the trunk gives."""
        return Columns(trunk_slices(self.spec, self.cut.name, self.key.whole))

    @cached_property
    def slice_names(self) -> tuple[str, ...]:
        """Names of what is wanted."""
        return tuple(one.name for one in self.slices)
