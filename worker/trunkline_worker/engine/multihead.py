"""Many heads on one embedding: each run once over all of its rows in a batch, those of one structure in one pass."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import SliceSpec

from trunkline_worker.engine.memory import is_out_of_memory
from trunkline_worker.heads.stacking import PackedHead, predict_stacked

logger = logging.getLogger(__name__)

# Shape suffix legend: B = rows, D = columns, E = columns that go past the trunk, K = outputs, G = heads, N = rows of
# each


class Head(Protocol):
    """The part of a trained head that is needed here."""

    @property
    def slices(self) -> tuple[str, ...]:
        """Names of the first input's slices, in the order in which their columns go in."""

    @property
    def num_features(self) -> int:
        """Columns that go in."""

    @property
    def more_width(self) -> int:
        """Columns of the inputs that go past the trunk."""

    @property
    def num_outputs(self) -> int:
        """Number of outputs, K."""

    @property
    def size_bytes(self) -> int:
        """Memory that it takes."""

    def predict(self, x_BD: Tensor) -> Tensor:
        """Return (B, K) outputs, float32."""


@dataclass(frozen=True)
class HeadRows:
    """Rows of a batch that one head answers for. ``key`` tells heads apart, ``more_BE`` goes past the trunk."""

    key: str
    head: Head
    start: int
    stop: int
    more_BE: npt.NDArray[np.float32] | None = None


class Columns:
    """Finds the columns of slices in the embedding behind one cut."""

    def __init__(self, slices: Sequence[SliceSpec]) -> None:
        """Lay out slices that lie side by side, the first one from column 0."""
        first = slices[0].start
        self._ranges = {one.name: (one.start - first, one.stop - first) for one in slices}

    def select(self, embedding_BD: Tensor, names: Sequence[str], rows: slice | list[int] = slice(None)) -> Tensor:
        """Return the columns of the named slices, in that order. A view where they, and the rows, lie side by side."""
        ranges: list[tuple[int, int]] = []
        for name in names:
            start, stop = self._ranges[name]
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            else:
                ranges.append((start, stop))
        parts = [embedding_BD[:, start:stop][rows] for start, stop in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class HeadRun(NamedTuple):
    """What came of the heads of a batch.

    Attributes:
        results: In the order of the rows: (B, K) outputs, or why that head failed.
        num_heads: Distinct heads.
        num_stacked: Passes that ran more than one of them.
    """

    results: list[Tensor | WireError]
    num_heads: int
    num_stacked: int


def run_heads(embedding_BD: Tensor, rows: Sequence[HeadRows], columns: Columns) -> HeadRun:
    """Run every distinct head once, on all of its rows; those of one structure and as many rows together.

    What a row gets depends on its head and on the rows of the same head, not on the other heads of the batch: heads
    are never padded to each other. A head that fails, or yields NaN, takes no other one along. See ``predict_stacked``
    for how close the outputs are to those of the head run alone.

    Args:
        embedding_BD: (B, D), what the trunk gave for the whole batch.
        rows: Which head answers which rows.
        columns: Where the slices lie.
    """
    by_head: dict[str, list[HeadRows]] = {}
    places: dict[str, list[int]] = {}
    for index, one in enumerate(rows):
        by_head.setdefault(one.key, []).append(one)
        places.setdefault(one.key, []).append(index)
    passes: dict[Hashable, list[str]] = {}
    for key, parts in by_head.items():
        head = parts[0].head
        alike: Hashable = key
        if isinstance(head, PackedHead):
            alike = head.structure, sum(one.stop - one.start for one in parts)
        passes.setdefault(alike, []).append(key)
    results: list[Tensor | WireError] = [WireError(ErrorCode.INTERNAL, "not run")] * len(rows)
    num_stacked = 0
    for keys in passes.values():
        together = [by_head[key] for key in keys]
        outputs: Sequence[Tensor | WireError] | None = None
        if len(keys) > 1:
            outputs = _run_together(embedding_BD, together, columns)
        num_stacked += outputs is not None
        if outputs is None:
            outputs = [output for one in together for output in _run_alone(embedding_BD, one, columns)]
        for index, output in zip((index for key in keys for index in places[key]), outputs, strict=True):
            results[index] = output
    return HeadRun(results, len(by_head), num_stacked)


def _run_together(
    embedding_BD: Tensor, heads: Sequence[Sequence[HeadRows]], columns: Columns
) -> Sequence[Tensor] | None:
    """Run heads of one structure and as many rows in one pass. None: it failed, and each has to show on its own."""
    parts = [part for one in heads for part in one]
    modules = [one[0].head for one in heads]
    try:
        x_BD = _columns_of(embedding_BD, parts, columns)
        x_GND = x_BD.reshape(len(heads), -1, x_BD.shape[1])
        outputs_GNK = predict_stacked([one for one in modules if isinstance(one, PackedHead)], x_GND)
    except Exception as error:
        logger.warning("%d heads run one by one after %s in their common pass", len(heads), type(error).__name__)
        return None
    return outputs_GNK.flatten(0, 1).split([one.stop - one.start for one in parts])


def _run_alone(embedding_BD: Tensor, parts: Sequence[HeadRows], columns: Columns) -> Sequence[Tensor | WireError]:
    """Run one head on all of its rows."""
    try:
        outputs_BK = parts[0].head.predict(_columns_of(embedding_BD, parts, columns)).cpu()
        return outputs_BK.split([one.stop - one.start for one in parts])
    except Exception as error:
        return [_reason(error)] * len(parts)


def _columns_of(embedding_BD: Tensor, parts: Sequence[HeadRows], columns: Columns) -> Tensor:
    """Return what goes into heads that read the same slices, one row after another."""
    rows: slice | list[int] = slice(parts[0].start, parts[0].stop)
    if len(parts) > 1:
        rows = [row for one in parts for row in range(one.start, one.stop)]
    x_BD = columns.select(embedding_BD, parts[0].head.slices, rows)
    more = [one.more_BE for one in parts if one.more_BE is not None]
    if not more:
        return x_BD
    return torch.cat([x_BD, torch.from_numpy(np.concatenate(more)).to(x_BD)], dim=1)


def _reason(error: Exception) -> WireError:
    """Return why a head failed, in words for whoever sent the rows."""
    if isinstance(error, WireError):
        return error
    if is_out_of_memory(error):
        return WireError(
            ErrorCode.WORKER_OOM, "this model's head does not fit this worker's memory with these rows; send fewer rows"
        )
    logger.error("a head failed", exc_info=error)
    return WireError(
        ErrorCode.INTERNAL,
        "this model's head failed on these rows; the cluster's log says why. If it does so every time, train the model "
        "again",
    )
