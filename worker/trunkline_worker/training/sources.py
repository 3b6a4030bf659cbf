"""What a training job trains on: the inputs of its rows, and which of their columns enter the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import invalid
from trunkline_wire.specs import SliceSpec

from trunkline_worker.heads.inputs import HeadInput

# Shape suffix legend: N = rows, D = columns


@dataclass(frozen=True)
class Source:
    """One input of every row.

    Attributes:
        name: The backbone, or the local model.
        columns_ND: Its embedding, local features, or a map. An array, or a tensor on the device that trains.
        slices: Side by side from column 0. Local features and maps are a single one.
        map_shape: Channels, height and width where the columns are a map. Else empty.
        is_local: Whether they are local features, which always enter whole.
    """

    name: str
    columns_ND: npt.NDArray[np.floating] | Tensor
    slices: tuple[SliceSpec, ...]
    map_shape: tuple[int, ...] = ()
    is_local: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether there is nothing to choose: every column enters."""
        return self.is_local or bool(self.map_shape)

    @cached_property
    def tensor(self) -> Tensor:
        """The columns as a tensor, where they are."""
        if isinstance(self.columns_ND, Tensor):
            return self.columns_ND
        # Rows read from storage cannot be written to, and torch will not have such memory.
        return torch.from_numpy(np.require(self.columns_ND, requirements=["C", "W"]))

    @property
    def width(self) -> int:
        """Columns that its slices reach."""
        return max((one.stop for one in self.slices), default=0)

    def take(self, names: Sequence[str]) -> list[SliceSpec]:
        """Return the slices of those names, in the embedding's order.

        Raises:
            WireError: NOT_FOUND for one that it does not have.
        """
        known = {one.name for one in self.slices}
        missing = [name for name in names if name not in known]
        if missing:
            raise WireError(
                ErrorCode.NOT_FOUND,
                f"slice {missing[0][:80]!r} is not part of this embedding, which has "
                f"{', '.join(sorted(known)) or 'none'}",
            )
        return [one for one in self.slices if one.name in names]

    def head_input(self, chosen: Sequence[SliceSpec]) -> HeadInput:
        """Return what enters the head of these slices."""
        return HeadInput(tuple(one.name for one in chosen), tuple(one.width for one in chosen), self.map_shape)

    def columns(self, chosen: Sequence[SliceSpec]) -> Tensor:
        """Return the columns of these slices, side by side."""
        if len(chosen) == len(self.slices):
            return self.tensor[:, : self.width]
        return torch.cat([self.tensor[:, one.start : one.stop] for one in chosen], dim=1)


def slices_by_source(names: Sequence[str], sources: Sequence[Source]) -> list[list[str]]:
    """Sort the names of slices by source: ``SLICE`` belongs to the first, ``SOURCE:SLICE`` to any.

    Raises:
        WireError: INVALID_ARGUMENT for a source that has something to choose from, and of which no slice is named.
    """
    index = {one.name: number for number, one in enumerate(sources)}
    found: list[list[str]] = [[] for _ in sources]
    for name in names:
        owner, colon, rest = name.partition(":")
        if colon and owner in index:
            found[index[owner]].append(rest)
        else:
            found[0].append(name)
    for source, chosen in zip(sources, found, strict=True):
        if not chosen and not source.is_whole:
            raise invalid(
                f"slices are named, none of them of {source.name!r}; name one as '{source.name}:SLICE', or leave the "
                "choice to embedding 'auto'"
            )
    return found
