"""The first parts of a report: how good the model is, what speaks against it, and what it was measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trunkline._report import text
from trunkline._report.figures import evenly
from trunkline._report.material import MAX_OUTPUTS, Answers, Material
from trunkline._report.page import Child, Markup, facts, figure, folded, join, label, note, paragraph, table, tag
from trunkline._report.pictures import Gallery
from trunkline._report.plots import bars, columns
from trunkline._report.scoring import interval, score_name
from trunkline.scores import held_out_scores

MAX_BARS = 40
"""Most classes whose rows are drawn as bars."""

MAX_STRIPS, STRIP_LENGTH = 8, 6
"""Most classes whose pictures are shown, and how many of each."""

_MAX_TILES = 4
_MAX_WARNINGS, _WARNING_LENGTH = 20, 1000
_MAX_METRICS = 200
_FACT_LENGTH = 1000

_COUNTS = {
    "num_rows": "rows",
    "num_train_rows": "of them to train on",
    "num_validation_rows": "of them held out",
    "num_views": "views of each, to train on",
    "num_groups": "groups, none of them on both sides",
    "num_features": "columns that the head reads",
}


def heading(material: Material) -> Markup:
    """Return what stands above everything."""
    record = material.record
    task, when = record.task.replace("_", " "), text.moment(record.create_time)
    return join([tag("h1", label(record.reference)), note(f"{task}, trained {when}" if when else task)])


def summary(material: Material) -> Markup:
    """Return scores, doubts and what the model is."""
    record, metrics = material.record, material.metrics
    names = list(held_out_scores(metrics))
    measured: list[Child] = [paragraph("No rows were held out, so nothing was measured.")]
    if names:
        tiles = [_tile(metrics, name) for name in names[:_MAX_TILES]]
        measured = [tag("ul", *tiles, class_="tiles"), _measured_on(material)]
    number = len(record.class_names) or record.num_outputs
    about = facts(
        [
            ("task", record.task.replace("_", " ")),
            ("classes" if record.class_names else "numbers a row", f"{number:,}"),
            ("dataset", label(record.dataset) if record.dataset else None),
            *((name, label(value, _FACT_LENGTH)) for name, value in material.facts if value),
            *((words, f"{metrics[name]:,.0f}") for name, words in _counts(material).items() if name in metrics),
            ("outlier scores", "yes: model.predict(..., outliers=True)" if record.has_outlier_scores else None),
        ]
    )
    return join([_warnings(record.warnings), *measured, about, _all_scores(metrics, names) if names else None])


def data(material: Material, answers: Answers | None, gallery: Gallery) -> Markup:
    """Return what the held-out rows are."""
    if answers is None:
        return paragraph(material.no_answers)
    if material.is_one_of or material.is_of_labels:
        return join([_class_bars(material, answers), _sampled(answers), _class_strips(material, answers, gallery)])
    drawings = []
    for output in range(min(MAX_OUTPUTS, answers.targets_NK.shape[1])):
        name = material.output_name(output)
        title = f"True {name} of held-out rows"
        drawings.append(figure(columns(title, f"true {name}", answers.targets_NK[:, output])))
    return join([tag("div", *drawings, class_="pair"), _sampled(answers), _value_strip(material, answers, gallery)])


def _counts(material: Material) -> Mapping[str, str]:
    """Return what is counted, in words. The head of trained blocks reads what these make, not columns."""
    return {name: words for name, words in _COUNTS.items() if not material.is_tuned or name != "num_features"}


def _tile(metrics: Mapping[str, float], name: str) -> Markup:
    within = interval(metrics, name)
    return tag(
        "li",
        tag("span", score_name(name)),
        tag("b", text.score(metrics[name])),
        tag("span", f"95 % interval {within}") if within else None,
    )


def _warnings(given: Sequence[str]) -> Markup | None:
    if not given:
        return None
    items = [tag("li", text.shorten(one, _WARNING_LENGTH)) for one in given[:_MAX_WARNINGS]]
    if len(given) > _MAX_WARNINGS:
        items.append(tag("li", f"and {len(given) - _MAX_WARNINGS} more"))
    return tag("div", tag("h3", "What speaks against it"), tag("ul", *items), class_="warnings", role="note")


def _measured_on(material: Material) -> Markup:
    held_out = material.metrics.get("num_validation_rows")
    where = f"Measured on {text.amount(held_out, 'row')} held out." if held_out else "Measured on rows held out."
    return note(f"{where} The model was then fitted once more, on all rows." if material.is_refitted else where)


def _all_scores(metrics: Mapping[str, float], names: Sequence[str]) -> Markup:
    held_out = [*names, *(one for one in ("mse", "ece_uncalibrated") if one in metrics)]
    scores = [
        (
            score_name(one),
            text.score(metrics[one]),
            interval(metrics, one),
            text.score(metrics[f"train_{one}"]) if f"train_{one}" in metrics else "",
        )
        for one in held_out
    ]
    known = {*_COUNTS, *(f"{start}{one}{end}" for one in held_out for start, end in _ENDS)}
    rest = [(label(one), text.number(value)) for one, value in sorted(metrics.items()) if one not in known]
    return join(
        [
            tag("h3", "Held-out rows and training rows"),
            table(("score", "held-out rows", "95 % interval", "training rows"), scores, right=(1, 2, 3)),
            folded("What else was measured", table(("name", "value"), rest[:_MAX_METRICS], right=(1,)))
            if rest
            else None,
        ]
    )


_ENDS = (("", ""), ("", "_low"), ("", "_high"), ("train_", ""))


def _sampled(answers: Answers) -> Markup | None:
    if len(answers) >= answers.num_held_out:
        return None
    kept, held_out = f"{len(answers):,}", text.amount(answers.num_held_out, "row")
    return note(f"Drawings and tables are of {kept} of the {held_out} held out; the scores are of all of them.")


def _class_counts(material: Material, answers: Answers) -> list[int]:
    if material.is_of_labels:
        return [int(one) for one in answers.memberships.sum(axis=0)]
    return [int(one) for one in np.bincount(answers.classes_N, minlength=len(material.record.class_names))]


def _class_bars(material: Material, answers: Answers) -> Markup:
    counts, names = _class_counts(material, answers), material.record.class_names
    shown = list(range(len(counts)))
    if len(shown) > MAX_BARS:
        shown = sorted(shown, key=lambda one: -counts[one])[:MAX_BARS]
    rows = [(names[one], float(counts[one]), f"{counts[one]:,}") for one in shown]
    words = f"{text.amount(len(answers), 'row')}; the largest class has {max(counts):,}, the smallest {min(counts):,}."
    if max(counts) == min(counts):
        words = f"{text.amount(len(answers), 'row')}, {max(counts):,} of each class."
    if material.is_of_labels:
        words += " A row may be of several."
    if len(counts) > len(shown):
        words += f" These are {MAX_BARS} of {len(counts):,} classes, the largest first."
    return figure(bars("Held-out rows of each class", words, "held-out rows", rows, whole=True), words)


def _class_strips(material: Material, answers: Answers, gallery: Gallery) -> Markup | None:
    if not gallery:
        return None
    counts = _class_counts(material, answers)
    known = [one for one in range(len(counts)) if counts[one]]
    strips = []
    for index in sorted(sorted(known, key=lambda one: -counts[one])[:MAX_STRIPS]):
        is_of_N = answers.memberships[:, index] if material.is_of_labels else answers.classes_N == index
        rows = answers.rows_N[is_of_N]
        strips.append(
            _strip(material.class_name(index), [int(rows[at]) for at in evenly(len(rows), STRIP_LENGTH)], gallery)
        )
    are_alike = len({counts[one] for one in known}) == 1
    which = f" of the {MAX_STRIPS} {'first' if are_alike else 'largest'} classes" if len(known) > MAX_STRIPS else ""
    return join([tag("h3", f"Held-out pictures{which}"), tag("ul", *strips, class_="strips")])


def _value_strip(material: Material, answers: Answers, gallery: Gallery) -> Markup | None:
    if not gallery:
        return None
    order = np.argsort(answers.targets_NK[:, 0], kind="stable")
    rows = [int(answers.rows_N[order[at]]) for at in evenly(len(order), STRIP_LENGTH)]
    strip = _strip(f"from the lowest {material.output_name(0)} to the highest", rows, gallery)
    return join([tag("h3", "Held-out pictures"), tag("ul", strip, class_="strips")])


def _strip(name: str, rows: Sequence[int], gallery: Gallery) -> Markup:
    drawn = [gallery.picture(row, f"row {row}, {text.shorten(name)}") for row in rows]
    return tag("li", label(name), tag("div", *drawn, class_="strip"))
