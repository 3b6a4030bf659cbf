"""The parts of a report about how the model came to be: curves, the search, time taken, how to do it again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from trunkline_wire.fits import HUBER, LOWER_IS_BETTER, QUANTILE

from trunkline._report import text
from trunkline._report.figures import Values, evenly
from trunkline._report.material import Material
from trunkline._report.page import (
    Child,
    Markup,
    facts,
    figure,
    folded,
    join,
    label,
    labels,
    note,
    paragraph,
    table,
    tag,
)
from trunkline._report.plots import Axis, bars, frame, plot
from trunkline._report.scales import LOG_SPAN, percent_scale, scale_of
from trunkline._report.scoring import score_name
from trunkline.records import JobEvent
from trunkline.training import job_to_dict

MAX_TRIALS = 50
"""Most configurations, and most sets of slices, that are listed."""

TUNE = "tune_"
"""What curves of fine-tuning begin with."""

MIXED = "Rows are mixed in pairs while it learns, so this loss is mostly larger than that of the rows as they are."
"""What to say of a training loss under mixup."""

_AT_ONCE = 12
"""Rows of a long table that are seen at once; the others are folded."""

_MAX_CURVES, _MAX_POINTS = 12, 500
_MAX_INPUTS = 16
_MAX_VERSIONS = 100
_ERROR_LENGTH = 200
_NUMBERS = ("columns", "accuracy", "score", "between folds", "penalty", "rate", "dropout", "took")
_FAILED = "failed"
_SETTINGS_LENGTH = 20_000

Curve = list[tuple[float, float]]
"""Places and heights of its points."""


def curves(material: Material) -> Markup:
    """Return how training went."""
    if material.evaluation is None:
        return paragraph("The cluster keeps no learning curves of this model.")
    kept = {name: np.asarray(one, dtype=np.float64) for name, one in material.evaluation.curves.items()}
    drawn = [(name, one) for name, one in kept.items() if np.isfinite(one).any() and not name.startswith(TUNE)]
    if not drawn:
        return paragraph("This head was computed in one go, so there are no curves.")
    metrics = material.metrics
    words = (
        f"The weights are those after epoch {metrics['best_epoch']:.0f}, the best." if "best_epoch" in metrics else ""
    )
    if material.is_refitted:
        words += " The curves are of the fit that was measured, before the last one on all rows."
    if material.is_tuned:
        words += " They are of the head alone, from which fine-tuning went on."
    if material.is_mixed and "loss" in kept:
        words += f" {MIXED}"
    unit = "epoch" if "best_epoch" in metrics else "step"
    groups = _groups(dict(drawn[:_MAX_CURVES]))
    shown = [curve_figure(group, unit, 480 if len(groups) > 1 else 640) for group in groups]
    return join([tag("div", *shown, class_="pair"), note(words.strip()) if words else None])


def search(material: Material) -> Markup:
    """Return the sets of slices and the configurations that were tried."""
    record = material.record
    if not record.candidates and not record.trials:
        return paragraph("Nothing was searched: no sets of slices and no configurations were compared.")
    return join([_candidates(material), _trials(material)])


def timings(material: Material) -> Markup:
    """Return how long training took, and what was read for it."""
    status, metrics = material.status, material.metrics
    phases = _phases(material.events)
    if phases:
        rows = [(name, spent, text.seconds(spent)) for name, spent in phases.items()]
        words = "; ".join(f"{name} {text.seconds(spent)}" for name, spent in phases.items())
        shown = figure(bars("Time of each phase of the job", words, "seconds", rows))
    else:
        shown = paragraph("The job's events are gone, so how long its phases took is not known.")
    whole = None
    if status is not None and status.create_time is not None and status.end_time is not None:
        whole = text.seconds(max(0.0, (status.end_time - status.create_time).total_seconds()))
    about = [
        ("from submission to model", whole),
        ("training alone", text.seconds(max(0.0, metrics["train_s"])) if "train_s" in metrics else None),
        ("restarts", status.num_restarts or None if status else None),
        *_embedded(material.events),
    ]
    return join([shown, facts(about)])


def again(material: Material) -> Markup:
    """Return versions, hashes and settings."""
    record = material.record
    inputs = [(record.space, record.embedding_fingerprint)]
    inputs += [(one.space, one.embedding_fingerprint) for one in record.more_inputs]
    hashes: list[tuple[str, Child]] = []
    for space, embedding in inputs:
        of = f" of {text.shorten(space.source)}" if space.source else ""
        hashes += [(f"features{of}", _code(space.fingerprint)), (f"embedding{of}", _code(embedding))]
    named = [
        ("dataset", label(record.dataset) if record.dataset else None),
        ("content of the dataset", _code(record.dataset_digest)),
        *hashes,
        ("head", _code(record.head_sha256)),
        ("job", _code(record.job_id)),
    ]
    rows = [(label(name), label(version)) for name, version in sorted(record.versions.items())[:_MAX_VERSIONS]]
    versions = table(("library", "version"), rows) if rows else paragraph("The cluster does not say.")
    return join([facts(named), _settings(material), tag("h3", "Versions on the cluster"), versions])


def _groups(drawn: Mapping[str, Values]) -> list[dict[str, Values]]:
    """Return curves of the same kind together: ``loss`` and ``validation_loss``."""
    groups: dict[str, dict[str, Values]] = {}
    for name, values in drawn.items():
        groups.setdefault(name.removeprefix("validation_"), {})[name] = values
    return [dict(sorted(one.items(), key=lambda item: len(item[0]))) for one in groups.values()]


def curve_figure(group: Mapping[str, Values], unit: str, width: float) -> Markup:
    """Return curves of the same kind in one drawing, what they say in words below it."""
    names = [text.shorten(one.replace("_", " "), 30) for one in group]
    lines = [_points(one) for one in group.values()]
    values = [height for line in lines for _, height in line]
    longest = max(len(one) for one in group.values())
    if longest < _MAX_POINTS:
        across = Axis(unit, scale_of([1, max(2, longest)], whole=True))
    else:  # the cluster thins so long a curve, and does not say which steps are left
        across = Axis("share of the training, %", percent_scale())
        lines = [[(100.0 * (place - 1) / (longest - 1), height) for place, height in line] for line in lines]
    is_loss = all("loss" in one for one in group)
    is_log = is_loss and min(values) > 0 and max(values) / min(values) >= LOG_SPAN
    up = Axis(f"{names[0]}, logarithmic" if is_log else names[0], scale_of(values, is_log=is_log))
    has_legend = len(names) > 1
    area = frame(across, up, width=width, has_legend=has_legend)
    marks = [
        area.line(line, f"curve s{at % 4}") if len(line) > 1 else area.dots(line, f"s{at % 4}")
        for at, line in enumerate(lines)
    ]
    words = "; ".join(_curve_words(name, line) for name, line in zip(names, lines, strict=True))
    title = f"{' and '.join(names)} by {unit}"
    return figure(plot(title, words, area, marks, legend=names if has_legend else ()), f"{words}.")


def _points(values: Values) -> Curve:
    return [(at + 1.0, float(values[at])) for at in evenly(len(values), _MAX_POINTS) if math.isfinite(values[at])]


def _curve_words(name: str, line: Curve) -> str:
    heights = [one for _, one in line]
    first, last, low, high = map(text.number, (heights[0], heights[-1], min(heights), max(heights)))
    return f"{name} from {first} to {last}, between {low} and {high}"


def _candidates(material: Material) -> Markup | None:
    record, given = material.record, material.record.candidates
    if not given:
        return None
    # Those of further backbones have the backbone's name in front.
    chosen = [set(record.slices)]
    chosen += [{f"{one.space.source}:{name}" for name in one.slices} for one in record.more_inputs]
    has_accuracy = any(one.accuracy is not None for one in given)
    rows = [
        (
            "★\u00a0chosen" if set(one.slices) in chosen else "",
            labels(one.slices),
            f"{one.width:,}",
            text.score(one.score),
            *((text.NONE if one.accuracy is None else f"{one.accuracy:.4f}",) if has_accuracy else ()),
        )
        for one in given[:MAX_TRIALS]
    ]
    header = ("", "slices", "columns", "score", *(("accuracy",) if has_accuracy else ()))
    what = "minus the cross-entropy in nats a row" if has_accuracy else "R²"
    return join(
        [
            tag("h3", "Sets of slices of the embedding"),
            note(
                f"The score is {what}, by cross-validation on the training rows. Higher is better; of those that are "
                "as good as equal, the narrower set stands first."
            ),
            _listed(header, rows, "sets", len(given)),
        ]
    )


def _trials(material: Material) -> Markup | None:
    given = material.record.trials
    if not given:
        return None
    order = sorted(given, key=lambda one: (not one.won, bool(one.error), one.dropped, -one.score))
    rows = [
        (
            "★\u00a0won" if one.won else "dropped\u00a0early" if one.dropped else "",
            _FAILED if one.error else text.score(one.score),
            f"± {text.number(float(np.std(one.scores, ddof=1)), 2)}" if len(one.scores) > 1 else "",
            text.number(one.l2, 3),
            "-".join(map(str, one.hidden)) or "none",
            text.number(one.learning_rate, 3) if one.learning_rate else "",
            text.number(one.dropout, 3) if one.dropout else "",
            labels(one.slices),
            text.seconds(max(0.0, one.seconds)),
            text.shorten(one.error, _ERROR_LENGTH),
        )
        for one in order[:MAX_TRIALS]
    ]
    failed, dropped = sum(bool(one.error) for one in given), sum(one.dropped for one in given)
    parts = [f"{count} {what}" for count, what in ((dropped, "dropped early"), (failed, "failed")) if count]
    tried = text.amount(len(given), "configuration") + (f", of which {' and '.join(parts)}" if parts else "")
    early = ""
    if dropped:
        early = " Of one dropped early it is that on the first fold, after a fifth of the epochs: no match for others."
    num_hidden = sum(row[1] == _FAILED for row in rows[_AT_ONCE:])
    hidden = f", {num_hidden} of them failed" if num_hidden else ""
    header = ("", "score", "between folds", "penalty", "hidden", "rate", "dropout", "slices", "took", "why it failed")
    return join(
        [
            tag("h3", "Configurations of the sweep"),
            note(
                f"{tried}. The score is {_score_of(material)}, the mean over folds of the training rows. Higher is "
                f"better; the simplest of those within one standard error of the best won.{early}"
            ),
            _listed(header, rows, f"configurations{hidden}", len(given)),
        ]
    )


def _score_of(material: Material) -> str:
    """Return what the configurations of a sweep were told apart by."""
    status = material.status
    if status is None:
        return "what they were chosen by"
    metric = status.spec.fit.select_by
    if not metric and material.record.class_names:
        return "minus the cross-entropy"
    metric = metric or {HUBER: "mae", QUANTILE: "pinball"}.get(material.loss, "r2")
    minus = "minus the " if any(metric in names for names in LOWER_IS_BETTER.values()) else ""
    return f"{minus}{text.shorten(score_name(metric))}"


def _listed(header: Sequence[str], rows: Sequence[Sequence[Child]], what: str, total: int) -> Markup:
    """Return a table, of a long one the first rows and the others folded; without columns in which nothing stands."""
    first, rest = rows[:_AT_ONCE], rows[_AT_ONCE:]
    more = folded(f"{len(rest)} more {what}", _without_empty(header, rest), is_rest=True) if rest else None
    left_out = note(f"{total - len(rows):,} more are not shown.") if total > len(rows) else None
    return join([_without_empty(header, first), more, left_out])


def _without_empty(header: Sequence[str], rows: Sequence[Sequence[Child]]) -> Markup:
    kept = [at for at in range(len(header)) if any(row[at] != "" for row in rows)]
    right = [place for place, at in enumerate(kept) if header[at] in _NUMBERS]
    return table([header[at] for at in kept], [[row[at] for at in kept] for row in rows], right=right)


def _phases(events: Sequence[JobEvent]) -> dict[str, float]:
    """Return the seconds of each phase: from each of its events to the next event of any."""
    timed = [(one.phase, one.time) for one in sorted(events, key=lambda one: one.seq) if one.time is not None]
    spent: dict[str, float] = {}
    for (phase, start), (_, stop) in pairwise(timed):
        if phase != "end":
            name = text.shorten(phase, 32)
            spent[name] = spent.get(name, 0.0) + max(0.0, (stop - start).total_seconds())
    return dict(list(spent.items())[:MAX_TRIALS])


def _embedded(events: Sequence[JobEvent]) -> list[tuple[str, Child]]:
    """Return what was said of each input that was read."""
    last = {one.message: one.metrics for one in events if one.phase == "embed" and one.metrics}
    return [
        (
            f"embedding by {text.shorten(name)}" if name else "embedding",
            ", ".join(_embed_words(key, value) for key, value in list(metrics.items())[:_MAX_INPUTS]),
        )
        for name, metrics in list(last.items())[:_MAX_INPUTS]
    ]


def _embed_words(name: str, value: float) -> str:
    if name == "rows" and math.isfinite(value):
        return text.amount(value, "row")
    if name == "cached" and math.isfinite(value):
        return f"{value:,.0f} of them known already"
    if name.endswith("bytes") and math.isfinite(value):
        what = text.shorten(name.removesuffix("bytes").strip("_").replace("_", " "), 40)
        return f"{text.num_bytes(max(0.0, value))} {what}".strip()
    return f"{text.shorten(name, 40)} {text.number(value)}"


def _settings(material: Material) -> Markup:
    status = material.status
    if status is None:
        return paragraph("The job that made it is gone, so how it was asked for is not known.")
    fit = status.spec.fit
    named = [
        ("solver", label(fit.solver)),
        ("loss", material.loss),
        ("chosen by", label(fit.select_by) if fit.select_by else None),
        ("held out", text.percent(fit.validation_fraction)),
        ("seed", fit.seed),
    ]
    asked = json.dumps(job_to_dict(status), indent=2, default=str)
    if len(asked) > _SETTINGS_LENGTH:
        asked = f"{asked[:_SETTINGS_LENGTH]}\n... and so on"
    lines = [join([line, Markup("\n")]) for line in asked.split("\n")]
    return join([facts(named), folded("All that was asked for", tag("pre", *lines))])


def _code(hexadecimal: str) -> Markup | None:
    return tag("code", text.shorten(hexadecimal, 128)) if hexadecimal else None
