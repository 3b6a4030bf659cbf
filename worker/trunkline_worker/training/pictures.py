"""Rows as views of pictures: pictures are split, counted and measured with, and every view is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.training.split import Indices, num_groups

# Shape suffix legend: N = rows, P = pictures, V = views of one picture


@dataclass(frozen=True)
class Pictures:
    """How the rows of a dataset belong together.

    Without views a picture is a row, whatever it is made from.

    Attributes:
        count: P.
        num_views: V: so many rows, one after another, are views of one picture, the first the picture itself.
        groups_P: Group of each picture. None: each is its own.
    """

    count: int
    num_views: int = 1
    groups_P: Indices | None = None

    @classmethod
    def of(cls, num_rows: int, num_views: int, groups_N: npt.NDArray[np.integer] | None) -> Pictures:
        """Check and keep what a dataset says of its rows.

        Raises:
            WireError: INVALID_ARGUMENT where rows, views and groups do not fit; BAD_LABELS for a single group.
        """
        if num_views < 1 or num_rows % num_views:
            raise WireError(
                ErrorCode.INVALID_ARGUMENT, f"{num_rows} rows are no whole number of pictures with {num_views} views"
            )
        if groups_N is None:
            return cls(num_rows // num_views, num_views)
        if groups_N.shape != (num_rows,):
            raise WireError(
                ErrorCode.INVALID_ARGUMENT, f"groups of shape {groups_N.shape} for {num_rows} rows; one each is needed"
            )
        groups_P = np.asarray(groups_N[::num_views], dtype=np.int64)
        if num_rows and num_groups(groups_P, len(groups_P)) < 2:
            raise WireError(
                ErrorCode.BAD_LABELS, "all rows are in one group, which cannot be split; leave the groups out"
            )
        return cls(num_rows // num_views, num_views, groups_P)

    def groups_of(self, pictures: Indices) -> Indices | None:
        """Return the groups of some pictures. None: each is its own."""
        return None if self.groups_P is None else self.groups_P[pictures]

    def views(self, pictures: Indices) -> Indices:
        """Return the rows that are views of some pictures, in their order."""
        return (pictures[:, None] * self.num_views + np.arange(self.num_views)).reshape(-1)

    def firsts(self, values: Tensor) -> Tensor:
        """Return of one value a row those of the pictures themselves."""
        return values if self.num_views == 1 else values[:: self.num_views]

    def spread(self, values: Tensor) -> Tensor:
        """Return one value a row of one a picture."""
        return values if self.num_views == 1 else values.repeat_interleave(self.num_views, dim=0)

    def take(self, pictures: Indices) -> Pictures:
        """Return some of the pictures."""
        return Pictures(len(pictures), self.num_views, self.groups_of(pictures))

    @property
    def num_groups(self) -> int:
        """How many parts a split may have at most."""
        return num_groups(self.groups_P, self.count)

    def scored(self, device: torch.device) -> Tensor | None:
        """Return which rows are pictures themselves, by which alone is measured, (N,). None: all."""
        if self.num_views == 1:
            return None
        return torch.arange(self.count * self.num_views, device=device) % self.num_views == 0

    def row_groups(self) -> Indices | None:
        """Return the group of each row, in which the views of a picture are one. None: each row is its own."""
        if self.num_views == 1:
            return self.groups_P
        groups_P = np.arange(self.count, dtype=np.int64) if self.groups_P is None else self.groups_P
        return np.repeat(groups_P, self.num_views)
