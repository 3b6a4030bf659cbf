"""How good a model is: metrics in NumPy, and a report to read."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, REGRESSION
from trunkline_wire.specs import CodecUse

from trunkline import _html
from trunkline.records import Candidate

# Shape suffix legend: N = rows, K = classes, M = outputs

CALIBRATION_BINS = 15
"""Bins of equal width over the confidence, for the calibration error."""

_MAX_TEXT_CLASSES = 30


@dataclass(frozen=True)
class ClassScore:
    """Scores of one class. ``support`` counts its rows."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class ClassificationReport:
    """How well a classifier does.

    Attributes:
        model: ``name@version``.
        num_rows: Rows that were measured.
        num_failed: Rows that could not be predicted; not measured.
        accuracy: Fraction that is right.
        macro_f1: Mean F1 over the classes that occur.
        calibration_error: Expected calibration error: mean distance between confidence and accuracy.
        classes: Scores of each class.
        confusion_KK: Counts; a row for each true class, a column for each predicted one.
        codec_use: How the rows were made and sent. See ``Prediction``.
        candidates: Sets of slices that were tried when the model was trained. See ``Model``.
    """

    model: str
    num_rows: int
    num_failed: int
    accuracy: float
    macro_f1: float
    calibration_error: float
    classes: tuple[ClassScore, ...]
    confusion_KK: npt.NDArray[np.int64]
    codec_use: CodecUse = field(default_factory=CodecUse)
    candidates: tuple[Candidate, ...] = ()

    @property
    def task(self) -> str:
        """``classification``."""
        return CLASSIFICATION

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {
            "task": self.task,
            "model": self.model,
            "num_rows": self.num_rows,
            "num_failed": self.num_failed,
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "calibration_error": self.calibration_error,
            "classes": [vars(one) for one in self.classes],
            "confusion": self.confusion_KK.tolist(),
            "codec_use": vars(self.codec_use),
        }

    def summary(self) -> str:
        """Return it as text."""
        lines = [
            f"{self.model}: accuracy {self.accuracy:.4f} on {_rows(self)}",
            f"macro F1 {self.macro_f1:.4f}, calibration error {self.calibration_error:.4f}",
            *([f"rows sent as {_sent(self.codec_use)}"] if self.codec_use.codec else []),
            "",
            *_class_lines(self.classes),
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Return the figures that matter most."""
        return f"ClassificationReport({self.model!r}, accuracy={self.accuracy:.4f}, num_rows={self.num_rows})"

    def _repr_html_(self) -> str:
        head = _html.facts(
            f"Report on {self.model}",
            [
                ("accuracy", f"{self.accuracy:.4f}"),
                ("macro F1", f"{self.macro_f1:.4f}"),
                ("calibration error", f"{self.calibration_error:.4f}"),
                *_row_facts(self),
            ],
        )
        confusion = self._confusion_html() if len(self.classes) <= _MAX_TEXT_CLASSES else ""
        return head + _class_table(self.classes) + confusion + _html.candidates(self.candidates)

    def _confusion_html(self) -> str:
        largest = max(1, int(self.confusion_KK.max(initial=0)))
        names = [html.escape(one.name) for one in self.classes]
        head = "".join(f"<th>{name}</th>" for name in names)
        body = ""
        for row, (name, counts) in enumerate(zip(names, self.confusion_KK.tolist(), strict=True)):
            cells = ""
            for column, count in enumerate(counts):
                colour = "46,125,50" if row == column else "198,40,40"
                cells += f"<td style='background:rgba({colour},{count / largest:.2f})'>{count or ''}</td>"
            body += f"<tr><th>{name}</th>{cells}</tr>"
        return f"<table><caption>true \\ predicted</caption><tr><th></th>{head}</tr>{body}</table>"


@dataclass(frozen=True)
class RegressionReport:
    """How well a model predicts numbers. With several outputs, means over them.

    Attributes:
        model: ``name@version``.
        num_rows: Rows that were measured.
        num_failed: Rows that could not be predicted; not measured.
        r2: Coefficient of determination.
        mae: Mean absolute error.
        rmse: Root of the mean squared error.
        codec_use: How the rows were made and sent. See ``Prediction``.
        candidates: Sets of slices that were tried when the model was trained. See ``Model``.
    """

    model: str
    num_rows: int
    num_failed: int
    r2: float
    mae: float
    rmse: float
    codec_use: CodecUse = field(default_factory=CodecUse)
    candidates: tuple[Candidate, ...] = ()

    @property
    def task(self) -> str:
        """``regression``."""
        return REGRESSION

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {
            "task": self.task,
            "model": self.model,
            "num_rows": self.num_rows,
            "num_failed": self.num_failed,
            "r2": self.r2,
            "mae": self.mae,
            "rmse": self.rmse,
            "codec_use": vars(self.codec_use),
        }

    def summary(self) -> str:
        """Return it as text."""
        return (
            f"{self.model}: R2 {self.r2:.4f}, mean absolute error {self.mae:.4g}, "
            f"root mean squared error {self.rmse:.4g} on {_rows(self)}"
            + (f"\nrows sent as {_sent(self.codec_use)}" if self.codec_use.codec else "")
        )

    def _repr_html_(self) -> str:
        return _html.facts(
            f"Report on {self.model}",
            [
                ("R2", f"{self.r2:.4f}"),
                ("mean absolute error", f"{self.mae:.4g}"),
                ("root mean squared error", f"{self.rmse:.4g}"),
                *_row_facts(self),
            ],
        ) + _html.candidates(self.candidates)


@dataclass(frozen=True)
class MultiLabelReport:
    """How well a model does that tells for each class whether a row is of it: at probabilities above 0.5.

    Attributes:
        model: ``name@version``.
        num_rows: Rows that were measured.
        num_failed: Rows that could not be predicted; not measured.
        subset_accuracy: Fraction of rows whose classes are all right.
        micro_f1: F1 over all rows and classes together.
        macro_f1: Mean F1 over the classes that occur.
        classes: Scores of each class.
        codec_use: How the rows were made and sent. See ``Prediction``.
        candidates: Sets of slices that were tried when the model was trained. See ``Model``.
    """

    model: str
    num_rows: int
    num_failed: int
    subset_accuracy: float
    micro_f1: float
    macro_f1: float
    classes: tuple[ClassScore, ...]
    codec_use: CodecUse = field(default_factory=CodecUse)
    candidates: tuple[Candidate, ...] = ()

    @property
    def task(self) -> str:
        """``multi_label``."""
        return MULTI_LABEL

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {
            "task": self.task,
            "model": self.model,
            "num_rows": self.num_rows,
            "num_failed": self.num_failed,
            "subset_accuracy": self.subset_accuracy,
            "micro_f1": self.micro_f1,
            "macro_f1": self.macro_f1,
            "classes": [vars(one) for one in self.classes],
            "codec_use": vars(self.codec_use),
        }

    def summary(self) -> str:
        """Return it as text."""
        return "\n".join(
            [
                f"{self.model}: micro F1 {self.micro_f1:.4f} on {_rows(self)}",
                f"macro F1 {self.macro_f1:.4f}, all classes right in {self.subset_accuracy:.4f} of the rows",
                *([f"rows sent as {_sent(self.codec_use)}"] if self.codec_use.codec else []),
                "",
                *_class_lines(self.classes),
            ]
        )

    def __repr__(self) -> str:
        """Return the figures that matter most."""
        return f"MultiLabelReport({self.model!r}, micro_f1={self.micro_f1:.4f}, num_rows={self.num_rows})"

    def _repr_html_(self) -> str:
        head = _html.facts(
            f"Report on {self.model}",
            [
                ("micro F1", f"{self.micro_f1:.4f}"),
                ("macro F1", f"{self.macro_f1:.4f}"),
                ("subset accuracy", f"{self.subset_accuracy:.4f}"),
                *_row_facts(self),
            ],
        )
        return head + _class_table(self.classes) + _html.candidates(self.candidates)


Report = ClassificationReport | MultiLabelReport | RegressionReport


def classification_report(
    model: str,
    class_names: Sequence[str],
    truth_N: npt.NDArray[np.integer[Any]],
    probabilities_NK: npt.NDArray[np.float32],
    *,
    num_failed: int = 0,
) -> ClassificationReport:
    """Measure a classifier.

    Shape:
        truth_N: (N,), indices into ``class_names``.
        probabilities_NK: (N, K).
    """
    num_classes = len(class_names)
    predicted_N = probabilities_NK.argmax(axis=1)
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (truth_N, predicted_N), 1)
    classes, macro_f1 = _class_scores(class_names, confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0))
    return ClassificationReport(
        model=model,
        num_rows=len(truth_N),
        num_failed=num_failed,
        accuracy=float((predicted_N == truth_N).mean()),
        macro_f1=macro_f1,
        calibration_error=calibration_error(truth_N, probabilities_NK),
        classes=classes,
        confusion_KK=confusion,
    )


def multi_label_report(
    model: str,
    class_names: Sequence[str],
    truth_NK: npt.NDArray[np.integer[Any]],
    probabilities_NK: npt.NDArray[np.float32],
    *,
    num_failed: int = 0,
) -> MultiLabelReport:
    """Measure a model that tells for each class whether a row is of it.

    Shape:
        truth_NK: (N, K), 0 or 1.
        probabilities_NK: (N, K).
    """
    truth, said = truth_NK.astype(bool), probabilities_NK > 0.5
    right_K, support_K, named_K = (truth & said).sum(axis=0), truth.sum(axis=0), said.sum(axis=0)
    classes, macro_f1 = _class_scores(class_names, right_K, support_K, named_K)
    return MultiLabelReport(
        model=model,
        num_rows=len(truth),
        num_failed=num_failed,
        subset_accuracy=float((truth == said).all(axis=1).mean()),
        micro_f1=float(_ratio(2 * right_K.sum(), support_K.sum() + named_K.sum())),
        macro_f1=macro_f1,
        classes=classes,
    )


def calibration_error(truth_N: npt.NDArray[np.integer[Any]], probabilities_NK: npt.NDArray[np.float32]) -> float:
    """Return the expected calibration error of the most probable class.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 5, with 15 bins.
    """
    confidence = probabilities_NK.max(axis=1).astype(np.float64)
    right = (probabilities_NK.argmax(axis=1) == truth_N).astype(np.float64)
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    gap = np.bincount(bins, weights=right - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gap).sum() / len(truth_N))


def regression_report(
    model: str, truth_NM: npt.NDArray[np.float32], values_NM: npt.NDArray[np.float32], *, num_failed: int = 0
) -> RegressionReport:
    """Measure a regression.

    Shape:
        truth_NM, values_NM: (N, M).
    """
    truth, values = truth_NM.astype(np.float64), values_NM.astype(np.float64)
    residual = ((truth - values) ** 2).sum(axis=0)
    spread = ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
    # As scikit-learn has it: a constant truth scores 1 if hit exactly, else 0.
    scores = np.where(spread > 0, 1 - residual / np.where(spread > 0, spread, 1), np.where(residual > 0, 0.0, 1.0))
    return RegressionReport(
        model=model,
        num_rows=len(truth),
        num_failed=num_failed,
        r2=float(scores.mean()),
        mae=float(np.abs(truth - values).mean()),
        rmse=float(np.sqrt((residual / len(truth)).mean())),
    )


def _class_scores(
    class_names: Sequence[str],
    right_K: npt.NDArray[np.integer[Any]],
    support_K: npt.NDArray[np.integer[Any]],
    named_K: npt.NDArray[np.integer[Any]],
) -> tuple[tuple[ClassScore, ...], float]:
    """Return the scores of each class, and the mean F1 over those that occur.

    Shape:
        right_K, support_K, named_K: (K,), how often a class was found, is there, and was said to be.
    """
    precision, recall = _ratio(right_K, named_K), _ratio(right_K, support_K)
    f1 = _ratio(2 * right_K, support_K + named_K)
    occurs = (support_K + named_K) > 0
    classes = tuple(
        ClassScore(name, float(precision[k]), float(recall[k]), float(f1[k]), int(support_K[k]))
        for k, name in enumerate(class_names)
    )
    return classes, float(f1[occurs].mean()) if occurs.any() else 0.0


def _class_lines(classes: Sequence[ClassScore]) -> list[str]:
    """Return the scores of classes as lines of text, of many classes the first."""
    shown = classes[:_MAX_TEXT_CLASSES]
    width = max((len(one.name) for one in shown), default=5)
    lines = [
        f"{one.name:<{width}}  {one.precision:>9.3f}  {one.recall:>6.3f}  {one.f1:>6.3f}  {one.support:>7}"
        for one in shown
    ]
    more = [f"... and {len(classes) - len(shown)} more classes"] if len(classes) > len(shown) else []
    return [f"{'class':<{width}}  precision  recall      f1  support", *lines, *more]


def _class_table(classes: Sequence[ClassScore]) -> str:
    return _html.table(
        ("class", "precision", "recall", "F1", "support"),
        [(c.name, f"{c.precision:.3f}", f"{c.recall:.3f}", f"{c.f1:.3f}", c.support) for c in classes],
    )


def _rows(report: Report) -> str:
    """Return how many rows were measured, and how many not."""
    failed = f" ({report.num_failed} could not be predicted)" if report.num_failed else ""
    return f"{report.num_rows} rows{failed}"


def _row_facts(report: Report) -> list[tuple[str, object]]:
    """Return the same for a page, and how the rows were sent."""
    return [
        ("rows", report.num_rows),
        ("could not be predicted", report.num_failed or None),
        ("sent as", _sent(report.codec_use)),
    ]


def _sent(use: CodecUse) -> str:
    return f"{use.codec}, embedding error {use.embedding_error:.2g}" if use.codec else ""


def _ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Divide; nothing over nothing is 0."""
    above, below = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    result: npt.NDArray[np.float64] = np.where(below > 0, above / np.maximum(below, 1), 0.0)
    return result
