"""The rows of a sweep on one set of slices, and the folds they lie in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from trunkline_wire.specs import SliceSpec

from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.sources import Source
from trunkline_worker.training.standardise import standardisation
from trunkline_worker.training.sweep.plan import PLAIN

# Shape suffix legend: N = rows, D = columns, M = outputs

HeldOut = list[Tensor]
"""A configuration's logits, or values, of the rows that each fold holds out, in the order of ``Folds.held``."""

Result = tuple[int, HeldOut | str]
"""Which configuration, by number, and what it gave, or why it gave nothing."""


@dataclass(frozen=True)
class Folds:
    """Which rows each fold holds out, and which it trains on: ascending.

    Together they are all rows, but for changed views of pictures that are held out: nothing is measured with these.
    """

    held: tuple[Tensor, ...]
    training: tuple[Tensor, ...]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.held)

    def first(self, count: int) -> Folds:
        """Return some of them."""
        return Folds(self.held[:count], self.training[:count])

    @classmethod
    def of(cls, fold_N: Tensor, num_folds: int, scored_N: Tensor | None = None) -> Folds:
        """Sort rows by their fold. ``scored_N``: which may be held out; None: all."""
        masks = [fold_N == fold for fold in range(num_folds)]
        return cls(
            tuple((mask_N if scored_N is None else mask_N & scored_N).nonzero().squeeze(1) for mask_N in masks),
            tuple((~mask_N).nonzero().squeeze(1) for mask_N in masks),
        )


@dataclass(frozen=True)
class FoldedRows:
    """What the configurations on one set of slices are trained on.

    Attributes:
        x_ND: Standardised columns, single precision.
        task: One of ``heads.TASKS``.
        truth: Class indices, (N,); 0 and 1, (N, M); or values, (N, M).
        num_outputs: Classes, or M.
        folds: Who holds out what.
        around: The job that the configurations vary: its loss is minimised.
    """

    x_ND: Tensor
    task: str
    truth: Tensor
    num_outputs: int
    folds: Folds
    around: JobSpec = PLAIN


def standardised_columns(source: Source, slices: Sequence[SliceSpec]) -> Tensor:
    """Return the columns of some slices, standardised once over all rows, those of the fold at hand included.

    ``cross_validate_l2`` does the same. No label takes part, and a basis of the rows serves all folds.
    """
    raw_ND = source.columns(slices).float()
    fitted = standardisation(raw_ND, [one.width for one in slices])
    return (raw_ND - fitted.mean_D) / fitted.scale_D


def portions(count: int, size: int) -> Iterator[slice]:
    """Cut a range into portions of at most so many, and at least one."""
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def by_device(numbers: Mapping[str, int], device: torch.device) -> int:
    """Return the number for a kind of device: "" stands for any other."""
    return numbers.get(device.type, numbers[""])
