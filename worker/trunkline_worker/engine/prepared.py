"""The runtimes in use, each chosen when its first rows arrive.

At first, and after an upgrade of a library, the runtimes that are quick to make are tried, which takes seconds. Those
that are slow to make, compiled ones, are tried when ``tune`` is told to measure again. Either way the choice is
remembered. A runtime that the operator fixed is not chosen, and timed only when ``tune`` asks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import Tuning

from trunkline_worker.engine.choice import Prepared
from trunkline_worker.engine.runtime_names import FROM_ONNX
from trunkline_worker.engine.shared import Shared
from trunkline_worker.engine.targets import TrunkKey
from trunkline_worker.engine.trials import Refused
from trunkline_worker.engine.tuning import Exported, RuntimeChooser

logger = logging.getLogger(__name__)

T = TypeVar("T")

CAPACITY = 16
"""Most runtimes, one per cut, input size and end, that are kept in memory."""


class Places(Protocol):
    """The part of ``Threads`` that is needed here."""

    async def compute(self, call: Callable[..., T], *args: Any) -> T:
        """Run where batches run."""

    async def export(self, call: Callable[..., T], *args: Any) -> T:
        """Run beside batches."""


class Runtimes:
    """The runtimes used last. Requests under way hold on to one that is dropped. Used from one event loop."""

    def __init__(self, chooser: RuntimeChooser, threads: Places) -> None:
        """Keep who chooses, and where."""
        self._chooser = chooser
        self._threads = threads
        self._kept: Shared[TrunkKey, Prepared] = Shared(self._prepare, capacity=CAPACITY)
        self._anew: Shared[tuple[TrunkKey, bool], Prepared] = Shared(self._measure_anew, capacity=0)

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
            WireError: DEADLINE_EXCEEDED if it is not ready in time; UNSUPPORTED if it is fixed and cannot be used.
        """
        try:
            return await self._kept.get(key, left_s)
        except TimeoutError as error:
            raise WireError(
                ErrorCode.DEADLINE_EXCEEDED,
                f"cut {key.cut!r} at {key.input_size} px is used for the first time and its runtime is still being "
                "prepared; the same call will work in some seconds",
            ) from error

    async def tune(self, key: TrunkKey, *, again: bool = False) -> Tuning:
        """Return how the runtime of a group was chosen, choosing it on first use.

        Args:
            key: Which.
            again: Measure every runtime anew, those that are slow to make too, and go on with the best of them.
                Batches wait while a runtime is measured or compiled, and run in between; until the end they use the
                runtime that there was.

        Raises:
            WireError: UNSUPPORTED if the runtime is fixed and cannot be used.
        """
        prepared = await (self._anew.get((key, True)) if again else self.get(key))
        if not prepared.batch_rows:  # fixed, and not timed yet
            prepared = await self._anew.get((key, False))
        assert prepared.tuning is not None
        return prepared.tuning

    def close(self) -> None:
        """Stop everything that is being prepared."""
        self._kept.cancel()
        self._anew.cancel()

    async def _prepare(self, key: TrunkKey) -> Prepared:
        chooser, refused = self._chooser, dict[str, str]()
        tuning = await self._threads.export(chooser.noted, key)
        if tuning is not None:
            exported = await self._exported(key, tuning.chosen)
            try:
                return await self._threads.compute(chooser.load, key, tuning, exported)
            except Refused as error:
                logger.warning(
                    "%s, which was chosen for %s/%s before, is not used any more, and runtimes are measured anew: %s",
                    *(tuning.chosen, tuning.backbone, key.cut, error),
                )
                refused[tuning.chosen] = str(error)
        if not chooser.fixed:
            return await self._measure(key, everything=False, refused=refused)
        exported = await self._exported(key, chooser.fixed)
        try:
            return await self._threads.compute(chooser.load_fixed, key, exported)
        except Refused as error:
            raise self._unusable(error) from error

    async def _measure_anew(self, key: tuple[TrunkKey, bool]) -> Prepared:
        trunk, everything = key
        prepared = await self._measure(trunk, everything=everything, refused={})
        self._kept.put(trunk, prepared)
        return prepared

    async def _measure(self, key: TrunkKey, *, everything: bool, refused: Mapping[str, str]) -> Prepared:
        chooser, compute = self._chooser, self._threads.compute
        available = chooser.available
        exported = await self._exported(key, *available)
        trials = await compute(lambda: chooser.begin(key, exported, everything=everything, refused=refused))
        for name in available:
            # One at a time, so that batches of others run in between. None runs beside a measurement.
            await compute(trials.attempt, name)
        try:
            prepared = await compute(chooser.finish, key, trials)
        except Refused as error:
            raise self._unusable(error) from error
        assert prepared.tuning is not None
        await self._threads.export(chooser.remember, key, prepared.tuning)
        return prepared

    async def _exported(self, key: TrunkKey, *names: str) -> Exported:
        """Return the exported trunk if one of the runtimes reads it, and this machine has it."""
        if FROM_ONNX.isdisjoint(set(names) & set(self._chooser.available)):
            return Exported(refused="there is no export")
        return await self._threads.export(self._chooser.exported, key)

    def _unusable(self, error: Refused) -> WireError:
        return WireError(
            ErrorCode.UNSUPPORTED,
            f"the runtime {self._chooser.fixed}, which the settings fix, cannot be used: {error}. Take it out of "
            f"`runtimes`, or name one of {', '.join(self._chooser.available)}",
        )
