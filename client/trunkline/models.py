"""Trained models."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from trunkline_wire.heads import CONV, MULTI_LABEL, REGRESSION, HeadConfig
from trunkline_wire.specs import FeatureSpace

from trunkline import _html
from trunkline._codecs import parse_label
from trunkline._deadline import rows_deadline
from trunkline._features import paired
from trunkline._feeds import FeatureFeed, Feed
from trunkline._inference import DEFAULT_IN_FLIGHT, run, several
from trunkline._local_inputs import GivenImages, Local, LocalInput, bind_local
from trunkline._model_inputs import BackboneInputs, GivenStems, check_backbones, check_locals, check_own, input_of, join
from trunkline._onnx import has_onnxruntime
from trunkline.datasets import describe_source, describe_space, source_to_dict
from trunkline.errors import BadLabelsError, InvalidArgumentError, UnsupportedError
from trunkline.heads import head_summary
from trunkline.labels import Targets, encode_labels, encode_memberships, label_names
from trunkline.predictions import Prediction, averaged, label_sets
from trunkline.progress import show_progress
from trunkline.records import Candidate, DatasetSource, FineTuning, ModelInput, ModelRecord, Trial
from trunkline.reports import Report, classification_report, multi_label_report, regression_report
from trunkline.scores import all_scores
from trunkline.stems import Stem

if TYPE_CHECKING:
    from trunkline._views import Augmentation
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
        """``classification``, ``multi_label`` or ``regression``."""
        return self.record.task

    @property
    def class_names(self) -> tuple[str, ...]:
        """Its classes, in the order of the columns of the probabilities."""
        return self.record.class_names

    @property
    def metrics(self) -> Mapping[str, float]:
        """Held-out scores and the like, measured while training. ``NAME_low`` to ``NAME_high`` is a 95 % interval."""
        return self.record.metrics

    @property
    def warnings(self) -> tuple[str, ...]:
        """What its maker should know before trusting it: copies of training rows among those held out, and the like."""
        return self.record.warnings

    @property
    def has_outlier_scores(self) -> bool:
        """Whether ``predict(..., outliers=True)`` says how unlike its training rows a row is.

        Heads that read a map do not, nor do models that an older cluster trained.
        """
        return self.record.has_outlier_scores

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
    def inputs(self) -> tuple[DatasetSource, ...]:
        """Where the rows of all of its inputs live, the first included, and how those it was trained on were sent."""
        return self.record.inputs

    @property
    def more_inputs(self) -> tuple[ModelInput, ...]:
        """What it needs beside its first input."""
        return self.record.more_inputs

    @property
    def head(self) -> HeadConfig | None:
        """What its head is made of. None if the cluster does not say."""
        return self.record.head

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Sets of slices that were tried in cross-validation, best first. Empty unless they were chosen automatically.

        A model out of a list asks the cluster once for them.
        """
        return self._whole().candidates

    @property
    def fine_tuning(self) -> FineTuning | None:
        """What came of training the last blocks of the backbone; None where it was not tried."""
        return self.record.fine_tuning

    @property
    def trials(self) -> tuple[Trial, ...]:
        """What a sweep tried, in its order. Empty unless there was one."""
        return self._whole().trials

    def _whole(self) -> ModelRecord:
        if not self._is_whole:
            self.record = self._client._calls.registry.get(self.reference, self._client._deadline(None))
            self._is_whole = True
        return self.record

    def stem(
        self,
        *,
        precision: str | None = None,
        codec: str | None = None,
        max_error: float | None = None,
        threads: int | None = None,
        timeout_s: float | None = None,
        progress: bool | None = None,
        backbone: str | None = None,
    ) -> Stem:
        """Return the stem that goes with it.

        Args:
            precision: ``float32`` or ``int8``. None: as it was trained.
            codec: As in ``Client.stem``. None: as it was trained.
            max_error: As in ``Client.stem``.
            threads: As in ``Client.stem``.
            timeout_s: As in ``Client.stem``.
            progress: As in ``Client.stem``.
            backbone: Which of its backbones is meant, if it has several. Default: the first.

        Raises:
            UnsupportedError: It was trained on pictures, or on local features alone.
        """
        chosen = input_of(self.record, backbone)
        space = chosen.space
        if space.is_local:
            raise UnsupportedError(
                f"{self.reference} was trained on local features alone: no stem goes with it",
                hint="Give the local model with local=",
            )
        if space.local_model:
            raise UnsupportedError(
                f"{self.reference} was trained on features that {space.local_model!r}, a stem of your own, makes",
                hint=f"Make it anew: client.own_stem(local, {space.backbone!r}, cut={space.cut!r})",
            )
        if space.is_input:
            raise UnsupportedError(
                f"{self.reference} was trained on pictures: no stem goes with it",
                hint=f"Choose a cut yourself: client.stem({space.backbone!r}, cut=..., input_size={space.input_size})",
            )
        own_codec, own_precision = parse_label(chosen.codec)
        return self._client.stem(
            space.backbone,
            cut=space.cut,
            input_size=space.input_size,
            precision=precision or own_precision,
            codec=codec or own_codec,
            max_error=max_error,
            bottleneck=space.bottleneck or None,
            threads=threads,
            timeout_s=timeout_s,
            progress=progress,
        )

    def predict(
        self,
        images: Any,
        *,
        stem: GivenStems = None,
        local: Local | Sequence[Local] | None = None,
        local_inputs: Any = None,
        views: int = 1,
        augment: Augmentation | None = None,
        seed: int = 0,
        outliers: bool = False,
        batch_size: int | None = None,
        max_in_flight: int = DEFAULT_IN_FLIGHT,
        timeout_s: float | None = None,
        progress: bool | None = None,
    ) -> Prediction:
        """Predict rows.

        Features are sent if there is a stem: the one given, else the one the model was trained with, in the same
        codec, if ONNX Runtime is installed. Otherwise the images are sent, as files or resized and cropped, whichever
        is smaller. ``Prediction.codec_use`` says what that was. For a model of several backbones this is so for each
        of them, and a file travels once.

        A row that fails leaves the others alone: see ``Prediction``.

        Args:
            images: As in ``Client.upload``. None for a model of local features alone whose rows are given otherwise.
            stem: Computes the features here; a list has one for each of several backbones. None: chosen as said above.
                False: none, images are sent.
            local: The local model that it was trained with, or several. Vectors at hand:
                ``trunkline.local_features``.
            local_inputs: What goes into local models instead of the images, as in ``Client.upload``.
            views: Predict so many views of each image, itself and changed ones, and return the mean of their
                probabilities, or values. All of them are sent: it costs as much more.
            augment: How views are made, as in ``Client.upload``.
            seed: Of the views, likewise.
            outliers: Whether to say how unlike the model's training rows each row is: see ``Prediction.unusual``.
            batch_size: Rows that travel together. None: about 2 MiB, 64 rows at most.
            max_in_flight: Most batches without an answer.
            timeout_s: Deadline for everything, retries included. None: 60 s and 0.25 s a row.
            progress: None: show it if somebody can see it. False: never.

        Raises:
            IncompatibleModelError: The stem is not one of the model's backbone and input size, or its features differ
                by more from what the model was trained on than is allowed; or a local model is another one, or its
                features travel in another codec.
            InvalidArgumentError: A local model is missing, or is none of this model's.
            UnsupportedError: The model has no outlier scores.
            ShapeMismatchError: Inputs have different numbers of rows.
            TrunklineError: Every row failed: the first row's error.
        """
        from trunkline._views import given_views

        given = given_views(GivenImages(images), views, augment, seed, local, local_inputs)
        found = check_locals(self.record, bind_local(local, local_inputs, given))
        self._check_outliers(outliers)
        prediction = self._predict_given(given, found, stem, batch_size, max_in_flight, timeout_s, progress, outliers)
        return averaged(prediction, views)

    def predict_features(
        self,
        features: Any,
        *,
        space: FeatureSpace | Sequence[FeatureSpace] | None = None,
        codec: str | None = None,
        local: Local | Sequence[Local] | None = None,
        local_inputs: Any = None,
        outliers: bool = False,
        batch_size: int | None = None,
        max_in_flight: int = DEFAULT_IN_FLIGHT,
        timeout_s: float | None = None,
        progress: bool | None = None,
    ) -> Prediction:
        """Predict features at hand.

        Args:
            features: Output of a stem, float16 or float32, or of ``Stem.pack``. For a model of several backbones a list
                of these, in the order of its inputs.
            space: Where they live; a list for several backbones. Default: where the model was trained.
            codec: In which they travel, as in ``Client.stem``. Default: as they are.
            local: As in ``predict``.
            local_inputs: What goes into local models; there are no images here.
            outliers: As in ``predict``.
            batch_size: As in ``predict``.
            max_in_flight: As in ``predict``.
            timeout_s: As in ``predict``.
            progress: As in ``predict``.

        Shape:
            features: (N, ...), as in ``describe().cuts``.

        Raises:
            ShapeMismatchError, DtypeMismatchError, NotFiniteError, EmptyBatchError: Before anything is sent.
            IncompatibleModelError: They come from other weights, or a local model is another one.
            InvalidArgumentError: Features of a backbone or a local model are missing, or are none of this model's.
        """
        self._check_outliers(outliers)
        inputs = self.inputs
        sources = [one for one in inputs if not one.space.is_local]
        own = [one.space for one in sources]
        if not own:
            raise InvalidArgumentError(
                f"{self.reference} was trained on local features alone; these are of no backbone",
                hint="Use predict(None, local=trunkline.local_features(...))",
            )
        where = space if space is not None else own[0] if len(own) == 1 else own
        pairs = paired(features, where)
        check_backbones(self.reference, own, [one for _, one in pairs])
        found: dict[str, LocalInput] = {}
        if local is not None or local_inputs is not None or len(own) < len(inputs):
            found = check_locals(self.record, bind_local(local, local_inputs, GivenImages(None)))
        deadline = rows_deadline(timeout_s, len(pairs[0][0]))
        by_backbone = {
            one.backbone: self._client._backbones.features(rows, one, codec, deadline) for rows, one in pairs
        }
        for needed in sources:
            features_of_it = by_backbone[needed.space.backbone]
            check_own(self.reference, needed, features_of_it.space, features_of_it.codec)
        feeds = [FeatureFeed(by_backbone[one.backbone]) for one in own]
        feed = join(self.record, feeds, found)
        return self._predict(feed, batch_size, max_in_flight, deadline, progress, outliers)

    def evaluate(
        self,
        images: Any,
        labels: Any = None,
        *,
        stem: GivenStems = None,
        local: Local | Sequence[Local] | None = None,
        local_inputs: Any = None,
        views: int = 1,
        augment: Augmentation | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        timeout_s: float | None = None,
        progress: bool | None = None,
    ) -> Report:
        """Predict rows whose labels are known, and measure how well that went.

        Args:
            images: As in ``predict``.
            labels: As in ``Client.upload``; taken from class folders or a table if left out.
            stem: As in ``predict``.
            local: As in ``predict``.
            local_inputs: As in ``predict``.
            views: As in ``predict``.
            augment: As in ``predict``.
            seed: As in ``predict``.
            batch_size: As in ``predict``.
            timeout_s: As in ``predict``.
            progress: As in ``predict``.

        Raises:
            BadLabelsError: Labels are missing, of another number, or unknown to the model.
        """
        from trunkline._views import given_views
        from trunkline.images import labelled

        images, labels = labelled(images, labels)
        given = given_views(GivenImages(images), views, augment, seed, local, local_inputs)
        found = check_locals(self.record, bind_local(local, local_inputs, given))
        truth = self._truth(labels, self._num_rows(given, found) // views)
        prediction = averaged(
            self._predict_given(given, found, stem, batch_size, DEFAULT_IN_FLIGHT, timeout_s, progress), views
        )
        good = np.array([row not in prediction.errors for row in range(len(prediction))])
        outputs, failed = prediction.outputs_NK[good], int((~good).sum())
        if self.task == REGRESSION:
            report: Report = regression_report(self.reference, truth[good], outputs, num_failed=failed)
        elif self.task == MULTI_LABEL:
            report = multi_label_report(self.reference, self.class_names, truth[good], outputs, num_failed=failed)
        else:
            report = classification_report(self.reference, self.class_names, truth[good], outputs, num_failed=failed)
        return replace(report, codec_use=prediction.codec_use, candidates=self.candidates)

    def report(self, path: str | Path | None = None, *, images: Any = None, timeout_s: float | None = None) -> Path:
        """Write a report: one HTML file that needs nothing else, with what the cluster kept of the training.

        What an older cluster did not keep is missing, and the report says so.

        Args:
            path: Where to. A file that is there already is replaced. None: ``NAME-VERSION.html`` in the current folder.
            images: What was uploaded, in any form that ``Client.upload`` takes. Held-out rows and mistakes are shown as
                pictures then, by their places in the dataset.
            timeout_s: Deadline for everything that is asked. None: the setting's.

        Returns:
            Where it was written.

        Raises:
            InvalidArgumentError: The file cannot be written, or the images cannot be pictures.
        """
        from trunkline._report.report import write_report

        return write_report(self, path, images, self._client._deadline(timeout_s))

    def card(self, path: str | Path | None = None) -> str:
        """Return a model card for the Hugging Face Hub: Markdown with YAML in front.

        Args:
            path: Where to write it too. A file that is there already is replaced.

        Raises:
            InvalidArgumentError: The file cannot be written.
        """
        from trunkline._report.card import write_card

        return write_card(self, path, self._client._deadline(None))

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
            "trials": [asdict(one) for one in record.trials],
            "fine_tuning": None if record.fine_tuning is None else asdict(record.fine_tuning),
            "warnings": list(record.warnings),
            "has_outlier_scores": record.has_outlier_scores,
            "head_sha256": record.head_sha256,
            "more_inputs": [
                {
                    **source_to_dict(DatasetSource(one.space, one.codec)),
                    "codec_error": one.codec_error,
                    "slices": list(one.slices),
                    "width": one.width,
                }
                for one in record.more_inputs
            ],
            "local_model": record.space.local_model,
            "head": None if record.head is None else asdict(record.head),
            "versions": dict(record.versions),
            "job_id": record.job_id,
            "create_time": record.create_time.isoformat() if record.create_time else None,
        }

    def slices_by_input(self) -> list[tuple[DatasetSource, tuple[str, ...]]]:
        """Return each of its inputs with the slices that the head reads of it."""
        slices = [self.slices, *(one.slices for one in self.more_inputs)]
        return list(zip(self.inputs, slices, strict=True))

    def facts(self) -> list[tuple[str, str]]:
        """Return what it reads and what its head is made of, as names and values to be shown."""
        errors = [self.codec_error, *(one.codec_error for one in self.more_inputs)]
        rows: list[tuple[str, str]] = []
        for (source, slices), error in zip(self.slices_by_input(), errors, strict=True):
            measured = f", embedding error {error:.2g}" if source.codec and not source.space.is_local else ""
            rows.append(("and" if rows else "input", describe_source(source) + measured))
            if not source.space.is_local:
                rows.append(("slices", ", ".join(slices)))
        return [*rows, ("head", "" if self.head is None else head_summary(self.head))]

    def __repr__(self) -> str:
        """Return reference and task."""
        kind = f"{len(self.class_names)} classes" if self.class_names else f"{self.record.num_outputs} numbers"
        return f"Model({self.reference!r}, {kind}, {' and '.join(describe_space(one.space) for one in self.inputs)})"

    def _repr_html_(self) -> str:
        record = self.record
        return _html.facts(
            f"Model {self.reference}",
            [
                ("task", self.task),
                ("classes", ", ".join(self.class_names[:20]) + (" ..." if len(self.class_names) > 20 else "")),
                *self.facts(),
                ("dataset", record.dataset),
                *all_scores(record.metrics).items(),
                *(("warning", one) for one in record.warnings),
            ],
        ) + _html.candidates(record.candidates)

    def _model_stem(self, backbone: str) -> Stem | None:
        """Return the stem that goes with the input of a backbone, None where images are sent instead."""
        space = input_of(self.record, backbone).space
        if space.is_input or space.local_model or not has_onnxruntime():
            return None
        return self.stem(backbone=backbone)

    def _num_rows(self, given: GivenImages, local: Mapping[str, LocalInput]) -> int:
        has_backbone = any(not one.space.is_local for one in self.inputs)
        return len(given.pictures) if has_backbone else next(iter(local.values())).num_rows

    def _predict_given(
        self,
        given: GivenImages,
        local: Mapping[str, LocalInput],
        stem: GivenStems,
        batch_size: int | None,
        max_in_flight: int,
        timeout_s: float | None,
        progress: bool | None,
        outliers: bool = False,
    ) -> Prediction:
        readers = BackboneInputs(self.record, self._client._backbones, self._model_stem)
        if not readers.spaces and stem:
            raise InvalidArgumentError(
                f"{self.reference} was trained on local features alone; a stem makes none of them",
                hint="Leave stem= out",
            )
        deadline = rows_deadline(timeout_s, self._num_rows(given, local))
        deadline.check("predict")
        feeds = readers.feeds(given.pictures, stem, deadline) if readers.spaces else []
        feed = join(self.record, feeds, local)
        return self._predict(feed, batch_size, max_in_flight, deadline, progress, outliers)

    def _check_outliers(self, outliers: bool) -> None:
        """Check that the model has outlier scores, if they are asked for.

        Raises:
            UnsupportedError: It has none.
        """
        if not outliers or self.has_outlier_scores:
            return
        if self.head is not None and self.head.kind == CONV:
            why, hint = "its head reads a map, and there are none for these", "Train one that reads slices"
        else:
            why, hint = "an older cluster trained it, or answers", "Train it again on a cluster of this version"
        raise UnsupportedError(f"{self.reference} has no outlier scores: {why}", hint=f"{hint}, or leave outliers out")

    def _predict(
        self,
        feed: Feed,
        batch_size: int | None,
        max_in_flight: int,
        deadline: Any,
        progress: bool | None,
        outliers: bool,
    ) -> Prediction:
        calls, started, reference = self._client._calls.inference, time.monotonic(), self.reference
        with show_progress(f"Predicting with {reference}", feed.num_rows, several(feed, batch_size, progress)) as bar:
            found = run(
                feed,
                batch_size=batch_size,
                max_in_flight=max_in_flight,
                one=lambda batch: calls.predict(
                    feed.space, batch, reference, deadline, outliers=outliers, backbone=feed.backbone
                ),
                many=lambda batches, window: calls.stream_predict(
                    feed.space,
                    batches,
                    reference,
                    window=window,
                    deadline=deadline,
                    outliers=outliers,
                    backbone=feed.backbone,
                ),
                on_rows=bar.advance,
            )
        return Prediction(
            model=found.model,
            class_names=self.class_names,
            outputs_NK=found.matrix_NX,
            labels=found.labels if self.task != MULTI_LABEL else label_sets(found.matrix_NX, self.class_names),
            errors=found.errors,
            timings=found.timings,
            wall_s=time.monotonic() - started,
            codec_use=found.codec_use,
            task=self.task,
            conformal=self._whole().conformal,
            outlier_distances=None if found.outliers_N2 is None else found.outliers_N2[:, 0],
            outlier_scores=None if found.outliers_N2 is None else found.outliers_N2[:, 1],
        )

    def _truth(self, labels: Any, num_rows: int) -> Any:
        """Return class indices or targets of known labels."""
        if self.task == REGRESSION:
            targets = encode_labels(np.asarray(labels, dtype=np.float32), num_rows)
            assert isinstance(targets, Targets)
            if targets.values_NM.shape[1] != self.record.num_outputs:
                raise BadLabelsError(
                    f"{targets.values_NM.shape[1]} numbers a row; {self.reference} predicts {self.record.num_outputs}",
                    hint="Give as many as it was trained on",
                )
            return targets.values_NM
        if self.task == MULTI_LABEL:
            return encode_memberships(labels, num_rows, self.class_names)
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
