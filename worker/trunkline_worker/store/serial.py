"""Records to and from the JSON text that the tables keep. ASCII, so that no database chokes on a character."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import sqlalchemy as sa
from trunkline_wire.fits import AUTO, MSE, FineTuneConfig, LossConfig, OptimiserConfig, SweepConfig
from trunkline_wire.heads import MLP, HeadConfig
from trunkline_wire.specs import FeatureSpace

from trunkline_worker.store.records import (
    BackboneChoice,
    Candidate,
    Conformal,
    DatasetSource,
    FineTuning,
    JobSpec,
    ModelInput,
    ModelRecord,
    TrialRecord,
)

_FLAT_HIDDEN = (256,)
"""What an MLP without hidden layers meant while a job said it in columns of its own."""

_MODEL_COLUMNS = ("tenant", "name", "version", "job_id", "create_time")
_CANDIDATES = "candidates"
_TRIALS = "trials"


def dumps(value: Any) -> str:
    """Return canonical JSON: equal values, equal text. NaN and infinities are kept."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def loads(text: str) -> Any:
    """Read what ``dumps`` wrote."""
    return json.loads(text)


def space_to_text(space: FeatureSpace) -> str:
    """Return a feature space as JSON. Without what came later where that is empty: equal spaces, equal text."""
    values = asdict(space)
    for name in ("local_model", "bottleneck"):
        if not values[name]:
            del values[name]
    return dumps(values)


def space_from_text(text: str) -> FeatureSpace:
    """Read what ``space_to_text`` wrote."""
    return FeatureSpace(**json.loads(text))


def sources_to_text(sources: Sequence[DatasetSource]) -> str:
    """Return inputs of a dataset as JSON."""
    return dumps([asdict(one) for one in sources])


def sources_from_text(text: str) -> tuple[DatasetSource, ...]:
    """Read what ``sources_to_text`` wrote."""
    return tuple(DatasetSource(FeatureSpace(**one["space"]), one["codec"]) for one in json.loads(text))


def spec_to_text(spec: JobSpec) -> str:
    """Return a job's specification as JSON."""
    return dumps(asdict(spec))


def spec_from_text(text: str) -> JobSpec:
    """Read what ``spec_to_text`` wrote: now, or when head and loss were columns beside the rest."""
    values = json.loads(text)
    if "head" not in values:
        kind, hidden, dropout = (values.pop(name) for name in ("head_kind", "hidden", "dropout"))
        values["head"] = {"kind": kind, "hidden": hidden or (_FLAT_HIDDEN if kind == MLP else ()), "dropout": dropout}
    values["head"] = _head(values["head"])
    values["loss"] = _loss(values.get("loss", {}), values.pop("huber_delta", 1.0))
    values["optimiser"] = OptimiserConfig(**values.get("optimiser", {}))
    if values["solver"] == "adam":  # what it was called before
        values["solver"] = "adamw"
    values["slices"] = tuple(values["slices"])
    values["more_backbones"] = tuple(BackboneChoice(**one) for one in values.get("more_backbones", ()))
    values["sweep"] = _sweep(values.get("sweep"))
    tuned = values.get("fine_tune")
    values["fine_tune"] = None if tuned is None else FineTuneConfig(**tuned)
    return JobSpec(**values)


def manifest_to_text(model: ModelRecord) -> str:
    """Return as JSON what the columns of the models' table do not say."""
    names = [one.name for one in fields(model) if one.name not in (*_MODEL_COLUMNS, _CANDIDATES, _TRIALS)]
    values = {name: getattr(model, name) for name in names}
    values["space"] = asdict(model.space)
    values["more_inputs"] = [asdict(one) for one in model.more_inputs]
    values["head"] = asdict(model.head)
    for name in ("conformal", "fine_tuning"):
        values[name] = None if values[name] is None else asdict(values[name])
    for name in ("metrics", "versions"):
        values[name] = dict(values[name])
    return dumps(values)


def tried_to_text(model: ModelRecord) -> str:
    """Return the sets of slices and the configurations that were tried as JSON."""
    candidates = [asdict(one) for one in model.candidates]
    if not model.trials:
        return dumps(candidates)
    return dumps({_CANDIDATES: candidates, _TRIALS: [asdict(one) for one in model.trials]})


def model_from_text(text: str, columns: sa.RowMapping) -> ModelRecord:
    """Read what ``manifest_to_text`` wrote, the columns of the models' table beside it.

    What a manifest of an earlier version does not say takes the record's default. Candidates that were not selected
    are left out.
    """
    values = json.loads(text)
    values["space"] = FeatureSpace(**values["space"])
    for name in ("class_names", "slices"):
        values[name] = tuple(values[name])
    values["more_inputs"] = tuple(_model_input(one) for one in values.get("more_inputs", ()))
    values["head"] = _head(values.get("head", {}))
    values["conformal"] = _conformal(values.get("conformal"))
    tuned = values.get("fine_tuning")
    values["fine_tuning"] = None if tuned is None else FineTuning(**tuned)
    values["warnings"] = tuple(values.get("warnings", ()))
    tried = json.loads(columns.get(_CANDIDATES, "[]"))
    candidates, trials = (tried[_CANDIDATES], tried[_TRIALS]) if isinstance(tried, dict) else (tried, [])
    return ModelRecord(
        **values,
        **{name: columns[name] for name in _MODEL_COLUMNS},
        candidates=tuple(Candidate(**{**one, "slices": tuple(one["slices"])}) for one in candidates),
        trials=tuple(_trial(one) for one in trials),
    )


def _head(values: Mapping[str, Any]) -> HeadConfig:
    lists = {name: tuple(values[name]) for name in ("hidden", "channels", "slices") if name in values}
    return HeadConfig(**{**values, **lists})


def _sweep(values: Mapping[str, Any] | None) -> SweepConfig | None:
    if values is None:
        return None
    lists: dict[str, Any] = {name: tuple(values[name]) for name in ("l2", "learning_rate", "dropout")}
    lists |= {name: tuple(tuple(one) for one in values[name]) for name in ("hidden", "embeddings")}
    return SweepConfig(**lists, folds=values["folds"])


def _trial(values: Mapping[str, Any]) -> TrialRecord:
    return TrialRecord(**{**values, **{name: tuple(values[name]) for name in ("slices", "hidden", "scores")}})


def _conformal(values: Mapping[str, Any] | None) -> Conformal | None:
    if values is None:
        return None
    return Conformal(tuple(values["scores"]), values["num_rows"], tuple(values["scales"]))


def _loss(values: Mapping[str, Any] | str, huber_delta: float) -> LossConfig:
    if isinstance(values, str):  # one of two, and of no use for classes
        return LossConfig(kind=AUTO if values == MSE else values, huber_delta=huber_delta)
    lists = {name: tuple(values[name]) for name in ("class_weights", "class_order") if name in values}
    return LossConfig(**{**values, **lists})


def _model_input(values: Mapping[str, Any]) -> ModelInput:
    return ModelInput(**{**values, "space": FeatureSpace(**values["space"]), "slices": tuple(values["slices"])})


def public_text(text: str, limit: int) -> str:
    """Return ``text`` as any database can keep it: no NUL, no lone surrogate, ``limit`` characters at most."""
    clean = text.replace("\0", "").encode("utf-8", "replace").decode()
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."
