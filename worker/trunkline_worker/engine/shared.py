"""Results that are made once for everybody who asks for them."""

from __future__ import annotations

import asyncio
import functools
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Shared(Generic[K, V]):
    """Makes results by key. Callers who ask while one is being made share it; those used last are kept.

    A failure is not kept: the next call tries again. Used from one event loop.
    """

    def __init__(self, make: Callable[[K], Coroutine[Any, Any, V]], *, capacity: int) -> None:
        """Prepare.

        Args:
            make: Makes the result of a key.
            capacity: Most results that are kept once they are made; 0 to share only while one is being made.
        """
        self._make = make
        self._capacity = capacity
        self._tasks: OrderedDict[K, asyncio.Future[V]] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        """Whether the result of a key is kept or being made."""
        return key in self._tasks

    def start(self, key: K) -> None:
        """Begin to make the result of a key, unless it is kept or being made."""
        self._task(key)

    async def get(self, key: K, left_s: float | None = None) -> V:
        """Return the result of a key.

        Args:
            key: Which.
            left_s: Seconds that this caller has; None for any time. The result is made all the same.

        Raises:
            TimeoutError: If it is not there in time.
            Exception: Whatever ``make`` raised.
        """
        task = self._task(key)
        if task.done():
            return task.result()
        # One caller that gives up must not take the result away from the others.
        return await asyncio.wait_for(asyncio.shield(task), left_s)

    def known(self, key: K) -> V | None:
        """Return the result of a key if it is there already, else None."""
        task = self._tasks.get(key)
        return None if task is None or not task.done() or _has_failed(task) else task.result()

    def put(self, key: K, value: V) -> None:
        """Keep a result that was made elsewhere, in place of any other of that key."""
        future: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        future.set_result(value)
        self._tasks[key] = future
        self._tasks.move_to_end(key)
        self._drop_oldest()

    def cancel(self) -> None:
        """Stop everything that is being made."""
        for task in list(self._tasks.values()):
            task.cancel()

    def _task(self, key: K) -> asyncio.Future[V]:
        task = self._tasks.get(key)
        if task is None or _has_failed(task):
            task = self._tasks[key] = asyncio.get_running_loop().create_task(self._make(key))
            task.add_done_callback(functools.partial(self._settle, key))
        self._tasks.move_to_end(key)
        return task

    def _settle(self, key: K, task: asyncio.Future[V]) -> None:
        # Looking at a failure also says that nobody needs to be told of it who has stopped waiting.
        if (_has_failed(task) or not self._capacity) and self._tasks.get(key) is task:
            del self._tasks[key]
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        done = [one for one, kept in self._tasks.items() if kept.done()]
        for one in done[: max(0, len(done) - self._capacity)]:
            del self._tasks[one]


def _has_failed(task: asyncio.Future[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
