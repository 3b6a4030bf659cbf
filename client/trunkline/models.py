"""Trained models."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from trunkline_wire.specs import INPUT_CUT, FeatureSpace

from trunkline import _html
from trunkline._inference import DEFAULT_IN_FLIGHT, FeatureFeed, Feed, ImageFeed, StemFeed, run
from trunkline.datasets import check_features, rows_deadline
from trunkline.errors import BadLabelsError, IncompatibleModelError, NotFoundError
from trunkline.labels import Targets, encode_labels, label_names
from trunkline.predictions import Prediction
from trunkline.progress import show_progress
from trunkline.records import ModelRecord
from trunkline.reports import Report, classification_report, regression_report
from trunkline.stems import Stem, has_onnxruntime

if TYPE_CHECKING:
    from trunkline.client import Client


class Model:
    """A version of a trained model on the cluster. Never changes.

    Attributes:
        record: Everything that the cluster keeps about it.
    """

    def __init__(self, client: Client, record: ModelRecord) -> None:
        """Keep who asks."""
        self._client = client
        self.record = record

    @property
    def name(self) -> str:
        """Its name."""
        return self.record.name

    @property
    def version(self) -> int:
        """Its version, from 1."""
        return self.record.version

    @property
    def reference(self) -> str:
        """``name@version``."""
        return self.record.reference

    @property
    def task(self) -> str:
        """``classification`` or ``regression``."""
        return self.record.task

    @property
    def class_names(self) -> tuple[str, ...]:
        """Its classes, in the order of the columns of the probabilities."""
        return self.record.class_names

    @property
    def metrics(self) -> Mapping[str, float]:
        """Held-out scores and the like, measured while training."""
        return self.record.metrics

    @property
    def space(self) -> FeatureSpace:
        """What it was trained on."""
        return self.record.space

    @property
    def slices(self) -> tuple[str, ...]:
        """The slices of the embedding that it reads."""
        return self.record.slices

    def predict(
        self,
        images: Any,
        *,
        stem: Stem | Literal[False] | None = None,
        batch_size: int | None = None,
        max_in_flight: int = DEFAULT_IN_FLIGHT,
        timeout_s: float | None = None,
        progress: bool | None = None,
    ) -> Prediction:
        """Predict rows.

        Features are sent if there is a stem: the one given, else the one the model was trained with if ONNX Runtime
        is installed. Otherwise the images are sent, as files or resized and cropped, whichever is smaller.

        A row that fails leaves the others alone: see ``Prediction``.

        Args:
            images: As in ``Client.upload``.
            stem: Computes the features here. None: chosen as said above. False: none, images are sent.
            batch_size: Rows that travel together. None: about 2 MiB, 64 rows at most.
            max_in_flight: Most batches without an answer.
            timeout_s: Deadline for everything, retries included. None: 60 s and 0.25 s a row.
            progress: None: show it if somebody can see it. False: never.

        Raises:
            IncompatibleModelError: The stem is not one of the model's backbone and input size.
            TrunklineError: Every row failed: the first row's error.
        """
        from trunkline.images import pictures

        rows = pictures(images)
        deadline = rows_deadline(timeout_s, len(rows))
        deadline.check("predict")
        chosen = self._own_stem() if stem is None else stem
        feed: Feed
        if chosen:
            self._check_stem(chosen)
            feed = StemFeed(rows, chosen)
        else:
            spec = self._client._describe(self.space.backbone, self.space.input_size, deadline)
            cut = spec.cut(INPUT_CUT)
            if cut is None:
                raise NotFoundError(
                    f"{spec.name} takes no images", hint=f"Give a stem: client.stem({spec.name!r}, cut=...)"
                )
            feed = ImageFeed(rows, spec.space(cut), spec.preprocessing)
        return self._predict(feed, batch_size, max_in_flight, deadline, progress)

    def predict_features(
        self,
        features: Any,
        *,
        space: FeatureSpace | None = None,
        batch_size: int | None = None,
        max_in_flight: int = DEFAULT_IN_FLIGHT,
        timeout_s: float | None = None,
        progress: bool | None = None,
    ) -> Prediction:
        """Predict features at hand.

        Args:
            features: Output of a stem, float16 or float32.
            space: Where they live. Default: where the model was trained.
            batch_size: As in ``predict``.
            max_in_flight: As in ``predict``.
            timeout_s: As in ``predict``.
            progress: As in ``predict``.

        Shape:
            features: (N, ...), as in ``describe().cuts``.

        Raises:
            ShapeMismatchError, DtypeMismatchError, NotFiniteError, EmptyBatchError: Before anything is sent.
            IncompatibleModelError: They come from other weights.
        """
        where = space or self.space
        deadline = rows_deadline(timeout_s, len(features))
        shape = self._client._feature_shape(where, deadline)
        feed = FeatureFeed(check_features(features, shape, where), where)
        return self._predict(feed, batch_size, max_in_flight, deadline, progress)

    def evaluate(
        self,
        images: Any,
        labels: Any = None,
        *,
        stem: Stem | Literal[False] | None = None,
        batch_size: int | None = None,
        timeout_s: float | None = None,
        progress: bool | None = None,
    ) -> Report:
        """Predict rows whose labels are known, and measure how well that went.

        Args:
            images: As in ``Client.upload``.
            labels: One for each image; taken from class folders or a table if left out.
            stem: As in ``predict``.
            batch_size: As in ``predict``.
            timeout_s: As in ``predict``.
            progress: As in ``predict``.

        Raises:
            BadLabelsError: Labels are missing, of another number, or unknown to the model.
        """
        from trunkline.images import labelled, pictures

        images, labels = labelled(images, labels)
        rows = pictures(images)
        truth = self._truth(labels, len(rows))
        prediction = self.predict(rows, stem=stem, batch_size=batch_size, timeout_s=timeout_s, progress=progress)
        good = np.array([row not in prediction.errors for row in range(len(prediction))])
        outputs, failed = prediction.outputs_NK[good], int((~good).sum())
        if self.task == "regression":
            return regression_report(self.reference, truth[good], outputs, num_failed=failed)
        return classification_report(self.reference, self.class_names, truth[good], outputs, num_failed=failed)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        record = self.record
        return {
            "name": record.name,
            "version": record.version,
            "task": record.task,
            "class_names": list(record.class_names),
            "num_outputs": record.num_outputs,
            "backbone": record.space.backbone,
            "cut": record.space.cut,
            "input_size": record.space.input_size,
            "slices": list(record.slices),
            "metrics": dict(record.metrics),
            "dataset": record.dataset,
            "dataset_digest": record.dataset_digest,
            "head_sha256": record.head_sha256,
            "versions": dict(record.versions),
            "job_id": record.job_id,
            "create_time": record.create_time.isoformat() if record.create_time else None,
        }

    def __repr__(self) -> str:
        """Return reference and task."""
        kind = f"{len(self.class_names)} classes" if self.class_names else f"{self.record.num_outputs} numbers"
        return f"Model({self.reference!r}, {kind}, {self.space.backbone} at {self.space.cut})"

    def _repr_html_(self) -> str:
        record = self.record
        return _html.facts(
            f"Model {self.reference}",
            [
                ("task", self.task),
                ("classes", ", ".join(self.class_names[:20]) + (" ..." if len(self.class_names) > 20 else "")),
                ("backbone", self.space.backbone),
                ("cut", self.space.cut),
                ("input size", self.space.input_size),
                ("slices", ", ".join(self.slices)),
                ("dataset", record.dataset),
                *((name, f"{value:.4g}") for name, value in sorted(record.metrics.items())),
            ],
        )

    def _own_stem(self) -> Stem | None:
        if self.space.is_input or not has_onnxruntime():
            return None
        return self._client.stem(self.space.backbone, cut=self.space.cut, input_size=self.space.input_size)

    def _check_stem(self, stem: Stem) -> None:
        own, other = self.space, stem.space
        if (own.backbone, own.input_size) != (other.backbone, other.input_size):
            raise IncompatibleModelError(
                f"{self.reference} needs {own.backbone} at input size {own.input_size}; "
                f"the stem is of {other.backbone} at {other.input_size}",
                hint=f"Use client.stem({own.backbone!r}, cut={own.cut!r}, input_size={own.input_size}), or no stem",
            )
        if own.cut == other.cut and own.fingerprint != other.fingerprint:
            raise IncompatibleModelError(
                f"{self.reference} was trained on other weights of {own.backbone} than the stem has",
                hint="Fetch the stem once more, or train again",
            )

    def _predict(
        self, feed: Feed, batch_size: int | None, max_in_flight: int, deadline: Any, progress: bool | None
    ) -> Prediction:
        calls, started = self._client._calls.inference, time.monotonic()
        with show_progress(f"Predicting with {self.reference}", feed.num_rows, progress) as bar:
            found = run(
                feed,
                batch_size=batch_size,
                max_in_flight=max_in_flight,
                one=lambda batch: calls.predict(feed.space, batch.rows, self.reference, deadline),
                many=lambda batches, window: calls.stream_predict(
                    feed.space, batches, self.reference, window=window, deadline=deadline
                ),
                on_rows=bar.advance,
            )
        return Prediction(
            model=found.model,
            class_names=self.class_names,
            outputs_NK=found.matrix_NX,
            labels=found.labels,
            errors=found.errors,
            timings=found.timings,
            wall_s=time.monotonic() - started,
        )

    def _truth(self, labels: Any, num_rows: int) -> Any:
        """Return class indices or targets of known labels."""
        if self.task == "regression":
            targets = encode_labels(np.asarray(labels, dtype=np.float32), num_rows)
            assert isinstance(targets, Targets)
            if targets.values_NM.shape[1] != self.record.num_outputs:
                raise BadLabelsError(
                    f"{targets.values_NM.shape[1]} numbers a row; {self.reference} predicts {self.record.num_outputs}",
                    hint="Give as many as it was trained on",
                )
            return targets.values_NM
        names = label_names(labels)
        if len(names) != num_rows:
            raise BadLabelsError(f"{len(names)} labels for {num_rows} images", hint="Give one label for each image")
        known = {name: index for index, name in enumerate(self.class_names)}
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise BadLabelsError(
                f"{self.reference} knows no class {', '.join(map(repr, unknown[:5]))}",
                hint=f"It knows {', '.join(self.class_names[:10])}",
            )
        return np.array([known[name] for name in names])
