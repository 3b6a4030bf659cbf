"""Trained models."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from trunkline_wire.specs import FeatureSpace

from trunkline import _html
from trunkline._codecs import parse_label
from trunkline._inference import DEFAULT_IN_FLIGHT, FeatureFeed, Feed, StemFeed, run
from trunkline.datasets import rows_deadline
from trunkline.errors import BadLabelsError, IncompatibleModelError, UnsupportedError
from trunkline.labels import Targets, encode_labels, label_names
from trunkline.predictions import Prediction
from trunkline.progress import show_progress
from trunkline.records import Candidate, ModelRecord
from trunkline.reports import Report, classification_report, regression_report
from trunkline.stems import Stem, has_onnxruntime

if TYPE_CHECKING:
    from trunkline._deadline import Deadline
    from trunkline.client import Client


class Model:
    """A version of a trained model on the cluster. Never changes.

    Attributes:
        record: Everything that the cluster keeps about it.
    """

    def __init__(self, client: Client, record: ModelRecord, *, is_whole: bool = True) -> None:
        """Keep who asks, and whether the record has everything: lists leave the candidates out."""
        self._client = client
        self._is_whole = is_whole
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

    @property
    def codec(self) -> str:
        """How the rows that it was trained on were made and sent: ``float16``, ``int8@int8``, ``images`` ..."""
        return self.record.codec

    @property
    def codec_error(self) -> float:
        """What that does to the embedding: the largest relative error on the cluster's sample pictures."""
        return self.record.codec_error

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Sets of slices that were tried in cross-validation, best first. Empty unless they were chosen automatically.

        A model out of a list asks the cluster once for them.
        """
        if not self._is_whole:
            self.record = self._client._calls.registry.get(self.reference, self._client._deadline(None))
            self._is_whole = True
        return self.record.candidates

    def stem(
        self,
        *,
        precision: str | None = None,
        codec: str | None = None,
        max_error: float | None = None,
        threads: int | None = None,
        timeout_s: float | None = None,
        progress: bool | None = None,
    ) -> Stem:
        """Return the stem that goes with it.

        Args:
            precision: ``float32`` or ``int8``. None: as it was trained.
            codec: As in ``Client.stem``. None: as it was trained.
            max_error: As in ``Client.stem``.
            threads: As in ``Client.stem``.
            timeout_s: As in ``Client.stem``.
            progress: As in ``Client.stem``.

        Raises:
            UnsupportedError: It was trained on pictures.
        """
        space = self.space
        if space.is_input:
            raise UnsupportedError(
                f"{self.reference} was trained on pictures: no stem goes with it",
                hint=f"Choose a cut yourself: client.stem({space.backbone!r}, cut=..., input_size={space.input_size})",
            )
        own_codec, own_precision = parse_label(self.codec)
        return self._client.stem(
            space.backbone,
            cut=space.cut,
            input_size=space.input_size,
            precision=precision or own_precision,
            codec=codec or own_codec,
            max_error=max_error,
            threads=threads,
            timeout_s=timeout_s,
            progress=progress,
        )

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

        Features are sent if there is a stem: the one given, else the one the model was trained with, in the same
        codec, if ONNX Runtime is installed. Otherwise the images are sent, as files or resized and cropped, whichever
        is smaller. ``Prediction.codec_use`` says what that was.

        A row that fails leaves the others alone: see ``Prediction``.

        Args:
            images: As in ``Client.upload``.
            stem: Computes the features here. None: chosen as said above. False: none, images are sent.
            batch_size: Rows that travel together. None: about 2 MiB, 64 rows at most.
            max_in_flight: Most batches without an answer.
            timeout_s: Deadline for everything, retries included. None: 60 s and 0.25 s a row.
            progress: None: show it if somebody can see it. False: never.

        Raises:
            IncompatibleModelError: The stem is not one of the model's backbone and input size, or its features differ
                by more from what the model was trained on than is allowed.
            TrunklineError: Every row failed: the first row's error.
        """
        from trunkline.images import pictures

        rows = pictures(images)
        deadline = rows_deadline(timeout_s, len(rows))
        deadline.check("predict")
        chosen = self._own_stem() if stem is None else stem
        feed: Feed
        if chosen:
            self._check_stem(chosen, deadline)
            feed = StemFeed(rows, chosen)
        else:
            feed = self._client._backbones.image_feed(rows, self.space.backbone, self.space.input_size, deadline)
        return self._predict(feed, batch_size, max_in_flight, deadline, progress)

    def predict_features(
        self,
        features: Any,
        *,
        space: FeatureSpace | None = None,
        codec: str | None = None,
        batch_size: int | None = None,
        max_in_flight: int = DEFAULT_IN_FLIGHT,
        timeout_s: float | None = None,
        progress: bool | None = None,
    ) -> Prediction:
        """Predict features at hand.

        Args:
            features: Output of a stem, float16 or float32, or of ``Stem.pack``.
            space: Where they live. Default: where the model was trained.
            codec: In which they travel, as in ``Client.stem``. Default: as they are.
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
        feed = FeatureFeed(self._client._backbones.features(features, where, codec, deadline))
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
            report: Report = regression_report(self.reference, truth[good], outputs, num_failed=failed)
        else:
            report = classification_report(self.reference, self.class_names, truth[good], outputs, num_failed=failed)
        return replace(report, codec_use=prediction.codec_use, candidates=self.candidates)

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
            "codec": record.codec,
            "codec_error": record.codec_error,
            "candidates": [asdict(one) for one in record.candidates],
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
                ("codec", f"{self.codec}, embedding error {self.codec_error:.2g}" if self.codec else ""),
                *((name, f"{value:.4g}") for name, value in sorted(record.metrics.items())),
            ],
        ) + _html.candidates(record.candidates)

    def _own_stem(self) -> Stem | None:
        return None if self.space.is_input or not has_onnxruntime() else self.stem()

    def _check_stem(self, stem: Stem, deadline: Deadline) -> None:
        own, other = self.space, stem.space
        if (own.backbone, own.input_size) != (other.backbone, other.input_size):
            raise IncompatibleModelError(
                f"{self.reference} needs {own.backbone} at input size {own.input_size}; "
                f"the stem is of {other.backbone} at {other.input_size}",
                hint=f"Use client.stem({own.backbone!r}, cut={own.cut!r}, input_size={own.input_size}), or no stem",
            )
        if own.cut != other.cut or own.fingerprint == other.fingerprint:
            return
        # Two stems of one cut, exact and quantised, have a fingerprint each. All others are of other weights.
        cut = self._client._backbones.describe(own.backbone, own.input_size, deadline).cut(own.cut)
        if cut is None or None in (cut.precision_of(own.fingerprint), cut.precision_of(other.fingerprint)):
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
                one=lambda batch: calls.predict(feed.space, batch, self.reference, deadline),
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
            codec_use=found.codec_use,
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
