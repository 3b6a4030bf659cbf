"""A model card as the Hugging Face Hub reads it: YAML for machines, then Markdown for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline_wire.heads import MULTI_LABEL, ORDINAL

from trunkline._report import text
from trunkline._report.files import check_place, write_whole
from trunkline._report.markdown import block, code, plain, table
from trunkline._report.material import Material, gather
from trunkline._report.scoring import interval, score_name
from trunkline._report.yaml import to_yaml
from trunkline.scores import held_out_scores

if TYPE_CHECKING:
    from trunkline._deadline import Deadline
    from trunkline.models import Model

_SHOWN_CLASSES = 50
_MAX_WARNINGS, _WARNING_LENGTH = 20, 1000
_HUB_METRICS = {"f1_macro": "f1", "f1_micro": "f1", "r2": "r_squared"}
"""What the Hub calls metrics that it has other names for."""

_WHAT = {
    MULTI_LABEL: "tells which of its classes a row is of, any number of them",
    ORDINAL: "tells which of its classes, which have an order, a row is of",
}


def write_card(model: Model, path: str | Path | None, deadline: Deadline) -> str:
    """Return a card, and write it where a path is given.

    Raises:
        InvalidArgumentError: The file cannot be written.
        TrunklineError: The cluster cannot be reached, and the like.
    """
    place = None if path is None else Path(path).expanduser()
    if place is not None:
        check_place(place)
    content = render_card(gather(model, deadline, with_answers=False))
    if place is not None:
        write_whole(place, content)
    return content


def render_card(material: Material) -> str:
    """Return the card."""
    parts = [
        f"---\n{to_yaml(_metadata(material))}---",
        f"# {plain(text.shorten(material.record.reference))}",
        _section("Description", _description(material)),
        _section("Intended use", _intended_use(material)),
        _section("Training data", _training_data(material)),
        _section("How it was trained", _training(material)),
        _section("Evaluation", _evaluation(material)),
        _section("Calibration", _calibration(material)),
        _section("Limitations", _limitations(material)),
        _section("How to use it", _usage(material)),
        _section("Environment", _environment(material)),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(material: Material) -> dict[str, Any]:
    record, metrics = material.record, material.metrics
    names = list(held_out_scores(metrics))
    pipeline = _pipeline(material)
    backbones = [one.space.backbone for one in record.inputs if one.space.backbone]
    tags = ["trunkline", "transfer-learning", record.task.replace("_", "-"), *map(_named, backbones)]
    data = _named(record.dataset)
    results = {
        "task": {"type": pipeline, "name": record.task.replace("_", " ")},
        "dataset": {"type": _named(record.dataset.partition("@")[0]), "name": data, "split": "held out"},
        "metrics": [_metric(material, name) for name in names],
    }
    found: dict[str, Any] = {"library_name": "trunkline", "pipeline_tag": pipeline, "tags": list(dict.fromkeys(tags))}
    if record.dataset:
        found["datasets"] = [_named(record.dataset.partition("@")[0])]
    if names:
        found["metrics"] = list(dict.fromkeys(_HUB_METRICS.get(name, name) for name in names))
        found["model-index"] = [{"name": _named(record.name), "results": [results]}]
    return found


def _metric(material: Material, name: str) -> dict[str, Any]:
    within = interval(material.metrics, name)
    shown = f"{score_name(name)} (95 % interval {within})" if within else score_name(name)
    return {"type": _HUB_METRICS.get(name, name), "name": shown, "value": round(material.metrics[name], 6)}


def _named(name: str) -> str:
    return text.shorten(name, 200)


def _pipeline(material: Material) -> str:
    has_pictures = any(not one.space.is_local for one in material.record.inputs)
    if not material.record.class_names:
        return "tabular-regression"
    return "image-classification" if has_pictures else "tabular-classification"


def _embedding(material: Material) -> str:
    names = dict.fromkeys(one.space.source for one in material.record.inputs if one.space.source)
    local = all(one.space.is_local for one in material.record.inputs)
    what = "local features" if local else "frozen embeddings" if len(names) > 1 else "the frozen embedding"
    tuned = material.record.fine_tuning
    if tuned is not None and tuned.kept:
        what = f"blocks of its own, trained behind {code(tuned.cut)},"
    return f"{what} of {' and '.join(map(code, names))}" if names else what


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}"


def _description(material: Material) -> str:
    record = material.record
    if record.class_names:
        what = _WHAT.get(record.task, "tells which of its classes a row is of")
        of = f"{text.amount(len(record.class_names), 'class')}"
    else:
        what, of = "predicts numbers", text.amount(record.num_outputs, "number")
    facts = [f"- {name}: {code(value, 300)}" for name, value in material.facts if value]
    return f"A head on {_embedding(material)}, made with Trunkline. It {what} ({of}).\n\n" + "\n".join(facts)


def _intended_use(material: Material) -> str:
    record = material.record
    rows = "Rows like those of its training data"
    if not record.class_names:
        return f"{rows}. Beyond the range of the values that it was trained on nobody has measured it."
    names = ", ".join(code(one) for one in record.class_names[:_SHOWN_CLASSES])
    more = len(record.class_names) - _SHOWN_CLASSES
    rest = f" and {more:,} more" if more > 0 else ""
    outside = (
        "A row of none of these classes may get any of them."
        if record.task != MULTI_LABEL
        else "Of classes that are not among these it says nothing."
    )
    return f"{rows}, to be told apart as: {names}{rest}. {outside}"


def _training_data(material: Material) -> str:
    record, metrics = material.record, material.metrics
    lines = [f"- dataset: {code(record.dataset)}"] if record.dataset else []
    if record.dataset_digest:
        lines.append(f"- its content: {code(record.dataset_digest, 128)}")
    for name, words in (
        ("num_rows", "rows"),
        ("num_train_rows", "rows to train on"),
        ("num_validation_rows", "rows held out"),
    ):
        if name in metrics:
            lines.append(f"- {words}: {metrics[name]:,.0f}")
    return "\n".join(lines) or "The cluster does not say."


def _training(material: Material) -> str:
    record, metrics, status = material.record, material.metrics, material.status
    trained = "Head and blocks were trained together" if material.is_tuned else "The head alone was trained"
    lines = [f"{trained}, on {_embedding(material)}."]
    if status is not None:
        fit = status.spec.fit
        loss = f", loss {code(material.loss)}" if material.loss else ""
        lines.append(f"- solver {code(fit.solver)}{loss}, seed {fit.seed}")
        lines.append(f"- {text.percent(fit.validation_fraction)} of the rows held out to measure")
    if material.is_refitted:
        lines.append("- fitted once more on all rows after it was measured")
    if "l2" in metrics:
        lines.append(f"- penalty: {text.number(metrics['l2'])}")
    if "best_epoch" in metrics:
        lines.append(f"- best epoch: {metrics['best_epoch']:.0f}")
    if record.candidates:
        lines.append(f"- sets of slices compared in cross-validation: {len(record.candidates)}")
    if record.trials:
        lines.append(f"- configurations compared in a sweep: {len(record.trials)}")
    tuned = record.fine_tuning
    if tuned is not None:
        verdict = "kept" if tuned.kept else "not kept"
        lines.append(f"- last blocks of the backbone, behind {code(tuned.cut)}, fine-tuned and {verdict}")
    if "train_s" in metrics:
        lines.append(f"- training took {text.seconds(max(0.0, metrics['train_s']))}")
    return f"{lines[0]}\n\n" + "\n".join(lines[1:]) if len(lines) > 1 else lines[0]


def _evaluation(material: Material) -> str:
    metrics = material.metrics
    names = list(held_out_scores(metrics))
    if not names:
        return "No rows were held out, so nothing was measured."
    rows = [(score_name(one), text.score(metrics[one]), interval(metrics, one) or text.NONE) for one in names]
    held_out = metrics.get("num_validation_rows")
    where = f"On {text.amount(held_out, 'row')} held out:" if held_out else "On rows held out:"
    return f"{where}\n\n{table(('score', 'value', '95 % interval'), rows)}"


def _calibration(material: Material) -> str:
    metrics = material.metrics
    if not material.record.class_names:
        return "It predicts numbers, not probabilities."
    if "ece" not in metrics:
        return "Its probabilities were not calibrated, or the cluster does not say."
    before = (
        f", and {text.score(metrics['ece_uncalibrated'])} as it was fitted" if "ece_uncalibrated" in metrics else ""
    )
    scaled = f" Its outputs are divided by {text.number(metrics['temperature'])}." if "temperature" in metrics else ""
    return f"The expected calibration error on held-out rows is {text.score(metrics['ece'])}{before}.{scaled}"


def _limitations(material: Material) -> str:
    lines = [f"- {plain(text.shorten(one, _WARNING_LENGTH))}" for one in material.record.warnings[:_MAX_WARNINGS]]
    more = len(material.record.warnings) - _MAX_WARNINGS
    if more > 0:
        lines.append(f"- and {more} more warnings")
    lines.append("- What it says of rows from elsewhere than its training data was not measured.")
    return "\n".join(lines)


def _usage(material: Material) -> str:
    record = material.record
    local = [one.space.local_model for one in record.inputs if one.space.is_local]
    stems = [one.space.local_model for one in record.inputs if one.space.local_model and not one.space.is_local]
    given = ["None" if len(local) == len(record.inputs) else '["picture.jpg"]']
    given += ["stem=stem"] if stems else []
    given += ["local=local"] if local else []
    lines = [
        "import trunkline",
        f"model = trunkline.connect().model({json.dumps(text.clean(record.reference))})",
        f"print(model.predict({', '.join(given)}).{'labels' if record.class_names else 'values'})",
    ]
    needed = [
        f"`{name}` stands for {what}: {', '.join(map(code, names))}."
        for name, what, names in (("stem", "stems of your own", stems), ("local", "local models", local))
        if names
    ]
    return "\n\n".join([block(lines), *needed])


def _environment(material: Material) -> str:
    record = material.record
    lines = [f"- {code(name)} {code(version)}" for name, version in sorted(record.versions.items())]
    for what, value in (("head", record.head_sha256), ("job", record.job_id)):
        if value:
            lines.append(f"- {what}: {code(value, 128)}")
    when = text.moment(record.create_time)
    if when:
        lines.append(f"- trained: {when}")
    return "\n".join(lines) or "The cluster does not say."
