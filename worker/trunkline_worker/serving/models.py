"""From what a caller names to the model meant, without asking the metadata store for every batch."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.names import parse_reference

from trunkline_worker.serving.backends import Metadata
from trunkline_worker.store.records import ModelRecord

NEWEST_TTL_S = 1.0
"""How long the answer to "which version is the newest" is kept, in seconds."""

CAPACITY = 10_000
"""Most models remembered."""

LOOKUP_TIMEOUT_S = 10.0
"""How long to wait for the metadata store, in seconds."""


class ModelLookup:
    """Remembers models: a version never changes, the newest version for a second.

    While the metadata store is away, the last known newest version answers: predictions outlive it.
    """

    def __init__(self, metadata: Metadata, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Keep where to ask and the clock."""
        self._metadata = metadata
        self._monotonic = monotonic
        self._known: OrderedDict[tuple[str, str], tuple[float, ModelRecord]] = OrderedDict()

    async def find(self, tenant: str, reference: str) -> ModelRecord:
        """Return the model that ``name`` or ``name@version`` means, without its candidates and the like.

        The record goes along with every batch, and no prediction needs them.

        Raises:
            WireError: INVALID_ARGUMENT, NOT_FOUND or UNAVAILABLE.
        """
        parsed = parse_reference(reference, "model")
        key = (tenant, reference)
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            read_at, remembered = known
            if parsed.version is not None or self._monotonic() - read_at < NEWEST_TTL_S:
                return remembered
        try:
            found = await self._metadata.call("models.get", tenant, reference, timeout_s=LOOKUP_TIMEOUT_S)
        except WireError as error:
            if error.code is ErrorCode.UNAVAILABLE and known is not None:
                return known[1]
            raise
        model: ModelRecord = replace(found, candidates=(), trials=(), conformal=None, warnings=())
        self._known[key] = (self._monotonic(), model)
        while len(self._known) > CAPACITY:
            self._known.popitem(last=False)
        return model
