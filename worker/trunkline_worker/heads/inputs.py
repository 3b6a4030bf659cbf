"""What enters a head: the columns of one input after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trunkline_wire.heads import invalid


@dataclass(frozen=True)
class HeadInput:
    """Columns of one input of a row: slices of a backbone's embedding, local features, or a map.

    Attributes:
        slices: Names, in the order in which their columns lie. Local features are one slice.
        widths: Columns of each.
        map_shape: Channels, height and width where the columns are a map, which is one slice then. Else empty.

    Raises:
        WireError: INVALID_ARGUMENT if the parts contradict each other.
    """

    slices: tuple[str, ...]
    widths: tuple[int, ...]
    map_shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check that the parts fit each other."""
        check_names(self.slices, "slice")
        if not self.slices or len(self.slices) != len(self.widths) or min(self.widths) < 1:
            raise invalid(f"{len(self.slices)} slices do not fit widths {self.widths}")
        if self.map_shape and (len(self.map_shape) != 3 or self.widths != (math.prod(self.map_shape),)):
            raise invalid(f"a map of shape {self.map_shape} does not fit widths {self.widths}")

    @property
    def num_columns(self) -> int:
        """Numbers a row."""
        return sum(self.widths)

    @property
    def num_statistics(self) -> int:
        """Means, and scales, that standardise it: one for each column, of a map one for each channel."""
        return self.map_shape[0] if self.map_shape else self.num_columns


class TailModule(Protocol):
    """The part of the last blocks of a backbone, a module, that heads need to know."""

    @property
    def widths(self) -> Sequence[int]:
        """Columns of each slice that they make."""

    @property
    def own_names(self) -> frozenset[str]:
        """Names, in their state, of the tensors that are kept with the head."""

    def merge(self) -> object:
        """Add for good what is added to weights at every call."""


def check_names(names: Sequence[str], what: str) -> None:
    """Check that names are there and distinct.

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    if not all(isinstance(name, str) and name for name in names):
        raise invalid(f"every {what} has a name that is not empty")
    if len(set(names)) != len(names):
        raise invalid(f"a {what} name occurs twice")
