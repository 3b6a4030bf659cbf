"""What was found out about the runtimes of a trunk, in storage."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_BATCH_ROWS
from trunkline_wire.specs import RuntimeResult, RuntimeSpeed, Tuning

from trunkline_worker.engine.choice import MAX_RUNTIME_ERROR
from trunkline_worker.engine.runtime_names import RUNTIMES
from trunkline_worker.store.blobs import BlobStore

logger = logging.getLogger(__name__)

_FORMAT = 1


def read_note(blobs: BlobStore, path: str) -> Tuning | None:
    """Return what an earlier measurement found out; None where there is none, or it is damaged."""
    try:
        note = json.loads(blobs.get(path))
        tuning = _tuning(note["tuning"]) if note["format"] == _FORMAT else None
    except WireError as error:
        if error.code is not ErrorCode.NOT_FOUND:
            raise
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        tuning = None
    if tuning is None or not _makes_sense(tuning):
        logger.warning("the note on runtimes at %s is damaged; they are measured anew", path)
        return None
    return tuning


def write_note(blobs: BlobStore, path: str, tuning: Tuning) -> None:
    """Keep what was found out; where storage is full, do without."""
    try:
        blobs.put(path, json.dumps({"format": _FORMAT, "tuning": asdict(tuning)}).encode())
    except WireError as error:
        logger.warning("the choice of a runtime is not kept: %s", error)


def _tuning(note: Mapping[str, Any]) -> Tuning:
    return Tuning(
        backbone=str(note["backbone"]),
        cut=str(note["cut"]),
        input_size=int(note["input_size"]),
        device=str(note["device"]),
        num_threads=int(note["num_threads"]),
        runtimes=tuple(_result(one) for one in note["runtimes"]),
        chosen=str(note["chosen"]),
        batch_rows=int(note["batch_rows"]),
        fixed=bool(note["fixed"]),
        libraries=tuple((str(name), str(version)) for name, version in note["libraries"]),
    )


def _result(note: Mapping[str, Any]) -> RuntimeResult:
    speeds: Sequence[Mapping[str, Any]] = note["speeds"]
    return RuntimeResult(
        runtime=str(note["runtime"]),
        error=float(note["error"]),
        speeds=tuple(RuntimeSpeed(int(one["batch_rows"]), float(one["rows_per_s"])) for one in speeds),
        load_s=float(note["load_s"]),
        refused=str(note["refused"]),
    )


def _makes_sense(tuning: Tuning) -> bool:
    """Whether the chosen runtime is one that could have been chosen."""
    result = tuning.runtime(tuning.chosen)
    return (
        result is not None
        and result.runtime in RUNTIMES
        and not result.refused
        and 0 <= result.error <= MAX_RUNTIME_ERROR
        and bool(result.speeds)
        and all(math.isfinite(one.rows_per_s) and one.rows_per_s > 0 for one in result.speeds)
        and 1 <= tuning.batch_rows <= MAX_BATCH_ROWS
    )
