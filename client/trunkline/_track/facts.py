"""A job and its model as the names and numbers that trackers keep."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import trunkline
from trunkline._report.material import Material
from trunkline.records import Candidate, JobEvent, JobSpec, ServerInfo, Trial

_STEPS = ("epoch", "step")
"""Metrics of an event that say where on the way it is."""

_UNKNOWN = re.compile(r"[^\w\-./ ]", re.ASCII)


@dataclass(frozen=True)
class Table:
    """What was tried, as rows of plain values."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def to_json(self) -> str:
        """Return it as pandas reads it with ``orient="split"``."""
        return json.dumps({"columns": self.columns, "data": self.rows}, indent=1)


def spec_facts(spec: JobSpec, info: ServerInfo) -> dict[str, str]:
    """Return what was asked for as flat names and texts, and versions. What was left out has no name."""
    given = asdict(spec)
    given |= given.pop("fit")  # these are the settings of the job as much as the others
    found = dict(_flat("", given))
    if spec.fit.l2 < 0:
        found["l2"] = "auto"
    found["version.client"] = trunkline.__version__
    found["version.cluster"] = info.version
    return found | {f"version.{name}": version for name, version in sorted(info.versions.items())}


def event_scalars(event: JobEvent) -> tuple[dict[str, float], int]:
    """Return what was measured, as ``phase/metric``, and at which step: the epoch or step, else the event's number."""
    step = next((int(event.metrics[name]) for name in _STEPS if name in event.metrics), event.seq)
    phase = key(event.phase)
    return {f"{phase}/{key(name)}": value for name, value in event.metrics.items() if name not in _STEPS}, step


def model_scalars(material: Material) -> dict[str, float]:
    """Return everything that the model's record says was measured, intervals included."""
    return {f"model/{key(name)}": value for name, value in material.metrics.items()}


def model_facts(material: Material) -> dict[str, str]:
    """Return what was chosen on the way."""
    record = material.record
    slices = [*record.slices, *(name for one in record.more_inputs for name in one.slices)]
    return {
        "model.task": record.task,
        "model.slices": ", ".join(slices),
        "model.num_outputs": str(record.num_outputs),
        "model.codec": record.codec,
    }


def model_tags(material: Material) -> dict[str, str]:
    """Return what the model is, and what it was trained on."""
    record = material.record
    return {
        "trunkline.model": record.reference,
        "trunkline.dataset": record.dataset,
        "trunkline.dataset_digest": record.dataset_digest,
        "trunkline.head_sha256": record.head_sha256,
    }


def curves(material: Material) -> dict[str, tuple[float, ...]]:
    """Return the learning curves that the cluster kept: by epoch or step, from 1; long ones are thinned."""
    kept = {} if material.evaluation is None else material.evaluation.curves
    return {f"curve/{key(name)}": tuple(values) for name, values in kept.items()}


def trial_facts(trial: Trial) -> dict[str, float | str]:
    """Return the settings of a configuration of a sweep."""
    found: dict[str, float | str] = {"slices": ", ".join(trial.slices), "l2": trial.l2}
    found["hidden"] = "-".join(map(str, trial.hidden)) or "linear"
    if trial.hidden:
        found |= {"learning_rate": trial.learning_rate, "dropout": trial.dropout}
    return found


def trials_table(trials: Sequence[Trial]) -> Table:
    """Return every configuration of a sweep, in its order."""
    return Table(
        ("slices", "hidden", "l2", "learning_rate", "dropout", "score", "scores", "seconds", "won", "error"),
        tuple(
            (
                *(", ".join(one.slices), "-".join(map(str, one.hidden)) or "linear"),
                *(one.l2, one.learning_rate, one.dropout),
                *(one.score if one.scores else None, list(one.scores), one.seconds, one.won, one.error),
            )
            for one in trials
        ),
    )


def candidates_table(candidates: Sequence[Candidate]) -> Table:
    """Return the sets of slices that were compared, best first."""
    rows = tuple((", ".join(one.slices), one.width, one.score, one.accuracy) for one in candidates)
    return Table(("slices", "width", "score", "accuracy"), rows)


def key(name: str) -> str:
    """Return a name as every tracker takes it."""
    return _UNKNOWN.sub("_", name)[:100] or "_"


def _flat(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(f"{prefix}{key(name)}.", value)
        elif value not in (None, "", (), []):
            found.append((prefix + key(name), _text(value)))
    return found


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) if all(isinstance(one, (str, int, float)) for one in value) else _json(value)
    return str(value)


def _json(value: Any) -> str:
    return json.dumps(value, default=str)
