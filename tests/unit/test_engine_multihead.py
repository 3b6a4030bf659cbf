"""Many heads on one embedding: each run once over its own rows, kept while in use, loaded once."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import SliceSpec
from trunkline_worker.engine.multihead import Columns, HeadCache, HeadRows, run_heads
from trunkline_worker.store.blobs import BlobStore

SLICES = (SliceSpec("a", 10, 12), SliceSpec("b", 12, 13), SliceSpec("c", 13, 17))


class Scale:
    """A head that multiplies its columns."""

    num_outputs = 2

    def __init__(self, factor: float, slices: tuple[str, ...], error: WireError | None = None) -> None:
        self.factor = factor
        self.slices = slices
        self.error = error
        self.calls: list[int] = []

    def predict(self, x_BD: Tensor) -> Tensor:
        self.calls.append(len(x_BD))
        if self.error is not None:
            raise self.error
        return x_BD * self.factor


@pytest.fixture
def embedding() -> Tensor:
    return torch.arange(6 * 7, dtype=torch.float32).reshape(6, 7)


def test_columns_are_found_behind_a_cut_in_any_order(embedding: Tensor) -> None:
    columns = Columns(SLICES)
    assert columns.select(embedding, ["a"]).tolist() == embedding[:, 0:2].tolist()
    assert (
        columns.select(embedding, ["c", "a"]).tolist() == torch.cat([embedding[:, 3:7], embedding[:, 0:2]], 1).tolist()
    )
    both = columns.select(embedding, ["a", "b"])
    assert both.tolist() == embedding[:, 0:3].tolist()
    assert both.data_ptr() == embedding.data_ptr()  # side by side: nothing is copied


def test_every_head_runs_once_on_its_own_rows(embedding: Tensor) -> None:
    one, two = Scale(10, ("a",)), Scale(100, ("c", "b"))
    rows = [
        HeadRows("one", one, 0, 1),
        HeadRows("two", two, 1, 3),
        HeadRows("one", one, 3, 5),
        HeadRows("two", two, 5, 6),
    ]
    results = run_heads(embedding, rows, Columns(SLICES))
    assert (one.calls, two.calls) == ([3], [3])
    for part, row in zip(results, rows, strict=True):
        mine = embedding[row.start : row.stop]
        expected = mine[:, 0:2] * 10 if row.key == "one" else torch.cat([mine[:, 3:7], mine[:, 2:3]], 1) * 100
        assert isinstance(part, Tensor)
        torch.testing.assert_close(part, expected)


def test_a_head_that_fails_takes_no_other_along(embedding: Tensor) -> None:
    error = WireError(ErrorCode.SHAPE_MISMATCH, "wrong head")
    bad, good = Scale(1, ("a",), error), Scale(1, ("a",))
    rows = [HeadRows("bad", bad, 0, 1), HeadRows("good", good, 1, 2), HeadRows("bad", bad, 2, 3)]
    results = run_heads(embedding, rows, Columns(SLICES))
    assert results[0] is error
    assert isinstance(results[1], Tensor)
    assert results[2] is error


@pytest.fixture
def store(tmp_path: Path) -> tuple[BlobStore, list[str]]:
    blobs = BlobStore(f"file://{tmp_path}/store")
    hashes = []
    for index in range(5):
        data = f"head {index}".encode()
        hashes.append(hashlib.sha256(data).hexdigest())
        blobs.put(f"heads/{hashes[-1]}", data)
    return blobs, hashes


def _cache(blobs: BlobStore, pool: ThreadPoolExecutor, load: object, capacity: int = 3) -> HeadCache:
    return HeadCache(blobs, load_head=load, head_path=lambda sha: f"heads/{sha}", capacity=capacity, executor=pool)  # type: ignore[arg-type]


def test_heads_used_last_are_kept(store: tuple[BlobStore, list[str]]) -> None:
    blobs, hashes = store
    loaded: list[bytes] = []

    def load(data: bytes) -> Scale:
        loaded.append(data)
        return Scale(1, ("a",))

    async def main() -> None:
        with ThreadPoolExecutor(2) as pool:
            cache = _cache(blobs, pool, load)
            for sha in [*hashes[:3], hashes[0], hashes[3], hashes[0], hashes[1]]:
                await cache.get(sha)
            assert len(cache) == 3

    asyncio.run(main())
    assert loaded == [b"head 0", b"head 1", b"head 2", b"head 3", b"head 1"]


def test_concurrent_callers_share_one_load_and_one_may_give_up(store: tuple[BlobStore, list[str]]) -> None:
    blobs, hashes = store
    may_finish = threading.Event()
    loads: list[bytes] = []

    def load(data: bytes) -> Scale:
        loads.append(data)
        assert may_finish.wait(10)
        return Scale(1, ("a",))

    async def main() -> None:
        with ThreadPoolExecutor(2) as pool:
            cache = _cache(blobs, pool, load)
            tasks = [asyncio.ensure_future(cache.get(hashes[0])) for _ in range(5)]
            await asyncio.sleep(0)
            tasks[0].cancel()
            await asyncio.sleep(0)
            may_finish.set()
            heads = await asyncio.gather(*tasks[1:])
            assert len({id(one) for one in heads}) == 1

    asyncio.run(main())
    assert loads == [b"head 0"]


def test_a_damaged_or_missing_head_is_named_and_not_kept(store: tuple[BlobStore, list[str]]) -> None:
    blobs, hashes = store
    blobs.put(f"heads/{hashes[0]}", b"head O")

    async def main() -> None:
        with ThreadPoolExecutor(2) as pool:
            cache = _cache(blobs, pool, lambda _data: Scale(1, ("a",)))
            with pytest.raises(WireError) as caught:
                await cache.get(hashes[0])
            assert caught.value.code is ErrorCode.CORRUPT_DATA
            with pytest.raises(WireError) as caught:
                await cache.get("0" * 64)
            assert caught.value.code is ErrorCode.NOT_FOUND
            blobs.put(f"heads/{hashes[0]}", b"head 0")
            assert (await cache.get(hashes[0])).num_outputs == 2

    asyncio.run(main())
