"""Replies that would not fit a message are refused before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_PAYLOAD_BYTES
from trunkline_wire.specs import FeatureSpace

from trunkline_worker.engine.api import Engine


async def check_embedding_size(engine: Engine, space: FeatureSpace, slices: Sequence[str], num_rows: int) -> None:
    """Refuse slices of an embedding, all behind the cut where none is named, that would not fit a message.

    Raises:
        WireError: PAYLOAD_TOO_LARGE.
    """
    spec = await engine.describe(space.input_size)
    cut = spec.cut(space.cut)
    wanted = set(slices) or set(cut.slices if cut else ())
    check_reply_size(num_rows, 4 * sum(spec.slice_width(name) or 0 for name in wanted), "the embedding")


def check_reply_size(num_rows: int, row_bytes: int, what: str) -> None:
    """Refuse a tensor that would not fit a message.

    Raises:
        WireError: PAYLOAD_TOO_LARGE.
    """
    if num_rows * row_bytes > MAX_PAYLOAD_BYTES:
        raise WireError(
            ErrorCode.PAYLOAD_TOO_LARGE,
            f"{what} of {num_rows} rows has {num_rows * row_bytes} bytes; at most {MAX_PAYLOAD_BYTES // row_bytes} "
            "rows of these fit one reply",
        )
