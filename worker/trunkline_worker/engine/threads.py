"""The threads of an engine, by what they are for."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from trunkline_wire.errors import ErrorCode, WireError

T = TypeVar("T")


class Threads:
    """One thread computes, another brings rows to where that happens.

    Exports, which take seconds, and short work do not wait for them nor for each other.
    """

    def __init__(self, num_threads: int) -> None:
        """Prepare; a thread starts when it is first used.

        Args:
            num_threads: That torch uses for one batch.
        """
        self._compute = ThreadPoolExecutor(
            1, thread_name_prefix="trunkline-trunk", initializer=_set_threads, initargs=(num_threads,)
        )
        self._stage = ThreadPoolExecutor(1, thread_name_prefix="trunkline-stage")
        self._export = ThreadPoolExecutor(1, thread_name_prefix="trunkline-export")
        self._short = ThreadPoolExecutor(2, thread_name_prefix="trunkline-io")
        self._closed = False

    @property
    def short_pool(self) -> Executor:
        """The threads for reads and other work that is short."""
        return self._short

    async def compute(self, call: Callable[..., T], *args: Any) -> T:
        """Run on the one thread that uses the device.

        Raises:
            WireError: UNAVAILABLE after ``close``.
        """
        return await self._in(self._compute, call, *args)

    async def stage(self, call: Callable[..., T], *args: Any) -> T:
        """Run on the one thread that brings rows to the device.

        Raises:
            WireError: UNAVAILABLE after ``close``.
        """
        return await self._in(self._stage, call, *args)

    async def export(self, call: Callable[..., T], *args: Any) -> T:
        """Run on the one thread that exports.

        Raises:
            WireError: UNAVAILABLE after ``close``.
        """
        return await self._in(self._export, call, *args)

    async def short(self, call: Callable[..., T], *args: Any) -> T:
        """Run what is short.

        Raises:
            WireError: UNAVAILABLE after ``close``.
        """
        return await self._in(self._short, call, *args)

    async def close(self) -> None:
        """Take nothing new, finish what runs, end the threads."""
        self._closed = True
        loop = asyncio.get_running_loop()
        for pool in (self._stage, self._compute, self._export, self._short):
            await loop.run_in_executor(None, functools.partial(pool.shutdown, wait=True, cancel_futures=True))

    async def _in(self, pool: Executor, call: Callable[..., T], *args: Any) -> T:
        if self._closed:
            raise WireError(ErrorCode.UNAVAILABLE, "this replica has shut down; the same call will reach another one")
        return await asyncio.get_running_loop().run_in_executor(pool, call, *args)


def _set_threads(num_threads: int) -> None:
    """Set how many threads torch uses for one operation on this thread; it runs one operation at a time."""
    torch.set_num_threads(num_threads)
    with contextlib.suppress(RuntimeError):  # once in a process, before anything has run
        torch.set_num_interop_threads(1)
