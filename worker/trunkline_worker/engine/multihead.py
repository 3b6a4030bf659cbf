"""Many heads on one embedding: loaded on demand, kept while in use, each run once over all of its rows in a batch."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import SliceSpec

from trunkline_worker.store.blobs import BlobStore

# Shape suffix legend: B = rows, D = embedding columns, K = outputs


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

    def predict(self, x_BD: Tensor) -> Tensor:
        """Return (B, K) outputs, float32."""


LoadHead = Callable[[bytes], Head]
HeadPath = Callable[[str], str]


class HeadCache:
    """The heads used last, by the SHA-256 of their files. Used from the event loop only."""

    def __init__(
        self, blobs: BlobStore, *, load_head: LoadHead, head_path: HeadPath, capacity: int, executor: Executor
    ) -> None:
        """Prepare.

        Args:
            blobs: Where heads lie.
            load_head: Makes a head from bytes whose hash has been checked.
            head_path: SHA-256 to the path in ``blobs``.
            capacity: Most heads that are kept.
            executor: Reads and loads off the loop.
        """
        self._blobs = blobs
        self._load_head = load_head
        self._head_path = head_path
        self._capacity = max(1, capacity)
        self._executor = executor
        self._heads: OrderedDict[str, Head] = OrderedDict()
        self._loading: dict[str, asyncio.Future[Head]] = {}

    def __len__(self) -> int:
        """Return how many heads are kept."""
        return len(self._heads)

    async def get(self, sha256: str) -> Head:
        """Return a head, loading it where it is not kept. Concurrent callers share one load.

        Raises:
            WireError: NOT_FOUND, CORRUPT_DATA. A failure is not kept: the next call tries again.
        """
        if sha256 in self._heads:
            self._heads.move_to_end(sha256)
            return self._heads[sha256]
        if sha256 not in self._loading:
            loading = asyncio.get_running_loop().run_in_executor(self._executor, self._load, sha256)
            self._loading[sha256] = loading
            loading.add_done_callback(lambda done: self._keep(sha256, done))
        # One caller that gives up must not take the load away from the others.
        return await asyncio.shield(self._loading[sha256])

    def _load(self, sha256: str) -> Head:
        return self._load_head(self._blobs.get_checked(self._head_path(sha256), sha256))

    def _keep(self, sha256: str, done: asyncio.Future[Head]) -> None:
        self._loading.pop(sha256, None)
        if done.cancelled() or done.exception() is not None:
            return
        self._heads[sha256] = done.result()
        while len(self._heads) > self._capacity:
            self._heads.popitem(last=False)


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

    def select(self, embedding_BD: Tensor, names: Sequence[str]) -> Tensor:
        """Return the columns of the named slices, in that order. A view where they lie side by side."""
        ranges: list[tuple[int, int]] = []
        for name in names:
            start, stop = self._ranges[name]
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            else:
                ranges.append((start, stop))
        parts = [embedding_BD[:, start:stop] for start, stop in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def run_heads(embedding_BD: Tensor, rows: Sequence[HeadRows], columns: Columns) -> list[Tensor | WireError]:
    """Run every distinct head once, on all of its rows.

    Args:
        embedding_BD: (B, D), what the trunk gave for the whole batch.
        rows: Which head answers which rows.
        columns: Where the slices lie.

    Returns:
        In the order of ``rows``: (B, K) outputs, or why that head failed. A head that fails takes no other one along.
    """
    groups: dict[str, list[int]] = {}
    for index, one in enumerate(rows):
        groups.setdefault(one.key, []).append(index)
    results: list[Tensor | WireError] = [WireError(ErrorCode.INTERNAL, "not run")] * len(rows)
    for indices in groups.values():
        head = rows[indices[0]].head
        parts = [embedding_BD[rows[index].start : rows[index].stop] for index in indices]
        try:
            gathered = columns.select(parts[0] if len(parts) == 1 else torch.cat(parts), head.slices)
            more = [part for index in indices if (part := rows[index].more_BE) is not None]
            if more:
                gathered = torch.cat([gathered, torch.from_numpy(np.concatenate(more)).to(gathered)], dim=1)
            outputs_BK = head.predict(gathered)
        except WireError as error:
            for index in indices:
                results[index] = error
            continue
        for index, part in zip(indices, outputs_BK.split([len(one) for one in parts]), strict=True):
            results[index] = part
    return results
