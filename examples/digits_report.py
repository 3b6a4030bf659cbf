"""The demo's report: one HTML file that needs nothing else, pictures and charts included."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image

# Shape suffix legend: N = rows, H = height, W = width, K = classes

MAX_MISTAKES = 24
"""Most wrong predictions that are shown, the most confident first."""

NUM_RIGHT = 20
"""Right predictions that are shown, the least confident and a spread of the rest."""


@dataclass(frozen=True)
class Method:
    """One way to classify, and how well it did on the held-out rows. ``note`` says what it is."""

    name: str
    accuracy: float
    note: str
    is_ours: bool = False


@dataclass(frozen=True)
class DigitsReport:
    """What the report shows.

    Attributes:
        methods: The ways compared, in the order shown.
        class_names: Names of the classes.
        true_N: Right class of every held-out row, an index into ``class_names``.
        predicted_N: Predicted class, likewise.
        confidence_N: Probability of the predicted class, 0 to 1.
        images_NHW: The pictures, uint8.
        facts: What else was measured: label to text.
    """

    methods: Sequence[Method]
    class_names: Sequence[str]
    true_N: npt.NDArray[np.integer]
    predicted_N: npt.NDArray[np.integer]
    confidence_N: npt.NDArray[np.floating]
    images_NHW: npt.NDArray[np.uint8]
    facts: Mapping[str, str]

    def confusion(self) -> npt.NDArray[np.int64]:
        """Return the counts of rows, (K, K), by right class (down) and predicted class (across)."""
        counts_KK = np.zeros((len(self.class_names), len(self.class_names)), np.int64)
        np.add.at(counts_KK, (self.true_N, self.predicted_N), 1)
        return counts_KK


@dataclass(frozen=True)
class _Cell:
    """One square of the confusion matrix. Positions are in units of one square."""

    row: int
    column: int
    count: int
    color: str
    ink: str
    title: str


@dataclass(frozen=True)
class _ClassRow:
    """One line of the table of classes."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    confused_with: str


@dataclass(frozen=True)
class _Card:
    """One picture with what was said about it."""

    source: str
    true: str
    predicted: str
    confidence: float

    @property
    def is_right(self) -> bool:
        return self.true == self.predicted


def render(report: DigitsReport) -> str:
    """Return the HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    confusion_KK = report.confusion()
    wrong, right = _chosen_rows(report)
    return environment.get_template("digits_report.html.jinja").render(
        methods=report.methods,
        lowest=_axis_start([method.accuracy for method in report.methods]),
        class_names=list(report.class_names),
        cells=_cells(confusion_KK, report.class_names),
        class_rows=_class_rows(confusion_KK, report.class_names),
        num_rows=len(report.true_N),
        num_wrong=int((report.true_N != report.predicted_N).sum()),
        wrong=[_card(report, row) for row in wrong],
        right=[_card(report, row) for row in right],
        facts=report.facts,
    )


def write(report: DigitsReport, path: Path) -> None:
    """Write the report to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(report), encoding="utf-8")


def _axis_start(accuracies: Sequence[float]) -> float:
    """Return where the bars start: the tenth below the lowest, so that differences can be seen. Said on the chart."""
    return max(0.0, math.floor(min(accuracies) * 10 - 0.5) / 10)


def _cells(confusion_KK: npt.NDArray[np.int64], names: Sequence[str]) -> list[_Cell]:
    shares_KK = confusion_KK / np.maximum(confusion_KK.sum(axis=1, keepdims=True), 1)
    wrong_KK = confusion_KK * (1 - np.eye(len(names), dtype=np.int64))
    most_wrong = max(int(wrong_KK.max()), 1)
    cells = []
    for row, column in np.ndindex(*confusion_KK.shape):
        count = int(confusion_KK[row, column])
        if count == 0:
            color, ink = "var(--empty)", "var(--muted)"
        elif row == column:
            # Right: blue by the share of the class that was found.
            color, ink = _blend((222, 235, 247), (8, 81, 156), float(shares_KK[row, column]) ** 2)
        else:
            # Wrong: orange by the count, on a scale of its own; else a single mistake could not be seen.
            color, ink = _blend((254, 230, 206), (166, 54, 3), count / most_wrong)
        title = f"{count} of class {names[row]} predicted as {names[column]}"
        cells.append(_Cell(row, column, count, color, ink, title))
    return cells


def _blend(low: tuple[int, int, int], high: tuple[int, int, int], share: float) -> tuple[str, str]:
    red, green, blue = (round(start + (stop - start) * share) for start, stop in zip(low, high, strict=True))
    luminance = (0.299 * red + 0.587 * green + 0.114 * blue) / 255
    return f"rgb({red},{green},{blue})", "#fff" if luminance < 0.55 else "#1b1f24"


def _class_rows(confusion_KK: npt.NDArray[np.int64], names: Sequence[str]) -> list[_ClassRow]:
    rows = []
    for index, name in enumerate(names):
        hits = int(confusion_KK[index, index])
        support, predicted = int(confusion_KK[index].sum()), int(confusion_KK[:, index].sum())
        precision, recall = hits / max(predicted, 1), hits / max(support, 1)
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        others = confusion_KK[index].copy()
        others[index] = 0
        worst = int(others.argmax())
        confused_with = f"{names[worst]} ({others[worst]} times)" if others[worst] else ""
        rows.append(_ClassRow(name, precision, recall, f1, support, confused_with))
    return rows


def _chosen_rows(report: DigitsReport) -> tuple[list[int], list[int]]:
    """Return rows to show: the most confident mistakes, and right ones from the least confident up."""
    by_confidence = np.argsort(report.confidence_N, kind="stable")
    is_wrong = report.true_N != report.predicted_N
    wrong = [int(row) for row in by_confidence[::-1] if is_wrong[row]][:MAX_MISTAKES]
    candidates = [int(row) for row in by_confidence if not is_wrong[row]]
    # Half of them the least confident, where there is something to see; the others spread over the rest.
    unsure, rest = candidates[: NUM_RIGHT // 2], candidates[NUM_RIGHT // 2 :]
    positions = np.unique(np.linspace(0, max(len(rest) - 1, 0), NUM_RIGHT // 2).round().astype(int))
    return wrong, unsure + [rest[position] for position in positions if rest]


def _card(report: DigitsReport, row: int) -> _Card:
    return _Card(
        source=_data_uri(report.images_NHW[row]),
        true=report.class_names[report.true_N[row]],
        predicted=report.class_names[report.predicted_N[row]],
        confidence=float(report.confidence_N[row]),
    )


def _data_uri(image_HW: npt.NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image_HW).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
