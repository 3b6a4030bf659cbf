"""Codes of bottlenecks back to the features at their cut, before anything else happens to them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor

from trunkline_wire.bottleneck import Bottleneck
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import CutSpec

LoadBottleneck = Callable[[str], Bottleneck]
"""From the SHA-256 of its file to a bottleneck. Blocks."""

CAPACITY = 64
"""Most bottlenecks that are kept."""


class Bottlenecks:
    """The bottlenecks used last. Used from one event loop."""

    def __init__(self, load: LoadBottleneck | None, executor: Executor) -> None:
        """Keep how they are loaded, off the loop. None: there are none here."""
        self._load = load
        self._executor = executor
        self._known: OrderedDict[str, Bottleneck] = OrderedDict()

    async def get(self, sha256: str, cut: CutSpec) -> Bottleneck:
        """Return a bottleneck for the features at a cut.

        Raises:
            WireError: UNSUPPORTED where there are none; NOT_FOUND; CORRUPT_DATA; INCOMPATIBLE for other features.
        """
        if self._load is None:
            raise WireError(ErrorCode.UNSUPPORTED, "this engine knows no bottlenecks; send the features themselves")
        if sha256 not in self._known:
            self._known[sha256] = await asyncio.get_running_loop().run_in_executor(self._executor, self._load, sha256)
            while len(self._known) > CAPACITY:
                self._known.popitem(last=False)
        found = self._known[sha256]
        self._known.move_to_end(sha256)
        if found.space.fingerprint != cut.fingerprint:
            raise WireError(
                ErrorCode.INCOMPATIBLE,
                f"bottleneck {sha256[:12]}... is for cut {found.space.cut!r} of {found.space.backbone}, not for cut "
                f"{cut.name!r} as it is here",
            )
        return found
