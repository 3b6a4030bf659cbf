"""The parts of a report about answers on held-out rows: what is confused, how surely, and the worst of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trunkline._report import text
from trunkline._report.figures import (
    Bin,
    ClassFigures,
    Flags,
    Values,
    calibration_error,
    class_figures,
    confusion_matrix,
    confusions,
    evenly,
    label_figures,
    reliability,
)
from trunkline._report.material import MAX_OUTPUTS, Answers, Material
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
from trunkline._report.pictures import Gallery
from trunkline._report.plots import Axis, columns, frame, heat_map, plot
from trunkline._report.scales import scale_of, unit_scale
from trunkline.records import LabelSuspect

# Shape suffix legend: N = rows, K = classes or outputs

MAX_MATRIX = 30
"""Most classes of a confusion matrix; of more, the pairs most confused are listed."""

MAX_PAIRS = 20
MAX_CLASSES = 200
"""Most classes that are listed."""

MAX_MISTAKES = 24
MAX_SUSPECTS = 50
"""Most rows whose label looks wrong that are listed; fewer as pictures."""

_MAX_DOTS = 2000
_FEW_A_BIN = 20


@dataclass(frozen=True)
class Mistake:
    """A row that was answered wrongly.

    Attributes:
        row: Its place in the dataset.
        true: What is right.
        said: What was said.
        sure: How sure of that, or how far off.
        details: What else there is to say.
    """

    row: int
    true: Markup
    said: Markup
    sure: str
    details: str = ""


def confusion(material: Material, answers: Answers | None) -> Markup:
    """Return which classes are taken for which."""
    if answers is None:
        return paragraph(material.no_answers)
    names = material.record.class_names
    pairs = confusions(answers.classes_N, answers.said, len(names))
    wrong = sum(one.count for one in pairs)
    words = f"{wrong:,} of {text.amount(len(answers), 'row')} are wrong."
    if len(names) > MAX_MATRIX:
        words += f" Of {len(names):,} classes these are taken for others most often:"
        return join([paragraph(words), _pairs(material, answers)])
    counts_KK = confusion_matrix(answers.classes_N, answers.said, len(names))
    if pairs and pairs[0].count > 1:
        worst = pairs[0]
        true, said = (text.shorten(names[one], 40) for one in (worst.true, worst.said))
        words += f" Most often, {text.amount(worst.count, 'time')}, “{true}” is taken for “{said}”."
    drawing = heat_map("Rows by true and predicted class", words, names, counts_KK)
    caption = "Blue is right, orange is wrong; the stronger, the larger the share of the true class."
    header = ("true, down; predicted, across", *(text.shorten(one, 24) for one in names))
    rows = [(label(name, 24), *counts) for name, counts in zip(names, counts_KK.tolist(), strict=True)]
    numbers = folded("As numbers", table(header, rows, right=range(1, len(header))))
    return join([figure(drawing, f"{words} {caption}"), numbers])


def calibration(material: Material, answers: Answers | None) -> Markup:
    """Return whether probabilities mean what they say."""
    metrics = material.metrics
    named = [
        ("calibration error, calibrated", text.score(metrics["ece"]) if "ece" in metrics else None),
        ("as the head was fitted", text.score(metrics["ece_uncalibrated"]) if "ece_uncalibrated" in metrics else None),
        ("temperature", text.number(metrics["temperature"]) if "temperature" in metrics else None),
    ]
    measured = facts(named) or paragraph("The probabilities were not calibrated, or the cluster does not say.")
    if answers is None:
        return join([measured, paragraph(material.no_answers)])
    if material.is_of_labels:
        what, bins = "probability of a class", reliability(answers.answers_NK.ravel(), answers.memberships.ravel())
    else:
        what = "probability of the likeliest class"
        bins = reliability(answers.confidence, answers.said == answers.classes_N)
    rows = [
        (f"{one.confidence:.3f}", f"{one.accuracy:.3f}", f"{one.low:.3f} to {one.high:.3f}", f"{one.count:,}")
        for one in bins
    ]
    header = ("said", "came true", "95 % interval", "how many")
    apart = text.score(calibration_error(bins))
    words = f"In {len(bins)} bins of equal mass, what was said and what came true are {apart} apart in the mean."
    caption = "Dots on the dashed line mean what they say; below it the model is too sure. Bars are 95 % intervals."
    if sum(one.count for one in bins) < _FEW_A_BIN * len(bins):
        caption += " With so few in a bin, chance alone sets the two apart."
    if "ece" in metrics:
        caption += (
            " This is at the model's own temperature. For the calibration error above, each half of the rows was "
            "judged at the temperature of the other: the two may differ."
        )
    drawing = _reliability_drawing(bins, what, words)
    return join(
        [measured, figure(drawing, f"{words} {caption}"), folded("As numbers", table(header, rows, right=range(4)))]
    )


def classes(material: Material, answers: Answers | None) -> Markup:
    """Return how well each class is told."""
    if answers is None:
        return paragraph(material.no_answers)
    num_classes = len(material.record.class_names)
    if material.is_of_labels:
        found = label_figures(answers.memberships, answers.answers_NK)
        header = ("class", "rows", "precision", "recall", "F1", "average precision")
    else:
        found = class_figures(answers.classes_N, answers.said, num_classes)
        header = ("class", "rows", "precision", "recall", "F1", "most often taken for")
    shown, remark = found, None
    if len(found) > MAX_CLASSES:
        occurring = [one for one in found if one.num_rows]
        shown = sorted(occurring, key=lambda one: (one.f1, -one.num_rows))[:MAX_CLASSES]
        remark = note(
            f"The {len(shown)} with the lowest F1, of {len(occurring):,} classes that have held-out rows; there are "
            f"{num_classes:,} in all."
        )
    right = range(1, 6 if material.is_of_labels else 5)
    return join([remark, table(header, [_class_row(material, one) for one in shown], right=right)])


def numbers(material: Material, answers: Answers | None) -> Markup:
    """Return predicted against true values, and how far they are apart."""
    if answers is None:
        return paragraph(material.no_answers)
    num_outputs = answers.answers_NK.shape[1]
    drawings = []
    for output in range(min(MAX_OUTPUTS, num_outputs)):
        name = material.output_name(output)
        true_N, said_N = answers.targets_NK[:, output], answers.answers_NK[:, output]
        drawings.append(_scatter(name, true_N, said_N))
        residual_N = said_N - true_N
        caption = f"Predicted minus true: {text.number(float(residual_N.mean()))} in the mean, give or take "
        caption += f"{text.number(float(residual_N.std()))}."
        drawings.append(figure(columns(f"Residuals of {name}", f"predicted minus true {name}", residual_N), caption))
    more = note(f"The first {MAX_OUTPUTS} of {num_outputs:,} numbers.") if num_outputs > MAX_OUTPUTS else None
    return join([more, tag("div", *drawings, class_="pair")])


def mistakes(material: Material, answers: Answers | None, gallery: Gallery) -> Markup:
    """Return the worst mistakes."""
    if answers is None:
        return paragraph(material.no_answers)
    if material.is_one_of:
        total, found = _class_mistakes(material, answers)
        sure = "its probability"
    elif material.is_of_labels:
        total, found = _label_mistakes(material, answers)
        sure = "the worst of it"
    else:
        total, found = _number_mistakes(material, answers)
        sure = "off by"
    if not found:
        return paragraph(f"None of {text.amount(len(answers), 'held-out row')} is wrong.")
    worst = "the surest ones first" if material.record.class_names else "the largest errors first"
    if not material.record.class_names and answers.answers_NK.shape[1] > 1:
        worst += ", each measured by how much its number varies"
    remark = note(f"{len(found)} of {total:,}, {worst}. Rows are numbered from 0, as they were uploaded.")
    if gallery:
        if material.is_of_labels:
            remark = join([remark, note("In brackets the class that is most wrong, and the probability it was given.")])
        before = "" if material.record.class_names else "off by "
        cards = [_mistake_card(one, before, gallery) for one in found]
        return join([remark, tag("ul", *cards, class_="cards")])
    rows = [(one.row, one.true, one.said, one.sure, one.details) for one in found]
    header = ("row", "right", "said", sure, "")
    return join([remark, table(header, rows, right=(0,))])


def suspects(material: Material, gallery: Gallery) -> Markup:
    """Return rows whose label looks wrong."""
    if material.evaluation is None:
        return paragraph("The cluster keeps no list of doubtful labels for this model.")
    found = material.evaluation.suspects
    if not found:
        looked = material.is_one_of and material.record.task != "ordinal"
        return paragraph(
            "Of the labels that were examined, none looks wrong."
            if looked
            else "Labels are examined only where each row is of one class, and the classes have no order."
        )
    shown = found[: MAX_MISTAKES if gallery else MAX_SUSPECTS]
    remark = note(
        f"{len(shown)} of {len(found):,}, the most doubtful first: classifiers fitted without these rows are surer of "
        "another class, by the difference of probabilities that is given. Look at them before you believe either."
    )
    if gallery:
        return join([remark, tag("ul", *(_suspect_card(material, one, gallery) for one in shown), class_="cards")])
    rows = [
        (one.row, label(material.class_name(one.given)), label(material.class_name(one.suggested)), f"{one.margin:.2f}")
        for one in shown
    ]
    return join([remark, table(("row", "labelled", "rather", "by"), rows, right=(0, 3))])


def _pairs(material: Material, answers: Answers) -> Markup:
    num_classes = len(material.record.class_names)
    totals_K = np.bincount(answers.classes_N, minlength=num_classes)
    rows = [
        (
            label(material.class_name(one.true)),
            label(material.class_name(one.said)),
            f"{one.count:,}",
            text.percent(one.count / int(totals_K[one.true])),
        )
        for one in confusions(answers.classes_N, answers.said, num_classes)[:MAX_PAIRS]
    ]
    return table(("true class", "taken for", "rows", "of the class"), rows, right=(2, 3))


def _reliability_drawing(bins: Sequence[Bin], what: str, words: str) -> Markup:
    area = frame(Axis(what, unit_scale()), Axis("share that came true", unit_scale()), width=460, height=420)
    marks = [area.line([(0.0, 0.0), (1.0, 1.0)], "guide")]
    marks += [area.line([(one.confidence, one.low), (one.confidence, one.high)], "whisker s0") for one in bins]
    marks.append(area.dots([(one.confidence, one.accuracy) for one in bins], "large s0"))
    return plot("Reliability diagram", words, area, marks)


def _class_row(material: Material, one: ClassFigures) -> tuple[Child, ...]:
    scores = (f"{one.num_rows:,}", f"{one.precision:.3f}", f"{one.recall:.3f}", f"{one.f1:.3f}")
    name = label(material.class_name(one.index))
    if material.is_of_labels:
        return (name, *scores, text.NONE if one.average_precision is None else f"{one.average_precision:.3f}")
    if one.confused_with is None:
        return (name, *scores, "")
    return (name, *scores, join([label(material.class_name(one.confused_with)), f" ({one.num_confused:,})"]))


def _scatter(name: str, true_N: Values, said_N: Values) -> Markup:
    kept = evenly(len(true_N), _MAX_DOTS)
    ends = [float(true_N.min()), float(true_N.max()), float(said_N.min()), float(said_N.max())]
    scale = scale_of(ends)
    area = frame(Axis(f"true {name}", scale), Axis(f"predicted {name}", scale), width=480, height=400)
    marks = [
        area.line([(scale.low, scale.low), (scale.high, scale.high)], "guide"),
        area.dots([(float(true_N[at]), float(said_N[at])) for at in kept], "s0"),
    ]
    error_N = np.abs(said_N - true_N)
    words = f"Half of {text.amount(len(true_N), 'row')} are less than {text.number(float(np.median(error_N)))} off"
    words += f", the worst is {text.number(float(error_N.max()))} off."
    return figure(plot(f"Predicted against true {name}", words, area, marks), f"{words} On the dashed line both agree.")


def _class_mistakes(material: Material, answers: Answers) -> tuple[int, list[Mistake]]:
    """Return how many rows are wrong, and the surest of them."""
    wrong = np.flatnonzero(answers.said != answers.classes_N)
    order = wrong[np.argsort(-answers.confidence[wrong], kind="stable")]
    found = []
    for at in order[:MAX_MISTAKES]:
        true, said = int(answers.classes_N[at]), int(answers.said[at])
        sure = text.percent(float(answers.confidence[at]))
        details = f"the right one has {text.percent(float(answers.answers_NK[at, true]))}"
        found.append(
            Mistake(
                int(answers.rows_N[at]),
                label(material.class_name(true)),
                label(material.class_name(said)),
                sure,
                details,
            )
        )
    return len(wrong), found


def _label_mistakes(material: Material, answers: Answers) -> tuple[int, list[Mistake]]:
    """Return how many rows have a class wrong, and those with the surest mistake."""
    true_NK, said_NK = answers.memberships, answers.answers_NK > 0.5
    wrong_NK = true_NK != said_NK
    off_NK = np.where(wrong_NK, np.abs(answers.answers_NK - true_NK), 0.0)
    wrong = np.flatnonzero(wrong_NK.any(axis=1))
    order = wrong[np.argsort(-off_NK[wrong].max(axis=1), kind="stable")]
    found = []
    for at in order[:MAX_MISTAKES]:
        worst = int(off_NK[at].argmax())
        name = text.shorten(material.class_name(worst), 40)
        sure = f"{name}: {text.percent(float(answers.answers_NK[at, worst]))}"
        true, said = (_class_list(material, one_NK[at]) for one_NK in (true_NK, said_NK))
        found.append(Mistake(int(answers.rows_N[at]), true, said, sure))
    return len(wrong), found


def _number_mistakes(material: Material, answers: Answers) -> tuple[int, list[Mistake]]:
    """Return how many rows there are, and the largest errors, measured by how much each number varies."""
    error_NK = answers.answers_NK - answers.targets_NK
    spread_K = answers.targets_NK.std(axis=0)
    off_NK = np.abs(error_NK) / np.where(spread_K > 0, spread_K, 1.0)
    order = np.argsort(-off_NK.max(axis=1), kind="stable")
    found = []
    for at in order[:MAX_MISTAKES]:
        worst = int(off_NK[at].argmax())
        if not error_NK[at, worst]:
            break
        true, said = (
            text.number(float(answers.targets_NK[at, worst])),
            text.number(float(answers.answers_NK[at, worst])),
        )
        which = material.output_name(worst) if answers.answers_NK.shape[1] > 1 else ""
        error = float(error_NK[at, worst])
        sure = f"{'+' if error > 0 else ''}{text.number(error)}"
        found.append(Mistake(int(answers.rows_N[at]), tag("span", true), tag("span", said), sure, which))
    return len(answers), found


def _class_list(material: Material, is_of_K: Flags) -> Markup:
    names = [material.class_name(int(index)) for index in np.flatnonzero(is_of_K)]
    return labels(names, most=40) if names else tag("em", "none")


def _mistake_card(one: Mistake, before: str, gallery: Gallery) -> Markup:
    return tag(
        "li",
        gallery.picture(one.row, f"row {one.row}"),
        tag("div", "said ", tag("b", one.said), f" ({before}{one.sure})"),
        tag("div", "right: ", one.true),
        tag("div", ", ".join(part for part in (one.details, f"row {one.row}") if part), class_="note"),
    )


def _suspect_card(material: Material, one: LabelSuspect, gallery: Gallery) -> Markup:
    return tag(
        "li",
        gallery.picture(one.row, f"row {one.row}"),
        tag("div", "labelled ", tag("b", label(material.class_name(one.given)))),
        tag("div", "rather ", label(material.class_name(one.suggested)), f" (by\u00a0{one.margin:.2f})"),
        tag("div", f"row {one.row}", class_="note"),
    )
