"""The part of a report about trained blocks: whether they were kept and why, how they were trained, and how it went."""

from __future__ import annotations

import numpy as np
from trunkline_wire.fits import BATCH_NORM_ADAPT, FineTuneConfig

from trunkline._report import text
from trunkline._report.course import MIXED, TUNE, curve_figure
from trunkline._report.material import Material
from trunkline._report.page import Child, Markup, facts, join, note, paragraph, table, tag
from trunkline._report.scoring import in_order, score_name
from trunkline.records import FineTuning

_REASON_LENGTH = 300


def tuning(material: Material, one: FineTuning) -> Markup:
    """Return what came of training the last blocks."""
    verdict = f"The blocks behind {text.shorten(one.cut)} were {text.shorten(one.reason, _REASON_LENGTH)}."
    meaning = "The model has blocks of its own, and its scores are theirs."
    if not one.kept:
        meaning = "The model is the head alone, on the backbone as it is, and so are its scores."
    return join([paragraph(verdict), paragraph(meaning), _scores(material, one), _how(material, one), _curve(material)])


def _scores(material: Material, one: FineTuning) -> Markup | None:
    names = in_order(name for name in one.before if name in one.after)
    if not names:
        return None
    rows = [(score_name(name), text.score(one.before[name]), text.score(one.after[name])) for name in names]
    remark = None
    if material.record.class_names:
        remark = note(
            "As they were before calibration. The two were compared row by row, each at the temperature that suits it "
            "best, so the gain need not be the difference of two scores here."
        )
    header = ("held-out score", "head alone", "with the blocks")
    return join([tag("h3", "Held-out rows, with and without"), table(header, rows, right=(1, 2)), remark])


def _how(material: Material, one: FineTuning) -> Markup:
    asked = None if material.status is None else material.status.spec.fine_tune
    resumed = f", resumed {text.amount(one.num_resumed, 'time')}" if one.num_resumed else ""
    rows: list[tuple[str, Child]] = [
        ("numbers trained", f"{one.num_trained:,}, the head's included"),
        ("times through the rows", f"{one.epochs:,}"),
        *(_asked(asked) if asked is not None else ()),
        ("by", f"{text.amount(one.num_workers, 'worker')}{resumed}"),
        ("took", text.seconds(max(0.0, one.seconds))),
    ]
    return join([tag("h3", "How they were trained"), facts(rows)])


def _asked(asked: FineTuneConfig) -> list[tuple[str, Child]]:
    """Return what was asked for; what was not is named in the end."""
    numbers = (
        ("rows a step", asked.batch_size, ""),
        ("learning rate of the last stage", asked.learning_rate, ""),
        ("learning rate of each stage ahead", asked.layer_decay, " times that of the stage behind it"),
        ("weight decay", asked.weight_decay, ""),
    )
    ours = [name for name, value, _ in numbers if not value]
    adapts = asked.batch_norm == BATCH_NORM_ADAPT
    return [
        ("weights", f"additions of rank {asked.lora_rank}" if asked.lora_rank else "all of them"),
        *((name, f"{text.number(value)}{unit}") for name, value, unit in numbers if value),
        ("batch normalisation", "averages over these rows" if adapts else "keeps the statistics of the pretraining"),
        ("left to the cluster", ", ".join(ours)),
    ]


def _curve(material: Material) -> Markup | None:
    kept = {} if material.evaluation is None else material.evaluation.curves
    drawn = {
        f"training_{name.removeprefix(TUNE)}": np.asarray(one, dtype=np.float64)
        for name, one in kept.items()
        if name.startswith(TUNE) and np.isfinite(np.asarray(one, dtype=np.float64)).any()
    }
    if not drawn:
        return None
    words = "Of the run that was measured, on the training rows."
    if material.is_mixed:
        words += f" {MIXED}"
    shown = [curve_figure({name: values}, "epoch", 480) for name, values in drawn.items()]
    return join([tag("h3", "How it went"), *shown, note(words)])
