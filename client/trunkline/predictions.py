"""What a model says about rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from trunkline_wire import conformal
from trunkline_wire.errors import WireError
from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL
from trunkline_wire.specs import CodecUse, Timings

from trunkline import _html
from trunkline.errors import InvalidArgumentError, TrunklineError, UnsupportedError, from_wire
from trunkline.records import Conformal

# Shape suffix legend: N = rows, K = classes or outputs


@dataclass(frozen=True)
class RowPrediction:
    """What a model says about one row.

    Attributes:
        label: The most probable class; where a row may be of several, all that are more probable than not. None for
            numbers, and if the row failed.
        outputs_K: Probabilities of the classes, or values; NaN if the row failed.
        error: Why the row failed, or None.
        outlier_distance: How far it is from the training rows. None if nobody asked, NaN if the row failed.
        outlier_score: Share of the rows held out that were nearer. Likewise.
    """

    label: str | tuple[str, ...] | None
    outputs_K: npt.NDArray[np.float32]
    error: TrunklineError | None
    outlier_distance: float | None = None
    outlier_score: float | None = None

    @property
    def text(self) -> str:
        """What is said in a word or a few: the label, all of them, or the values."""
        if isinstance(self.label, tuple):
            return ", ".join(self.label) or "none"
        return self.label if self.label is not None else ", ".join(f"{value:.4g}" for value in self.outputs_K)


@dataclass(frozen=True)
class Prediction:
    """What a model says about rows, in their order.

    A row that failed (a picture that cannot be decoded among good ones) has the label None, NaN outputs and an entry
    in ``errors``; the other rows are not affected. If every row fails, the first error is raised instead.

    Attributes:
        model: The model that answered, as ``name@version``.
        class_names: In the order of the columns of ``probabilities``. Empty for numbers.
        outputs_NK: float32; probabilities or values.
        labels: The most probable class of each row; where a row may be of several, a tuple of all that are more
            probable than not.
        errors: Row number to error.
        timings: Where the time in the cluster went, in seconds, summed over the batches.
        wall_s: Seconds the call took here.
        codec_use: How the rows were made and sent, what that does to the embedding, and what the model was trained on.
            Its ``codec`` is empty if the cluster is too old to say.
        task: ``classification``, ``multi_label``, ``ordinal`` or ``regression``.
        conformal: What ``sets`` and ``intervals`` go by. None if the model has nothing of the kind.
        views: Views of each picture whose answers were averaged. 1: the picture's own.
        outlier_distances: (N,), float32, if asked for: how far each row is from the nearest class of the training
            rows; these are 1 on average. NaN in rows that failed.
        outlier_scores: (N,), float32, likewise: the share of the rows held out from training that were nearer, 0 to 1.
    """

    model: str
    class_names: tuple[str, ...]
    outputs_NK: npt.NDArray[np.float32]
    labels: Sequence[str | tuple[str, ...] | None]
    errors: Mapping[int, TrunklineError]
    timings: Timings
    wall_s: float
    codec_use: CodecUse = field(default_factory=CodecUse)
    task: str = CLASSIFICATION
    conformal: Conformal | None = None
    views: int = 1
    outlier_distances: npt.NDArray[np.float32] | None = None
    outlier_scores: npt.NDArray[np.float32] | None = None

    @property
    def probabilities(self) -> npt.NDArray[np.float32]:
        """(N, K) probabilities. Where a row may be of several classes, each on its own.

        Raises:
            UnsupportedError: The model predicts numbers.
        """
        if not self.class_names:
            raise UnsupportedError(f"{self.model} predicts numbers, not classes", hint="Use .values")
        return self.outputs_NK

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """(N, K) numbers.

        Raises:
            UnsupportedError: The model predicts classes.
        """
        if self.class_names:
            raise UnsupportedError(f"{self.model} predicts classes, not numbers", hint="Use .labels or .probabilities")
        return self.outputs_NK

    @property
    def indices(self) -> npt.NDArray[np.int64]:
        """(N,) indices of the labels in ``class_names``; -1 in rows that failed.

        Raises:
            UnsupportedError: A row may be of several classes.
        """
        if self.task == MULTI_LABEL:
            raise UnsupportedError(f"{self.model} may find several classes in a row", hint="Use .label_sets()")
        known = {name: index for index, name in enumerate(self.class_names)}
        return np.array([known.get(str(one), -1) for one in self.labels], dtype=np.int64)

    def label_sets(self, threshold: float = 0.5) -> list[tuple[str, ...] | None]:
        """Return the classes of each row whose probability is above a threshold; None for a row that failed.

        Raises:
            UnsupportedError: A row is of one class, or numbers are predicted.
        """
        if self.task != MULTI_LABEL:
            raise UnsupportedError(f"{self.model} finds one class in a row, or numbers", hint="Use .labels or .values")
        return label_sets(self.outputs_NK, self.class_names, threshold)

    def sets(self, coverage: float = 0.9) -> list[tuple[str, ...] | None]:
        """Return the classes that each row may be of, the likeliest first, so that the true one is among them.

        It is for at least the share ``coverage`` of new rows, if they come from where the held-out rows came from,
        however good the model is: a poor one has large sets. Where too few rows were held out to promise as much, all
        classes are in.

        Args:
            coverage: Above 0 and below 1.

        Raises:
            UnsupportedError: No rows were held out, a row may be of several classes, or numbers are predicted.
            InvalidArgumentError: The coverage is out of range.
        """
        if not self.class_names or self.task == MULTI_LABEL:
            raise UnsupportedError(f"{self.model} does not find one class in a row", hint="Use .intervals or .labels")
        known = self._known_rows()
        inside_NK = np.zeros((len(self), len(self.class_names)), dtype=bool)
        inside_NK[known] = conformal.sets(self.outputs_NK[known], self._threshold(coverage))
        order_NK = np.argsort(-self.outputs_NK, axis=1, kind="stable")
        return [
            tuple(self.class_names[index] for index in order_K if inside_K[index]) if row_is_known else None
            for order_K, inside_K, row_is_known in zip(order_NK, inside_NK, known, strict=True)
        ]

    def intervals(self, coverage: float = 0.9) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the lowest and the highest values, (N, K) each, so that the true ones lie between them.

        They do for at least the share ``coverage`` of new rows, as for ``sets``; all values of a row at once. Where too
        few rows were held out to promise as much, they are endless. NaN in rows that failed.

        Args:
            coverage: Above 0 and below 1.

        Raises:
            UnsupportedError: No rows were held out, or classes are predicted.
            InvalidArgumentError: The coverage is out of range.
        """
        if self.class_names:
            raise UnsupportedError(f"{self.model} predicts classes, not numbers", hint="Use .sets")
        threshold, known = self._threshold(coverage), self._known_rows()
        assert self.conformal is not None
        low_NK = np.full(self.outputs_NK.shape, np.nan)
        high_NK = low_NK.copy()
        low_NK[known], high_NK[known] = conformal.intervals(
            self.outputs_NK[known], threshold, np.array(self.conformal.scales)
        )
        return low_NK, high_NK

    def unusual(self, share: float = 0.99) -> npt.NDArray[np.bool_]:
        """Return which rows are unlike the model's training rows, (N,): what is said of them is a guess.

        They are farther from these than the share ``share`` of the rows held out. Of new rows that are like those,
        about one in a hundred is called unusual at 0.99; where N rows, fewer than a hundred, were held out, one in N.
        False in rows that failed.

        Args:
            share: Above 0, at most 1.

        Raises:
            UnsupportedError: Outlier scores were not asked for.
            InvalidArgumentError: The share is out of range.
        """
        if self.outlier_scores is None:
            raise UnsupportedError(
                "outlier scores were not asked for", hint="Use model.predict(..., outliers=True) and then .unusual()"
            )
        if not 0 < share <= 1:
            raise InvalidArgumentError(f"share is {share}; expected above 0, and at most 1")
        # As they came: 0.99 is less than 0.99 in float32.
        scores: npt.NDArray[np.bool_] = self.outlier_scores >= np.float32(share)
        return scores

    def _threshold(self, coverage: float) -> float:
        if self.views > 1:
            raise UnsupportedError(
                "sets and intervals go by what the model said of pictures alone, not of the average over their views",
                hint="Predict without views= for these",
            )
        if self.conformal is None:
            raise UnsupportedError(
                f"{self.model} was trained without rows held out, or by an older cluster",
                hint="Train again with validation= above 0",
            )
        try:
            return conformal.threshold(self.conformal.scores, self.conformal.num_rows, coverage)
        except WireError as error:
            raise from_wire(error) from None

    def _known_rows(self) -> npt.NDArray[np.bool_]:
        known: npt.NDArray[np.bool_] = np.array([row not in self.errors for row in range(len(self))], dtype=bool)
        return known

    def raise_for_errors(self) -> None:
        """Raise the error of the first row that failed, if any did."""
        if self.errors:
            raise self.errors[min(self.errors)]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.outputs_NK)

    def __getitem__(self, row: int) -> RowPrediction:
        """Return one row's."""
        row = range(len(self))[row]
        return RowPrediction(
            self.labels[row],
            self.outputs_NK[row],
            self.errors.get(row),
            None if self.outlier_distances is None else float(self.outlier_distances[row]),
            None if self.outlier_scores is None else float(self.outlier_scores[row]),
        )

    def __iter__(self) -> Iterator[RowPrediction]:
        """Yield each row's."""
        return (self[row] for row in range(len(self)))

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON. NaN becomes None."""
        rows = []
        for number, one in enumerate(self):
            row: dict[str, Any] = {"row": number}
            if one.error is not None:
                row["error"] = {"code": one.error.code.name if one.error.code else "", "message": one.error.message}
            elif self.class_names:
                row["labels" if self.task == MULTI_LABEL else "label"] = one.label
                row["probabilities"] = dict(zip(self.class_names, one.outputs_K.tolist(), strict=True))
            else:
                row["values"] = one.outputs_K.tolist()
            if one.error is None and one.outlier_score is not None:
                row |= {"outlier_distance": one.outlier_distance, "outlier_score": one.outlier_score}
            rows.append(row)
        return {
            "model": self.model,
            "task": self.task,
            "rows": rows,
            "timings": vars(self.timings),
            "wall_s": self.wall_s,
            "codec_use": vars(self.codec_use),
            "views": self.views,
        }

    def __repr__(self) -> str:
        """Return model, rows, failures, and how the rows were sent."""
        failed = f", {len(self.errors)} failed" if self.errors else ""
        sent = f", sent as {_sent(self.codec_use)}" if self.codec_use.codec else ""
        return f"Prediction({self.model!r}, {len(self)} rows{failed}{sent})"

    def _repr_html_(self) -> str:
        rows: list[Sequence[object]] = []
        for number, one in enumerate(self):
            if number == 20:
                rows.append(("...", f"{len(self) - 20} more", ""))
                break
            if one.error is not None:
                rows.append((number, "failed", one.error.message))
            elif self.class_names:
                rows.append((number, one.text, f"{float(one.outputs_K.max()):.3f}"))
            else:
                rows.append((number, one.text, ""))
        use = self.codec_use
        trained = f"{use.trained_codec}, embedding error {use.trained_error:.2g}" if use.trained_codec else ""
        facts = [("sent as", _sent(use) if use.codec else ""), ("trained on", trained)]
        return _html.facts(f"Prediction of {self.model}", facts) + _html.table(("row", "prediction", ""), rows)


def averaged(prediction: Prediction, views: int) -> Prediction:
    """Return what a model says about pictures from what it says about their views: the mean of those that did not fail.

    Args:
        prediction: Of the views, those of a picture one after another.
        views: Of each picture.
    """
    if views == 1:
        return prediction
    outputs_NVK = prediction.outputs_NK.reshape(-1, views, prediction.outputs_NK.shape[1]).astype(np.float64)
    failed = [
        row for row in range(len(outputs_NVK)) if all(row * views + one in prediction.errors for one in range(views))
    ]
    is_good_NV1 = np.ones((len(outputs_NVK), views, 1), dtype=bool)
    is_good_NV1.reshape(-1)[list(prediction.errors)] = False
    count_N1 = is_good_NV1.sum(axis=1)
    total_NK = np.where(is_good_NV1, outputs_NVK, 0.0).sum(axis=1)
    outputs_NK = np.full(total_NK.shape, np.nan, dtype=np.float32)
    known_N = count_N1[:, 0] > 0
    outputs_NK[known_N] = total_NK[known_N] / count_N1[known_N]
    labels: Sequence[str | tuple[str, ...] | None] = [None] * len(outputs_NK)
    if prediction.task == MULTI_LABEL:
        labels = label_sets(outputs_NK, prediction.class_names)
    elif prediction.class_names:
        best_N = np.nan_to_num(outputs_NK).argmax(axis=1)
        labels = [prediction.class_names[best] if known else None for best, known in zip(best_N, known_N, strict=True)]
    return replace(
        prediction,
        outputs_NK=outputs_NK,
        labels=labels,
        errors={row: prediction.errors[row * views] for row in failed},
        views=views,
        outlier_distances=_of_pictures(prediction.outlier_distances, views),
        outlier_scores=_of_pictures(prediction.outlier_scores, views),
    )


def _of_pictures(values: npt.NDArray[np.float32] | None, views: int) -> npt.NDArray[np.float32] | None:
    """Return what was said of the pictures themselves, the first of their views."""
    return None if values is None else values[::views]


def label_sets(
    probabilities_NK: npt.NDArray[np.float32], class_names: Sequence[str], threshold: float = 0.5
) -> list[tuple[str, ...] | None]:
    """Return the classes of each row whose probability is above a threshold; None where it is NaN."""
    return [
        None
        if np.isnan(row).any()
        else tuple(name for name, value in zip(class_names, row, strict=True) if value > threshold)
        for row in probabilities_NK
    ]


def _sent(use: CodecUse) -> str:
    return f"{use.codec}, embedding error {use.embedding_error:.2g}"
