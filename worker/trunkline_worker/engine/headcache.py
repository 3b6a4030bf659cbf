"""The heads in memory: loaded on demand, kept while there is room, never given up while in use."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.engine.multihead import Head
from trunkline_worker.store.blobs import BlobStore

LoadHead = Callable[[bytes], Head]
HeadPath = Callable[[str], str]

_RETRY_S = 0.5
_MIB = 2**20


@dataclass(eq=False)
class _Kept:
    """A head that is there or on its way. ``num_users``: how many wait for it or hold it."""

    ready: asyncio.Future[Head]
    num_users: int = 0
    size_bytes: int = 0
    is_loaded: bool = False


class HeadCache:
    """The heads used last, by the SHA-256 of their files, bounded by number and bytes. Used from the event loop only.

    Reading, checking and laying out run in the executor, so neither the loop nor the batch in progress waits for them.
    Nothing is shared between heads: one that is dropped here stays whole for a batch that still has it.
    """

    def __init__(
        self,
        blobs: BlobStore,
        *,
        load_head: LoadHead,
        head_path: HeadPath,
        capacity: int,
        max_bytes: int,
        executor: Executor,
        what: str = "head",
    ) -> None:
        """Prepare.

        Args:
            blobs: Where heads lie.
            load_head: Makes a head from bytes whose hash has been checked.
            head_path: SHA-256 to the path in ``blobs``.
            capacity: Most heads that are kept.
            max_bytes: Most bytes that they take together.
            executor: Reads and loads off the loop.
            what: What they are called in what is said to callers.
        """
        self._blobs = blobs
        self._load_head = load_head
        self._head_path = head_path
        self._capacity = max(1, capacity)
        self._max_bytes = max_bytes
        self._executor = executor
        self._what = what
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # the one used longest ago first
        self._num_loaded = self._bytes = self._num_used = self._used_bytes = 0
        self.num_loads = 0

    def __len__(self) -> int:
        """Return how many heads are in memory."""
        return self._num_loaded

    @property
    def size_bytes(self) -> int:
        """Memory that they take."""
        return self._bytes

    @contextlib.asynccontextmanager
    async def use(self, sha256: str) -> AsyncIterator[Head]:
        """Return a head, loading it where it is not there; it stays until the context ends. Callers share a load.

        Raises:
            WireError: NOT_FOUND, CORRUPT_DATA, UNSUPPORTED; WORKER_OOM for a head that is larger than all the memory
                there is for heads; OVERLOADED, with a delay after which to retry, if all of that memory is in use.
                A failure is not kept: the next call tries again.
        """
        kept = self._kept.get(sha256) or self._load(sha256)
        self._kept.move_to_end(sha256)
        if not kept.num_users:
            self._num_used += 1
            self._used_bytes += kept.size_bytes
        kept.num_users += 1
        try:
            # One caller that gives up must not take the load away from the others.
            yield await asyncio.shield(kept.ready)
        finally:
            kept.num_users -= 1
            if not kept.num_users:
                self._num_used -= 1
                self._used_bytes -= kept.size_bytes

    def _load(self, sha256: str) -> _Kept:
        if self._num_used >= self._capacity or self._used_bytes >= self._max_bytes:
            raise self._full()  # before anything is read: whoever comes in vain should cost nothing
        loop = asyncio.get_running_loop()
        reading = loop.run_in_executor(self._executor, self._read, sha256)
        self._kept[sha256] = kept = _Kept(loop.create_future())
        self.num_loads += 1
        reading.add_done_callback(lambda done: self._settle(sha256, kept, done))
        return kept

    def _read(self, sha256: str) -> Head:
        return self._load_head(self._blobs.get_checked(self._head_path(sha256), sha256))

    def _settle(self, sha256: str, kept: _Kept, done: asyncio.Future[Head]) -> None:
        try:
            if done.cancelled():
                raise WireError(
                    ErrorCode.UNAVAILABLE, "this replica has shut down; the same call will reach another one"
                )
            head = done.result()
            self._make_room(head.size_bytes)
        except Exception as error:
            del self._kept[sha256]
            kept.ready.set_exception(error)
            kept.ready.exception()  # seen: those who waited may all have given up
            return
        kept.is_loaded, kept.size_bytes = True, head.size_bytes
        self._num_loaded += 1
        self._bytes += head.size_bytes
        if kept.num_users:
            self._used_bytes += head.size_bytes
        kept.ready.set_result(head)

    def _make_room(self, size_bytes: int) -> None:
        """Drop the heads used longest ago until one more fits. Those in use stay; if it takes them, nothing goes."""
        if size_bytes > self._max_bytes:
            raise WireError(
                ErrorCode.WORKER_OOM,
                f"this model's {self._what} takes {size_bytes / _MIB:.1f} MiB and this worker keeps "
                f"{self._max_bytes / _MIB:.1f} MiB of {self._what}s at most; train a smaller head, or ask the operator "
                "to raise head_memory_mb",
            )
        number, total = self._num_loaded + 1, self._bytes + size_bytes
        going: list[str] = []
        for sha256, one in self._kept.items():
            if number <= self._capacity and total <= self._max_bytes:
                break
            if one.is_loaded and not one.num_users:
                going.append(sha256)
                number, total = number - 1, total - one.size_bytes
        if number > self._capacity or total > self._max_bytes:
            raise self._full()
        for sha256 in going:
            self._bytes -= self._kept.pop(sha256).size_bytes
        self._num_loaded -= len(going)

    def _full(self) -> WireError:
        return WireError(
            ErrorCode.OVERLOADED,
            f"{self._num_used} models are in use and their {self._what}s leave no room for another one: at most "
            f"{self._capacity}, and {self._max_bytes / _MIB:.1f} MiB. Retry in {_RETRY_S:.2f} s",
            retry_delay_s=_RETRY_S,
        )
