"""Heads in memory: loaded once, bounded by number and bytes, never given up while in use."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_worker.engine.headcache import HeadCache
from trunkline_worker.store.blobs import BlobStore

SIZE = 100


class Sized:
    """A head that takes as many bytes as its file says: ``NAME SIZE``."""

    slices = ("a",)
    num_features = num_outputs = 1
    more_width = 0

    def __init__(self, data: bytes) -> None:
        self.name, size = data.decode().split()
        self.size_bytes = int(size)

    def predict(self, x_BD: Tensor) -> Tensor:
        return torch.zeros(len(x_BD), 1)


class Store:
    """Heads 0 to 9 of ``SIZE`` bytes each, by number, and one of any size."""

    def __init__(self, folder: Path) -> None:
        self.blobs = BlobStore(f"file://{folder}/store")
        self.loaded: list[str] = []
        self.sha = [self.put(f"h{index} {SIZE}") for index in range(10)]

    def put(self, text: str) -> str:
        data = text.encode()
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs.put(f"heads/{sha256}", data)
        return sha256

    def load(self, data: bytes) -> Sized:
        head = Sized(data)
        self.loaded.append(head.name)
        return head


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def _run(
    store: Store,
    test: Callable[[HeadCache], Awaitable[None]],
    *,
    capacity: int = 3,
    max_bytes: int = 10**6,
    load: Callable[[bytes], Sized] | None = None,
) -> None:
    async def main() -> None:
        with ThreadPoolExecutor(2) as pool:
            cache = HeadCache(
                store.blobs,
                load_head=load or store.load,
                head_path=lambda sha256: f"heads/{sha256}",
                capacity=capacity,
                max_bytes=max_bytes,
                executor=pool,
            )
            async with asyncio.timeout(60):
                await test(cache)

    asyncio.run(main())


async def _touch(cache: HeadCache, *hashes: str) -> None:
    for sha256 in hashes:
        async with cache.use(sha256):
            pass


async def _refused(cache: HeadCache, sha256: str, code: ErrorCode) -> WireError:
    with pytest.raises(WireError) as caught:
        await _touch(cache, sha256)
    assert caught.value.code is code
    return caught.value


@pytest.mark.parametrize("bound", [{"capacity": 3}, {"capacity": 99, "max_bytes": 3 * SIZE + SIZE // 2}])
def test_heads_used_last_are_kept(store: Store, bound: dict[str, int]) -> None:
    async def test(cache: HeadCache) -> None:
        sha = store.sha
        await _touch(cache, *sha[:3], sha[0], sha[3], sha[0], sha[1])
        assert (len(cache), cache.size_bytes, cache.num_loads) == (3, 3 * SIZE, 5)

    _run(store, test, **bound)
    assert store.loaded == ["h0", "h1", "h2", "h3", "h1"]


def test_a_large_head_takes_the_place_of_several(store: Store) -> None:
    large = store.put(f"large {2 * SIZE}")

    async def test(cache: HeadCache) -> None:
        await _touch(cache, *store.sha[:3], large)
        assert (len(cache), cache.size_bytes) == (2, 3 * SIZE)
        await _touch(cache, store.sha[2], large)
        assert cache.num_loads == 4  # both are still there

    _run(store, test, capacity=99, max_bytes=3 * SIZE)


def test_heads_in_use_stay_whatever_comes(store: Store) -> None:
    sha = store.sha

    async def test(cache: HeadCache) -> None:
        async with cache.use(sha[0]) as head, cache.use(sha[1]):
            await _touch(cache, *sha[2:9])
            assert len(cache) == 3
            async with cache.use(sha[0]) as again:
                assert again is head
            await _touch(cache, sha[1])
            assert cache.num_loads == 9
        await _touch(cache, *sha[5:8])  # in use no longer: they go like any other
        await _touch(cache, sha[0])
        assert store.loaded.count("h0") == 2

    _run(store, test)


@pytest.mark.parametrize("bound", [{"capacity": 2}, {"capacity": 99, "max_bytes": 2 * SIZE}])
def test_a_newcomer_that_finds_no_room_is_told_when_to_come_back(store: Store, bound: dict[str, int]) -> None:
    sha = store.sha

    async def test(cache: HeadCache) -> None:
        async with cache.use(sha[0]):
            async with cache.use(sha[1]):
                before = cache.num_loads
                error = await _refused(cache, sha[2], ErrorCode.OVERLOADED)
                assert error.retry_delay_s is not None and error.retry_delay_s > 0
                assert cache.num_loads == before  # nothing was read in vain
                await _touch(cache, sha[0])  # those that are there still are
            await _touch(cache, sha[2])
        assert (len(cache), cache.size_bytes) == (2, 2 * SIZE)

    _run(store, test, **bound)


def test_room_that_is_too_small_empties_nothing(store: Store) -> None:
    large = store.put(f"large {2 * SIZE}")
    sha = store.sha

    async def test(cache: HeadCache) -> None:
        await _touch(cache, sha[0])
        async with cache.use(sha[1]), cache.use(sha[2]):
            await _refused(cache, large, ErrorCode.OVERLOADED)
            await _touch(cache, sha[0])
            assert cache.num_loads == 4
        await _touch(cache, large)

    _run(store, test, capacity=99, max_bytes=3 * SIZE)


def test_a_head_larger_than_all_the_memory_is_named_and_drives_no_other_out(store: Store) -> None:
    giant = store.put(f"giant {5 * 2**20}")

    async def test(cache: HeadCache) -> None:
        await _touch(cache, *store.sha[:3])
        error = await _refused(cache, giant, ErrorCode.WORKER_OOM)
        assert "5.0 MiB" in error.message
        assert "1.0 MiB" in error.message
        assert "head_memory_mb" in error.message
        assert len(cache) == 3
        await _touch(cache, *store.sha[:3])
        assert cache.num_loads == 4

    _run(store, test, max_bytes=2**20)


class Gate:
    """Loads that wait for leave."""

    def __init__(self, store: Store) -> None:
        self.has_begun = threading.Event()
        self.may_finish = threading.Event()
        self._store = store

    def load(self, data: bytes) -> Sized:
        head = self._store.load(data)
        self.has_begun.set()
        assert self.may_finish.wait(60)
        return head


async def _held(cache: HeadCache, sha256: str, done: asyncio.Event) -> Sized:
    async with cache.use(sha256) as head:
        await done.wait()
        return head  # type: ignore[return-value]


def test_concurrent_callers_share_one_load_and_one_may_give_up(store: Store) -> None:
    gate = Gate(store)

    async def test(cache: HeadCache) -> None:
        done = asyncio.Event()
        tasks = [asyncio.ensure_future(_held(cache, store.sha[0], done)) for _ in range(5)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.sleep(0)
        gate.may_finish.set()
        done.set()
        heads = await asyncio.gather(*tasks[1:])
        assert len({id(one) for one in heads}) == 1
        assert tasks[0].cancelled()

    _run(store, test, load=gate.load)
    assert store.loaded == ["h0"]


def test_a_head_on_its_way_counts_as_in_use(store: Store) -> None:
    gate = Gate(store)

    async def test(cache: HeadCache) -> None:
        done = asyncio.Event()
        tasks = [asyncio.ensure_future(_held(cache, sha256, done)) for sha256 in store.sha[:3]]
        await asyncio.sleep(0)
        await _refused(cache, store.sha[3], ErrorCode.OVERLOADED)
        gate.may_finish.set()
        done.set()
        await asyncio.gather(*tasks)
        await _touch(cache, store.sha[3])

    _run(store, test, load=gate.load)


def test_nothing_stays_behind_when_everyone_gives_up(store: Store) -> None:
    gate = Gate(store)
    missing = "0" * 64

    async def test(cache: HeadCache) -> None:
        tasks = [asyncio.ensure_future(_held(cache, one, asyncio.Event())) for one in (store.sha[0], missing)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        gate.may_finish.set()
        async with contextlib.AsyncExitStack() as stack:  # room for three in use: nobody counts as waiting any more
            for sha256 in store.sha[1:4]:
                await stack.enter_async_context(cache.use(sha256))
            assert len(cache) == 3
        await _refused(cache, missing, ErrorCode.NOT_FOUND)

    _run(store, test, load=gate.load)


def test_a_damaged_or_missing_head_is_named_and_not_kept(store: Store) -> None:
    store.blobs.put(f"heads/{store.sha[0]}", b"h0 101")

    async def test(cache: HeadCache) -> None:
        await _refused(cache, store.sha[0], ErrorCode.CORRUPT_DATA)
        await _refused(cache, "0" * 64, ErrorCode.NOT_FOUND)
        assert (len(cache), cache.size_bytes) == (0, 0)
        store.blobs.put(f"heads/{store.sha[0]}", f"h0 {SIZE}".encode())
        await _touch(cache, store.sha[0])
        assert (len(cache), cache.num_loads) == (1, 3)

    _run(store, test, capacity=1)


def test_after_the_threads_have_ended_callers_are_sent_elsewhere(store: Store) -> None:
    gate = Gate(store)

    async def main() -> None:
        pool = ThreadPoolExecutor(1)
        cache = HeadCache(
            store.blobs,
            load_head=gate.load,
            head_path=lambda sha256: f"heads/{sha256}",
            capacity=9,
            max_bytes=10**6,
            executor=pool,
        )
        tasks = [asyncio.ensure_future(_touch(cache, sha256)) for sha256 in store.sha[:2]]
        assert await asyncio.to_thread(gate.has_begun.wait, 10)
        pool.shutdown(wait=False, cancel_futures=True)  # the second has not begun
        gate.may_finish.set()
        async with asyncio.timeout(60):
            first, second = await asyncio.gather(*tasks, return_exceptions=True)
        assert first is None
        assert isinstance(second, WireError)
        assert second.code is ErrorCode.UNAVAILABLE

    asyncio.run(main())
