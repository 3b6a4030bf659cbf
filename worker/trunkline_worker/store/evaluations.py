"""What a report shows of a training: answers on held-out rows, how it went, and labels that look wrong. As one file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from trunkline_wire.errors import ErrorCode, WireError

# Shape suffix legend: N = rows, K = outputs

MAX_ROWS = 4000
MAX_CELLS = 2_000_000
"""Most numbers of the answers that are kept: rows are left out until they fit."""

MAX_POINTS = 500
MAX_SUSPECTS = 200

_FORMAT = 1
_METADATA = "trunkline"


@dataclass(frozen=True)
class LabelSuspect:
    """A row whose label looks wrong. ``row`` is its place in the dataset; the rest is as in registry.proto."""

    row: int
    given: int
    suggested: int
    margin: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """See ``Evaluation`` in registry.proto.

    Attributes:
        rows: Places in the dataset, (N,), ascending; among its pictures, where these have views.
        num_held_out: Of so many.
        classes: (N,), or None.
        targets: (N, K), or None.
        answers: (N, K), float32.
        curves: By name.
        suspects: The most doubtful first.
    """

    rows: npt.NDArray[np.int64]
    num_held_out: int
    classes: npt.NDArray[np.int64] | None
    targets: npt.NDArray[np.float32] | None
    answers: npt.NDArray[np.float32]
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    suspects: Sequence[LabelSuspect] = ()


def evaluation_path(sha256: str) -> str:
    """Return where an evaluation of this content lies."""
    return f"evaluations/{sha256[:2]}/{sha256}.safetensors"


def sample(
    rows: npt.NDArray[np.int64],
    truth: npt.NDArray[np.generic],
    answers: npt.NDArray[np.float32],
    curves: Mapping[str, Sequence[float]],
    suspects: Sequence[LabelSuspect],
) -> Evaluation:
    """Return an evaluation of bounded size: evenly spaced rows and points where there are too many.

    Args:
        rows: Places in the dataset, ascending.
        truth: Classes, (N,), or targets, (N, K).
        answers: (N, K).
        curves: By name.
        suspects: The most doubtful first.
    """
    most = min(MAX_ROWS, max(1, MAX_CELLS // max(1, answers.shape[1])))
    kept = (
        np.unique(np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(np.int64)) if len(rows) else rows
    )
    is_one_of = truth.ndim == 1
    return Evaluation(
        rows=rows[kept],
        num_held_out=len(rows),
        classes=truth[kept].astype(np.int64) if is_one_of else None,
        targets=None if is_one_of else truth[kept].astype(np.float32),
        answers=answers[kept].astype(np.float32),
        curves={name: _thinned(values) for name, values in curves.items()},
        suspects=tuple(suspects[:MAX_SUSPECTS]),
    )


def _thinned(values: Sequence[float]) -> list[float]:
    if len(values) <= MAX_POINTS:
        return list(values)
    return [values[int(one)] for one in np.linspace(0, len(values) - 1, MAX_POINTS).round()]


def evaluation_to_bytes(evaluation: Evaluation) -> bytes:
    """Return the bytes of an evaluation. Equal ones give equal bytes."""
    tensors: dict[str, npt.NDArray[np.generic]] = {"rows": evaluation.rows, "answers": evaluation.answers}
    if evaluation.classes is not None:
        tensors["classes"] = evaluation.classes
    if evaluation.targets is not None:
        tensors["targets"] = evaluation.targets
    metadata = {
        "format": _FORMAT,
        "num_held_out": evaluation.num_held_out,
        "curves": {name: list(values) for name, values in sorted(evaluation.curves.items())},
        "suspects": [[one.row, one.given, one.suggested, one.margin] for one in evaluation.suspects],
    }
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False)
    contiguous = {name: np.ascontiguousarray(one) for name, one in tensors.items()}
    return safetensors.numpy.save(contiguous, metadata={_METADATA: text})


def evaluation_from_bytes(data: bytes) -> Evaluation:
    """Read what ``evaluation_to_bytes`` wrote.

    Raises:
        WireError: CORRUPT_DATA.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_METADATA])
        tensors = safetensors.numpy.load(data)
        return Evaluation(
            rows=tensors["rows"],
            num_held_out=int(metadata["num_held_out"]),
            classes=tensors.get("classes"),
            targets=tensors.get("targets"),
            answers=tensors["answers"],
            curves={str(name): [float(one) for one in values] for name, values in metadata["curves"].items()},
            suspects=tuple(LabelSuspect(int(a), int(b), int(c), float(d)) for a, b, c, d in metadata["suspects"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise WireError(
            ErrorCode.CORRUPT_DATA, "the evaluation of this model is damaged; train the model again"
        ) from error
