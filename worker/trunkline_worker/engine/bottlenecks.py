"""The bottlenecks whose codes arrive, found by the hash of their files."""

from __future__ import annotations

from collections.abc import Callable

from trunkline_wire.bottleneck import Bottleneck
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import CutSpec

from trunkline_worker.engine.shared import Shared
from trunkline_worker.engine.threads import Threads

LoadBottleneck = Callable[[str], Bottleneck]
"""From the SHA-256 of its file to a bottleneck. Blocks."""

CAPACITY = 64
"""Most bottlenecks that are kept."""


class Bottlenecks:
    """The bottlenecks used last. Used from one event loop."""

    def __init__(self, load: LoadBottleneck | None, threads: Threads) -> None:
        """Keep how they are loaded, and where. None: there are none here."""
        self._load = load
        self._threads = threads
        self._kept: Shared[str, Bottleneck] = Shared(self._loaded, capacity=CAPACITY)

    async def get(self, sha256: str, cut: CutSpec) -> Bottleneck:
        """Return a bottleneck for the features at a cut.

        Raises:
            WireError: UNSUPPORTED where there are none; NOT_FOUND; CORRUPT_DATA; INCOMPATIBLE for other features.
        """
        found = await self._kept.get(sha256)
        made_for = (found.space.fingerprint, found.feature_shape, found.channel_axis)
        if made_for != (cut.fingerprint, cut.feature_shape, cut.channel_axis):
            raise WireError(
                ErrorCode.INCOMPATIBLE,
                f"bottleneck {sha256[:12]}... is for cut {found.space.cut!r} of {found.space.backbone}, not for cut "
                f"{cut.name!r} as it is here",
            )
        return found

    async def _loaded(self, sha256: str) -> Bottleneck:
        if self._load is None:
            raise WireError(ErrorCode.UNSUPPORTED, "this engine knows no bottlenecks; send the features themselves")
        return await self._threads.short(self._load, sha256)

    def close(self) -> None:
        """Stop everything that is being loaded."""
        self._kept.cancel()
