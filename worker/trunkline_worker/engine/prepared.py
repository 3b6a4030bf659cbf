"""The runtimes in use, each chosen when its first rows arrive."""

from __future__ import annotations

from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.engine.choice import Prepared, RuntimeChooser
from trunkline_worker.engine.shared import Shared
from trunkline_worker.engine.targets import TrunkKey
from trunkline_worker.engine.threads import Threads

CAPACITY = 16
"""Most runtimes, one per cut, input size and tap, that are kept in memory."""


class Runtimes:
    """The runtimes used last. Requests under way hold on to one that is dropped. Used from one event loop."""

    def __init__(self, chooser: RuntimeChooser, threads: Threads) -> None:
        """Keep who chooses, and where."""
        self._chooser = chooser
        self._threads = threads
        self._kept: Shared[TrunkKey, Prepared] = Shared(self._prepare, capacity=CAPACITY)

    def __contains__(self, key: object) -> bool:
        """Whether the runtime of a group is ready or being prepared."""
        return key in self._kept

    def start(self, key: TrunkKey) -> None:
        """Begin to prepare a runtime, unless it is ready or being prepared."""
        self._kept.start(key)

    def known(self, key: TrunkKey) -> Prepared | None:
        """Return a runtime if it is ready, else None."""
        return self._kept.known(key)

    async def get(self, key: TrunkKey, left_s: float | None = None) -> Prepared:
        """Return the runtime of a group, choosing it on first use. Other groups go on meanwhile.

        Args:
            key: Which.
            left_s: Seconds that the caller has; None for any time. The runtime is prepared all the same.

        Raises:
            WireError: DEADLINE_EXCEEDED if it is not ready in time.
        """
        try:
            return await self._kept.get(key, left_s)
        except TimeoutError as error:
            raise WireError(
                ErrorCode.DEADLINE_EXCEEDED,
                f"cut {key.cut!r} at {key.input_size} px is used for the first time and its runtime is still being "
                "prepared; the same call will work in some seconds",
            ) from error

    def close(self) -> None:
        """Stop everything that is being prepared."""
        self._kept.cancel()

    async def _prepare(self, key: TrunkKey) -> Prepared:
        prepared = await self._threads.export(self._chooser.remembered, *key)
        if prepared is None:
            candidates = await self._threads.export(self._chooser.candidates, *key)
            # Where batches run, so that none runs beside the measurement.
            prepared = await self._threads.compute(self._chooser.measure, key.cut, key.input_size, candidates, key.tap)
        return prepared
