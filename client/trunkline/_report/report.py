"""A report on a model as one HTML file that needs nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline._report import course, findings, overview
from trunkline._report.files import check_place, write_whole
from trunkline._report.material import Material, gather
from trunkline._report.page import Markup, document
from trunkline._report.pictures import Gallery
from trunkline._report.text import shorten
from trunkline._report.tuning import tuning

if TYPE_CHECKING:
    from trunkline._deadline import Deadline
    from trunkline.models import Model


def write_report(model: Model, path: str | Path | None, images: Any, deadline: Deadline) -> Path:
    """Write a report and return where. Arguments are those of ``Model.report``.

    Raises:
        InvalidArgumentError: The file cannot be written, or the images cannot be pictures.
        TrunklineError: The cluster cannot be reached, and the like.
    """
    place = report_path(model.name, model.version) if path is None else Path(path).expanduser()
    check_place(place)
    gallery = Gallery(images)
    write_whole(place, render(gather(model, deadline), gallery))
    return place


def render(material: Material, gallery: Gallery) -> str:
    """Return the page."""
    answers = material.answers
    parts: list[tuple[str, str, Markup]] = [
        ("summary", "Summary", overview.summary(material)),
        ("data", "Data", overview.data(material, answers, gallery)),
        ("curves", "Learning curves", course.curves(material)),
        ("search", "Search", course.search(material)),
    ]
    if material.record.fine_tuning is not None:
        parts.append(("tuning", "Fine-tuning", tuning(material, material.record.fine_tuning)))
    if material.is_one_of:
        parts.append(("confusion", "Confusion matrix", findings.confusion(material, answers)))
    if material.is_one_of or material.is_of_labels:
        parts.append(("calibration", "Calibration", findings.calibration(material, answers)))
        parts.append(("classes", "Classes", findings.classes(material, answers)))
    else:
        parts.append(("numbers", "Predicted and true values", findings.numbers(material, answers)))
    parts += [
        ("mistakes", "Worst mistakes", findings.mistakes(material, answers, gallery)),
        ("suspects", "Labels that look wrong", findings.suspects(material, gallery)),
        ("timings", "Time and data", course.timings(material)),
        ("again", "To do it again", course.again(material)),
    ]
    title = f"Report on {shorten(material.record.reference)}"
    return document(title, overview.heading(material), parts)


def report_path(name: str, version: int) -> Path:
    """Return a file in the current folder. The name is the cluster's, so none that leads elsewhere is taken."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:128].lstrip(".") or "model"
    return Path(f"{safe}-{version}.html")
