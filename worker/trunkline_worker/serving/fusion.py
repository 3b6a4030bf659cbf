"""The inputs of a request behind its first: found, checked, and brought to columns that go past the trunk."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from trunkline_wire import codecs, messages
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import invalid
from trunkline_wire.quantise import PackedRows, codec_of, unpack
from trunkline_wire.specs import FeatureSpace
from trunkline_wire.v1 import inference_pb2

from trunkline_worker.engine.api import Payload
from trunkline_worker.engine.checks import check_codec, check_local, check_model, check_own
from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.bottlenecks import find_bottleneck
from trunkline_worker.store.records import ModelInput, ModelRecord

# Shape suffix legend: B = rows, E = columns of the inputs behind the first, W = columns of one of them


@dataclass(frozen=True)
class MoreColumns:
    """Columns of the inputs behind the first, side by side as the model needs them; None where it needs none.

    Rows in ``row_errors`` failed in one of them, and hold zeros.
    """

    more_BE: npt.NDArray[np.float32] | None = None
    row_errors: Mapping[int, WireError] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sent:
    """An input as it was sent, and what the model needs in its place."""

    needed: ModelInput
    space: FeatureSpace
    rows: Payload


async def more_columns(
    model: ModelRecord,
    first: Payload,
    inputs: Sequence[inference_pb2.Input],
    backends: Backends,
    *,
    tenant: str,
    timeout_s: float | None,
    caller: str = "",
    wait: bool = False,
) -> MoreColumns:
    """Return what goes past the trunk of a request's first input.

    Local features are taken as they are; other backbones are asked for their slices, all at once.

    Args:
        model: Says what is needed.
        first: Rows of the first input, which another backbone may read as well.
        inputs: The others, in any order.
        backends: Where the backbones are.
        tenant: Whose bottlenecks may be used.
        timeout_s: Seconds that the caller has.
        caller: As for ``Engine.predict``.
        wait: Likewise.

    Raises:
        WireError: INVALID_ARGUMENT for one that is missing, not needed or sent twice; otherwise as the checks of
            ``engine.checks`` and the backbones do.
    """
    if not inputs and not model.more_inputs:
        return MoreColumns()
    by_source = _by_source(model, inputs)
    # All that can be refused without a backbone is refused before one is asked.
    sent = [_read(model, needed, by_source[needed.space.source], first) for needed in model.more_inputs]
    asked = {"timeout_s": timeout_s, "caller": caller, "wait": wait}
    parts = await asyncio.gather(*(_columns(model, one, backends, tenant, asked) for one in sent))
    errors: dict[int, WireError] = {}
    for part in parts:
        errors = {**part.row_errors, **errors}
    more_BE = np.concatenate([part.more_BE for part in parts if part.more_BE is not None], axis=1)
    more_BE[list(errors)] = 0.0
    return MoreColumns(more_BE, errors)


def _by_source(model: ModelRecord, inputs: Sequence[inference_pb2.Input]) -> dict[str, inference_pb2.Input]:
    needed = [one.space.source for one in model.more_inputs]
    what = f"model {model.reference} needs, beside its first input, {', '.join(needed) or 'nothing'}"
    found: dict[str, inference_pb2.Input] = {}
    for one in inputs:
        source = messages.space_from_proto(one.space).source
        if source not in needed:
            raise invalid(f"{what}; {source[:80] or 'images'!r} was sent")
        if source in found:
            raise invalid(f"{what}; {source!r} was sent twice")
        found[source] = one
    missing = [source for source in needed if source not in found]
    if missing:
        raise invalid(f"{what}; {', '.join(missing)} is missing")
    return found


def _read(model: ModelRecord, needed: ModelInput, sent: inference_pb2.Input, first: Payload) -> _Sent:
    space = messages.space_from_proto(sent.space)
    rows = codecs.decode(sent.features) if sent.HasField("features") else _same_images(space, first)
    if len(rows) != len(first):
        raise WireError(
            ErrorCode.SHAPE_MISMATCH,
            f"the inputs of a request have equally many rows; the first has {len(first)}, {space.source!r} {len(rows)}",
        )
    if space.is_local or needed.space.is_local:
        check_local(model.reference, needed, space, rows)
    else:
        check_own(model.reference, needed, space, codec_of(rows))
    return _Sent(needed, space, rows)


async def _columns(
    model: ModelRecord, sent: _Sent, backends: Backends, tenant: str, asked: Mapping[str, Any]
) -> MoreColumns:
    needed, space, rows = sent.needed, sent.space, sent.rows
    if space.is_local:
        columns_BW = unpack(rows) if isinstance(rows, PackedRows) else np.asarray(rows)
        return MoreColumns(columns_BW.astype(np.float32, copy=False))
    engine = backends.engine(space.backbone)
    spec = await engine.describe(space.input_size)
    cut = spec.cut(space.cut)
    if cut is not None:
        check_model(model.reference, needed, spec, cut)
    if space.bottleneck:
        await find_bottleneck(backends, tenant, space.bottleneck)
    # Whether there is such a cut, and all that is to be said of the rows, the engine knows.
    extraction = await engine.extract(space, rows, needed.slices, **asked)
    use = dataclasses.replace(extraction.codec_use, trained_codec=needed.codec, trained_error=needed.codec_error)
    check_codec(model.reference, use)
    return MoreColumns(extraction.embedding_BD, extraction.row_errors)


def _same_images(space: FeatureSpace, first: Payload) -> Payload:
    if isinstance(first, np.ndarray | PackedRows) or not space.is_input:
        raise invalid(
            f"input {space.source!r} came without rows; only encoded images of the first input can be read by another "
            "backbone as well, at its cut 'input'"
        )
    return first
