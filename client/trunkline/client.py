"""The client: everything that can be asked of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from trunkline_wire.quantise import FLOAT16
from trunkline_wire.specs import FLOAT32, INPUT_CUT, BackboneSpec, CutCost, FeatureSpace, Tuning

from trunkline import _html
from trunkline._backbones import Backbones
from trunkline._calls import Calls
from trunkline._codecs import check_codec, check_offered
from trunkline._deadline import Deadline, rows_deadline
from trunkline._features import paired
from trunkline._feeds import FeatureFeed, Feed, StemFeed
from trunkline._inference import DEFAULT_IN_FLIGHT, run, several
from trunkline._local_inputs import GivenImages, Local, LocalInput, bind_local
from trunkline._row_sources import FeatureRows, ImageRows, RowSource, StemRows
from trunkline._stem_shelf import StemShelf
from trunkline._track.recorder import open_all
from trunkline._upload import Upload, check_inputs, check_upload
from trunkline.bottlenecks import Bottlenecks
from trunkline.config import Settings
from trunkline.datasets import Dataset
from trunkline.errors import (
    DeadlineExceededError,
    EmptyBatchError,
    InvalidArgumentError,
)
from trunkline.estimates import UploadEstimate, measured_row_bytes
from trunkline.fine_tuning import FineTune, fine_tune_config
from trunkline.heads import Head
from trunkline.losses import ClassWeights, Loss, Optimiser, loss_config, needs_classes, optimiser_config, sweep_config
from trunkline.models import Model
from trunkline.predictions import Prediction
from trunkline.progress import show_progress
from trunkline.records import ServerInfo
from trunkline.stems import AnyStem, stem_list
from trunkline.training import Job, check_spec_of, make_spec, submit

if TYPE_CHECKING:
    from trunkline._views import Augmentation
    from trunkline.local_models import LocalModel
    from trunkline.own_stems import OwnStem
    from trunkline.stems import Stem
    from trunkline.track import Tracker

# Shape suffix legend: N = rows, D = embedding width

STEM_TIMEOUT_S = 600.0
"""Deadline for what concerns a stem, a cut or runtimes, where none is stated: the cluster may have to export or
measure first."""


class Client:
    """A connection to a cluster. Made by ``connect``; may be used by several threads, and after a fork.

    Attributes:
        settings: How the cluster is reached, and where that was found.
        info: What the cluster said about itself.
    """

    def __init__(self, settings: Settings, calls: Calls, info: ServerInfo) -> None:
        """Keep an open connection."""
        self.settings = settings
        self.info = info
        self._calls = calls
        self._bottlenecks = Bottlenecks(calls.trunk)
        self._backbones = Backbones(calls.catalog, info, self._bottlenecks)
        self._stems = StemShelf(calls.catalog, info, settings.cache_dir, self._backbones, self._bottlenecks)

    def __enter__(self) -> Client:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection. Jobs go on."""
        self._calls.close()

    def backbones(self, *, timeout_s: float | None = None) -> list[BackboneSpec]:
        """Return what can be used: cuts, slices, fingerprints, runtime, preprocessing."""
        return self._calls.catalog.backbones(self._deadline(timeout_s))

    def describe(self, name: str, *, input_size: int | None = None, timeout_s: float | None = None) -> BackboneSpec:
        """Return one backbone at an input size. Default: its own.

        Raises:
            NotFoundError: The cluster has no such backbone.
        """
        return self._backbones.describe(name, input_size or 0, self._deadline(timeout_s), again=True)

    def cut_cost(
        self, name: str, cut: str, *, input_size: int | None = None, timeout_s: float | None = None
    ) -> CutCost:
        """Return what sending features at a cut costs: bytes and embedding error of every codec and stem there.

        Measured by the cluster on its sample pictures the first time that anybody asks, which takes seconds.

        Args:
            name: Name of the backbone.
            cut: Name of the cut; ``input`` has the pictures themselves.
            input_size: Side of the square that pictures are brought to, in pixels. Default: the backbone's own.
            timeout_s: Deadline. Default: 600 s.

        Raises:
            NotFoundError: There is no such backbone or cut.
            UnsupportedError: The cluster is too old to know.
        """
        deadline = Deadline(STEM_TIMEOUT_S if timeout_s is None else timeout_s)
        return self._backbones.cost(name, cut, input_size or 0, deadline, again=True)

    def tune(
        self,
        name: str | None = None,
        *,
        cut: str = INPUT_CUT,
        input_size: int | None = None,
        again: bool = False,
        timeout_s: float | None = None,
    ) -> Tuning:
        """Return what the cluster measured of the runtimes that can run a backbone behind a cut, and which it uses.

        Measured the first time that anybody uses the cut, which takes seconds.

        Args:
            name: Name of the backbone. Default: the cluster's first.
            cut: Name of the cut.
            input_size: Side of the square that pictures are brought to, in pixels. Default: the backbone's own.
            again: Measure anew, those runtimes too that take long to compile, and use the best from then on. Takes
                minutes, in which everybody's rows wait longer.
            timeout_s: Deadline. Default: 600 s.

        Raises:
            NotFoundError: There is no such backbone or cut.
            UnsupportedError: The cluster is too old to know.
            PermissionDeniedError: The token is a reader's.
        """
        deadline = Deadline(STEM_TIMEOUT_S if timeout_s is None else timeout_s)
        return self._calls.catalog.tune(name or "", cut, input_size or 0, again, deadline)

    def stem(
        self,
        name: str,
        *,
        cut: str,
        input_size: int | None = None,
        precision: str = FLOAT32,
        codec: str | None = None,
        max_error: float | None = None,
        bottleneck: str | None = None,
        threads: int | None = None,
        timeout_s: float | None = None,
        progress: bool | None = None,
    ) -> Stem:
        """Return the part of a backbone before a cut, to be run here.

        Fetched once and kept in the user's cache directory, by fingerprint.

        Args:
            name: Name of the backbone.
            cut: Where it ends; ``describe`` lists the cuts.
            input_size: Side of the square that pictures are brought to, in pixels. Default: the backbone's own.
            precision: ``float32``, or ``int8`` for a quantised network: smaller, on most processors faster, and not
                quite exact. The cluster refuses it where it strays too far.
            codec: How its features travel: ``float32``, ``float16``, ``bfloat16``, or ``int8`` or ``int4`` with a scale
                for each row and channel; each also with ``+zstd``, which loses nothing. ``auto`` asks the cluster once
                and takes what needs the fewest bytes within ``max_error``. Default: ``float16``; with a bottleneck, the
                one that it was trained for, and no other.
            max_error: Largest embedding error, codec and stem together. Default: 0.05 for ``auto``; a codec that is
                named, or that goes with a bottleneck, is not held to any.
            bottleneck: SHA-256 of a bottleneck on the cluster, which encodes the features into fewer channels. See
                ``trunkline.torch.fit_bottleneck``.
            threads: Threads that the network runs on. 1 keeps it on the thread that calls. Default: ONNX Runtime's
                choice.
            timeout_s: Deadline for everything. Default: 600 s, for the cluster may have to export it first.
            progress: None: show it if somebody can see it. False: never.

        Raises:
            MissingExtraError: ONNX Runtime is not installed.
            NotFoundError: There is no such backbone, cut or bottleneck.
            IncompatibleModelError: The bottleneck is for other features.
            UnsupportedError: The cluster does not have that precision or codec, here or at all, or none is within
                ``max_error``.
            CorruptDataError: The file arrived damaged, several times.
        """
        return self._stems.get(
            name,
            cut,
            input_size or 0,
            precision=precision,
            codec=codec,
            max_error=max_error,
            bottleneck=bottleneck,
            threads=threads,
            deadline=Deadline(STEM_TIMEOUT_S if timeout_s is None else timeout_s),
            progress=progress,
        )

    def own_stem(
        self,
        local: LocalModel,
        backbone: str,
        *,
        cut: str,
        input_size: int | None = None,
        codec: str = FLOAT16,
        timeout_s: float | None = None,
    ) -> OwnStem:
        """Return a stem made of a local model: its output takes the place of the features at a cut.

        Usable wherever a stem is. Models that are trained on its features take them alone, in the same codec: not
        those of another local model, of the backbone's own stem, or images.

        Args:
            local: A local model that takes pictures (``input_size=``) and gives what the backbone takes at the cut,
                such as a module trained in front of ``trunkline.torch.RemoteTrunk``.
            backbone: Name of the backbone.
            cut: Where the features enter it; ``describe`` lists the cuts and the shapes there.
            input_size: Of the backbone, as in ``stem``; the local model has its own. Default: the backbone's own.
            codec: How the features travel, as in ``stem``, ``auto`` left out. The local model's own codec is not used.
            timeout_s: Deadline.

        Raises:
            NotFoundError: There is no such backbone or cut.
            InvalidArgumentError: The local model takes no pictures.
            ShapeMismatchError: Its output has another shape than the features at the cut.
            UnsupportedError: The cluster does not read that codec.
        """
        return self._stems.own(local, backbone, cut, input_size or 0, codec, self._deadline(timeout_s))

    def upload(
        self,
        images: Any,
        labels: Any = None,
        *,
        name: str,
        stem: AnyStem | Sequence[AnyStem] | None = None,
        local: Local | Sequence[Local] | None = None,
        local_inputs: Any = None,
        remote: bool = True,
        input_size: int | None = None,
        groups: Any = None,
        views: int = 1,
        augment: Augmentation | None = None,
        seed: int = 0,
        timeout_s: float | None = None,
        progress: bool | None = None,
    ) -> Dataset:
        """Make a dataset of labelled images, sending only what the cluster lacks.

        Calling it again after a failure, or with the same or more rows, sends and computes only what is missing.

        Args:
            images: A uint8 array of (N, H, W), (N, H, W, 1) or (N, H, W, 3); a list of arrays, of ``PIL.Image``, of
                paths or of encoded bytes; a folder of class folders; a CSV file or a table (pandas, polars) with
                columns ``path`` and ``label``. None where local models have other rows and ``remote`` is False.
            labels: Integers or strings for classes; a list, tuple or set of them for each row, or booleans of (N, K)
                (an array, or a table whose columns name the classes), where a row may be of several; floats (N,) or
                (N, M) for numbers. Taken from class folders or the table if left out; for a table also the name of a
                column.
            name: Of the dataset.
            stem: Computes features here, which are sent instead of the images. A list has one for each of several
                backbones, whose embeddings will stand side by side.
            local: A local model whose features stand beside, or several: see ``trunkline.local_model``. Also vectors
                at hand: ``trunkline.local_features``.
            local_inputs: What goes into the local model instead of the images, a row for each. For several local
                models a dict by their names; one that is not named there gets the images.
            remote: False: only local features are sent, and no backbone takes part.
            input_size: With a stem: must be the stem's. Without: what ``train`` takes for this dataset if it is told
                nothing else; the images are sent as they are.
            groups: One for each image, such as the patient or the camera that it is from, in any form that labels may
                have; for a table or a CSV file also the name of a column. Training never has some images of a group to
                learn from and others to measure with.
            views: So many of each image: itself, and changed ones to train on only, made here. 1 to 64. All are sent
                and embedded once: a training has them ready.
            augment: How changed views are made: ``trunkline.Augment(flip=0)``, or any function of a ``PIL.Image`` and a
                ``numpy.random.Generator`` that returns a ``PIL.Image``, such as
                ``trunkline.torch.from_torchvision(transform)``. Default: ``trunkline.Augment()``.
            seed: Of the views. They depend on it, on the image's content and on their number alone, so that uploading
                again sends nothing twice.
            timeout_s: Deadline for everything, reconnections included. None: 60 s and 0.25 s a row.
            progress: None: show it if somebody can see it. False: never.

        Raises:
            BadLabelsError: Before anything is sent.
            InvalidArgumentError: Likewise, where arguments do not fit each other.
            ShapeMismatchError: Inputs have different numbers of rows.
            CorruptImageError: One cannot be decoded. What was sent before is kept.
            StorageFullError: The cluster's storage is full. What was acknowledged is kept.
            UnsupportedError: The cluster is too old for several inputs, or for several classes a row.
        """
        from trunkline._views import given_views
        from trunkline.images import grouped, labelled

        stems = stem_list(stem)
        _check_choice(stems, local, remote, input_size)
        groups = grouped(images, groups)
        images, labels = labelled(images, labels)
        given = given_views(GivenImages(images), views, augment, seed, local, local_inputs)
        local_rows = bind_local(local, local_inputs, given)
        num_rows = len(given.pictures) if remote else local_rows[0].num_rows
        checked, groups_N = check_upload(name, labels, num_rows, groups=groups, views=views)
        self._check_codecs(local_rows)
        deadline = rows_deadline(timeout_s, num_rows)
        deadline.check("upload")
        sources = _sources(given, stems, local_rows, remote=remote)
        upload = Upload(self._calls, self.info, name, checked, groups_N=groups_N, views=views)
        size = None if stems else input_size
        return upload.run(sources, deadline=deadline, progress=progress, input_size=size)

    def estimate_upload(
        self,
        images: Any,
        *,
        stem: AnyStem | Sequence[AnyStem] | None = None,
        local: Local | Sequence[Local] | None = None,
        local_inputs: Any = None,
        remote: bool = True,
        views: int = 1,
        augment: Augmentation | None = None,
        seed: int = 0,
    ) -> UploadEstimate:
        """Return what ``upload`` would send if the cluster had nothing of it, measured on a few rows here.

        Nothing is sent or asked. Arguments are those of ``upload``.

        Raises:
            InvalidArgumentError: Arguments do not fit each other.
            ShapeMismatchError: Inputs have different numbers of rows.
            CorruptImageError: One of those that are measured cannot be decoded.
        """
        from trunkline._views import given_views

        stems = stem_list(stem)
        _check_choice(stems, local, remote, None)
        given = given_views(GivenImages(images), views, augment, seed, local, local_inputs)
        sources = _sources(given, stems, bind_local(local, local_inputs, given), remote=remote)
        check_inputs(sources)
        num_rows = len(sources[0].row_ids)
        per_row = sum(measured_row_bytes(one, range(num_rows)) for one in sources)
        return UploadEstimate(num_rows // views, views, round(per_row * num_rows))

    def upload_features(
        self,
        features: Any,
        labels: Any,
        *,
        name: str,
        space: FeatureSpace | Sequence[FeatureSpace],
        codec: str | None = None,
        local: Local | Sequence[Local] | None = None,
        local_inputs: Any = None,
        groups: Any = None,
        timeout_s: float | None = None,
        progress: bool | None = None,
    ) -> Dataset:
        """Make a dataset of features at hand, sending only what the cluster lacks.

        Args:
            features: Output of a stem, float16 or float32, or of ``Stem.pack``. A list of these for several backbones.
            labels: As in ``upload``.
            name: Of the dataset.
            space: Where the features live: ``stem.space``. A list for several backbones.
            codec: In which they travel, as in ``stem``. Default: as they are.
            local: As in ``upload``; of vectors at hand, ``trunkline.local_features``.
            local_inputs: What goes into local models, as in ``upload``; there are no images here.
            groups: As in ``upload``.
            timeout_s: As in ``upload``.
            progress: As in ``upload``.

        Shape:
            features: (N, ...), as in ``describe().cuts``.

        Raises:
            ShapeMismatchError, DtypeMismatchError, NotFiniteError, EmptyBatchError, BadLabelsError: Before anything
                is sent.
            IncompatibleModelError: They come from other weights.
            UnsupportedError: As in ``upload``.
        """
        pairs = paired(features, space)
        num_rows = len(pairs[0][0])
        if num_rows == 0:
            raise EmptyBatchError("there are no features", hint="Give at least one row")
        local_rows = bind_local(local, local_inputs, GivenImages(None))
        checked, groups_N = check_upload(name, labels, num_rows, groups=groups)
        self._check_codecs(local_rows)
        deadline = rows_deadline(timeout_s, num_rows)
        sources: list[RowSource] = [
            FeatureRows(self._backbones.features(one, where, codec, deadline)) for one, where in pairs
        ]
        sources += [one.source() for one in local_rows]
        upload = Upload(self._calls, self.info, name, checked, groups_N=groups_N)
        return upload.run(sources, deadline=deadline, progress=progress)

    def dataset(self, reference: str, *, timeout_s: float | None = None) -> Dataset:
        """Return a dataset: ``name`` (the newest version) or ``name@version``.

        Raises:
            NotFoundError: There is none of that name.
        """
        return Dataset(self._calls.datasets.get(reference, self._deadline(timeout_s)))

    def datasets(self, *, timeout_s: float | None = None) -> list[Dataset]:
        """Return every dataset."""
        return [Dataset(one) for one in self._calls.datasets.list(self._deadline(timeout_s))]

    def train(
        self,
        data: Dataset | str,
        *,
        name: str,
        backbone: str | Sequence[str] | None = None,
        input_size: int | None = None,
        embedding: str | Sequence[str] = "auto",
        head: str | Head = "linear",
        solver: str = "auto",
        loss: str | Loss = "auto",
        label_smoothing: float = 0.0,
        class_weights: ClassWeights | None = None,
        ordinal: bool | Sequence[str] = False,
        select_by: str = "",
        optimiser: Optimiser | None = None,
        epochs: int = 0,
        batch_size: int = 0,
        learning_rate: float = 0.0,
        l2: float | None = None,
        validation: float = 0.2,
        refit: bool = True,
        calibrate: bool = True,
        fine_tune: bool | FineTune = False,
        seed: int = 0,
        track: Tracker | Sequence[Tracker] | None = None,
        timeout_s: float | None = None,
    ) -> Job:
        """Train a head on a dataset. Returns at once; ``Job.result`` waits for the model.

        What is learned follows from the labels: one class a row, several, or numbers.

        Args:
            data: The dataset, or its ``name`` or ``name@version``.
            name: Of the model.
            backbone: For a dataset of images: who reads them. A list: several, whose embeddings stand side by side.
                Default: the cluster's first.
            input_size: For a dataset of images: side of the square they are brought to, in pixels, for every backbone.
            embedding: ``auto`` chooses slices by cross-validation, ``pooled`` is the last layer alone, a list names
                slices: ``SLICE`` of the first backbone, ``BACKBONE:SLICE`` of any.
            head: ``linear``, ``mlp``, ``conv`` or ``prototype``, or one such as
                ``trunkline.MLP(hidden=(256,), fuse="add")``.
            solver: ``lbfgs`` (linear heads on inputs side by side, to convergence), ``adamw``, or ``auto``.
            loss: What is minimised: ``cross_entropy`` or ``focal`` for classes; ``mse``, ``huber`` or ``quantile`` for
                numbers; or one such as ``trunkline.Loss("quantile", quantile=0.9)``.
            label_smoothing: Share of each row's label that is spread over all classes.
            class_weights: ``balanced`` has each class count the same in all; or how much the rows of each class count.
            ordinal: Whether the classes have an order, which is then learnt: theirs in the dataset, or this one, from
                the lowest to the highest.
            select_by: The metric by which strengths and epochs are chosen, such as ``balanced_accuracy``, ``roc_auc``
                or ``rmse``. Empty: the loss.
            optimiser: How ``adamw`` goes about it.
            epochs: Of ``adamw``. 0: the cluster's default.
            batch_size: Of ``adamw``. 0: the cluster's default.
            learning_rate: Of ``adamw``. 0: the cluster's default.
            l2: Strength of the L2 penalty on the standardised embedding (scikit-learn's 1 / C); for heads with layers
                of their own AdamW's weight decay. None: chosen by cross-validation, or by the cluster.
            validation: Fraction of the rows held out to measure the model. 0: none, and no score.
            refit: Whether to train once more on every row after measuring.
            calibrate: Whether to scale the outputs so that probabilities come true as often as they say, by the rows
                held out.
            fine_tune: Whether to train the last blocks of the backbone too, for this model alone, and keep them if that
                helps; or one such as ``trunkline.FineTune(lora_rank=8)``. ``Model.fine_tuning`` says what came of it.
            seed: Of everything random.
            track: Who records the job while ``Job.result`` waits for it: ``trunkline.track.TensorBoard``,
                ``trunkline.track.MLflow``, or a list of them.
            timeout_s: Deadline of submitting, not of the job.

        Raises:
            NotFoundError: There is no such dataset, backbone or slice.
            InvalidArgumentError: Something is out of range.
            UnsupportedError: The cluster is too old for such a head, loss, or for several backbones; or it does not
                fine-tune.
            MissingExtraError, TrackingError: A tracker's library is not installed, or it cannot be reached. Nothing is
                submitted then.
        """
        return self._submit(
            data,
            backbone,
            input_size,
            track,
            timeout_s,
            model=name,
            embedding=embedding,
            head=head,
            solver=solver,
            loss=loss,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            ordinal=ordinal,
            optimiser=optimiser,
            select_by=select_by,
            calibrate=calibrate,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            l2=l2,
            validation=validation,
            refit=refit,
            seed=seed,
            fine_tune=fine_tune_config(fine_tune),
        )

    def sweep(
        self,
        data: Dataset | str,
        *,
        name: str,
        l2: Sequence[float] = (),
        hidden: Sequence[Sequence[int]] = (),
        learning_rate: Sequence[float] = (),
        dropout: Sequence[float] = (),
        embeddings: Sequence[Sequence[str]] = (),
        folds: int = 5,
        backbone: str | Sequence[str] | None = None,
        input_size: int | None = None,
        embedding: str | Sequence[str] = "auto",
        head: str | Head = "linear",
        solver: str = "auto",
        loss: str | Loss = "auto",
        label_smoothing: float = 0.0,
        class_weights: ClassWeights | None = None,
        ordinal: bool | Sequence[str] = False,
        select_by: str = "",
        optimiser: Optimiser | None = None,
        epochs: int = 0,
        batch_size: int = 0,
        validation: float = 0.2,
        refit: bool = True,
        calibrate: bool = True,
        seed: int = 0,
        track: Tracker | Sequence[Tracker] | None = None,
        timeout_s: float | None = None,
    ) -> Job:
        """Try many heads by cross-validation, all at once, and train the winner. ``Model.trials`` has all of them.

        Every value is tried with every other, around the head and the settings given. The winner is the simplest
        configuration within one standard error of the best; it is trained as by ``train``, and measured on rows that
        took no part in the search. Where more than 16 configurations learn in steps, all are trained on one fold for a
        fifth of the epochs, and the best twelfth of them, at least 6, is cross-validated: the others are ``dropped``.

        Args:
            data: As in ``train``.
            name: Of the model.
            l2: Strengths of the penalty; with layers of their own AdamW's weight decay. None: a grid for linear heads,
                the cluster's default for others.
            hidden: Widths of hidden layers: ``[(), (64,), (256, 64)]`` tries a linear head and two MLPs. None: the
                head's own.
            learning_rate: Of heads that learn in steps. None: the cluster's default.
            dropout: Of heads with layers of their own. None: the head's own.
            embeddings: Sets of slices to try, for data of a single input. None: what ``embedding`` says.
            folds: Of the cross-validation.
            backbone: As in ``train``.
            input_size: As in ``train``.
            embedding: As in ``train``.
            head: What all configurations have in common, as in ``train``. Linear heads and MLPs are computed many at
                once; others, such as ``trunkline.Conv()``, each on its own, as many at a time as the cluster has room.
            solver: As in ``train``.
            loss: As in ``train``.
            label_smoothing: As in ``train``.
            class_weights: As in ``train``.
            ordinal: As in ``train``.
            select_by: The metric to win by. Empty: the cross-entropy, weighed as the classes are; where numbers are
                predicted r2, or what the loss measures.
            optimiser: As in ``train``. A moving average, or less than float32, has each configuration computed on its
                own.
            epochs: Of heads that learn in steps. 0: the cluster's default.
            batch_size: Of heads that learn in steps. 0: the cluster's default.
            validation: As in ``train``. The rows held out take no part in the search.
            refit: As in ``train``.
            calibrate: As in ``train``.
            seed: Of everything random.
            track: As in ``train``.
            timeout_s: Deadline of submitting, not of the job.

        Raises:
            NotFoundError: There is no such dataset, backbone or slice.
            InvalidArgumentError: Something is out of range, or there is nothing to try.
            UnsupportedError: The cluster is too old to search.
            MissingExtraError, TrackingError: As in ``train``.
        """
        return self._submit(
            data,
            backbone,
            input_size,
            track,
            timeout_s,
            model=name,
            embedding=embedding,
            head=head,
            solver=solver,
            loss=loss,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            ordinal=ordinal,
            optimiser=optimiser,
            select_by=select_by,
            calibrate=calibrate,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=0.0,
            l2=None,
            validation=validation,
            refit=refit,
            seed=seed,
            sweep=sweep_config(l2, hidden, learning_rate, dropout, embeddings, folds),
        )

    def _submit(
        self,
        data: Dataset | str,
        backbone: str | Sequence[str] | None,
        input_size: int | None,
        track: Tracker | Sequence[Tracker] | None,
        timeout_s: float | None,
        *,
        loss: str | Loss,
        label_smoothing: float,
        class_weights: ClassWeights | None,
        ordinal: bool | Sequence[str],
        optimiser: Optimiser | None,
        **asked: Any,
    ) -> Job:
        """Check what is asked for, against the dataset too where it is at hand, and queue it."""
        if isinstance(data, str) and needs_classes(class_weights, ordinal):
            data = self.dataset(data, timeout_s=timeout_s)
        if isinstance(data, Dataset) and input_size is None and not data.space.is_local:
            input_size = data.input_size
        spec = make_spec(
            dataset=data if isinstance(data, str) else data.reference,
            backbones=[backbone] if isinstance(backbone, str) else list(backbone or ()),
            input_size=input_size or 0,
            loss=loss_config(
                loss,
                label_smoothing=label_smoothing,
                class_weights=class_weights,
                ordinal=ordinal,
                class_names=data.class_names if isinstance(data, Dataset) else None,
            ),
            optimiser=optimiser_config(optimiser),
            **asked,
        )
        if isinstance(data, Dataset):
            check_spec_of(spec, data)
        opened = open_all(track)
        return Job(self, submit(self._calls.training, spec, self.info, self._deadline(timeout_s)), opened)

    def job(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """Return a job by its id.

        Raises:
            NotFoundError: There is none.
        """
        return Job(self, self._calls.training.get(job_id, self._deadline(timeout_s)))

    def jobs(self, *, timeout_s: float | None = None) -> list[Job]:
        """Return every job."""
        return [Job(self, one) for one in self._calls.training.list(self._deadline(timeout_s))]

    def model(self, reference: str, *, timeout_s: float | None = None) -> Model:
        """Return a model: ``name`` (the newest version) or ``name@version``.

        Raises:
            NotFoundError: There is none of that name.
        """
        return Model(self, self._calls.registry.get(reference, self._deadline(timeout_s)))

    def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """Return every model."""
        return [Model(self, one, is_whole=False) for one in self._calls.registry.list(self._deadline(timeout_s))]

    def extract(
        self,
        images: Any,
        *,
        stem: AnyStem | None = None,
        backbone: str | None = None,
        input_size: int | None = None,
        slices: Sequence[str] | None = None,
        batch_size: int | None = None,
        max_in_flight: int = DEFAULT_IN_FLIGHT,
        timeout_s: float | None = None,
        progress: bool | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return the embedding of images, to train elsewhere.

        Args:
            images: As in ``upload``.
            stem: Computes features here, which are sent instead of the images.
            backbone: Without a stem: who reads the images. Default: the cluster's first.
            input_size: Without a stem: side of the square they are brought to. Default: the backbone's own.
            slices: Which columns, in this order; ``describe().slices`` lists them. Default: all.
            batch_size: As in ``Model.predict``.
            max_in_flight: As in ``Model.predict``.
            timeout_s: As in ``Model.predict``.
            progress: As in ``Model.predict``.

        Shape:
            returns (N, D), float32.

        Raises:
            CorruptImageError: A picture cannot be decoded. Unlike predictions, an embedding has no hole.
        """
        from trunkline.images import pictures

        rows = pictures(images)
        deadline = rows_deadline(timeout_s, len(rows))
        deadline.check("extract")
        feed: Feed
        if stem is not None:
            feed = StemFeed(rows, stem)
        else:
            reader = FeatureSpace(backbone or self._backbones.first(deadline), INPUT_CUT, input_size or 0, "")
            feed = self._backbones.image_feed(rows, [reader], deadline)
        return self._extract(feed, slices, batch_size, max_in_flight, deadline, progress)

    def extract_features(
        self,
        features: Any,
        *,
        space: FeatureSpace,
        codec: str | None = None,
        slices: Sequence[str] | None = None,
        batch_size: int | None = None,
        max_in_flight: int = DEFAULT_IN_FLIGHT,
        timeout_s: float | None = None,
        progress: bool | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return the embedding of features at hand. Arguments as in ``extract`` and ``Model.predict_features``.

        Shape:
            features: (N, ...), as in ``describe().cuts``; returns (N, D), float32.
        """
        deadline = rows_deadline(timeout_s, len(features))
        feed = FeatureFeed(self._backbones.features(features, space, codec, deadline))
        return self._extract(feed, slices, batch_size, max_in_flight, deadline, progress)

    def predict_features(
        self,
        features: Any,
        *,
        model: str | Model,
        space: FeatureSpace | Sequence[FeatureSpace] | None = None,
        codec: str | None = None,
        local: Local | Sequence[Local] | None = None,
        local_inputs: Any = None,
        timeout_s: float | None = None,
    ) -> Prediction:
        """Predict features at hand. See ``Model.predict_features``."""
        chosen = model if isinstance(model, Model) else self.model(model, timeout_s=timeout_s)
        return chosen.predict_features(
            features, space=space, codec=codec, local=local, local_inputs=local_inputs, timeout_s=timeout_s
        )

    def __repr__(self) -> str:
        """Return address and version."""
        return f"Client({self.settings.address!r}, cluster version {self.info.version})"

    def _repr_html_(self) -> str:
        return _html.facts(
            "Trunkline client",
            [
                ("address", self.settings.address),
                ("encrypted", "yes" if self.settings.tls else "no"),
                ("tenant", self.info.tenant),
                ("cluster version", self.info.version),
                (
                    "settings from",
                    ", ".join(sorted({self.settings.sources["address"], self.settings.sources["token"]})),
                ),
            ],
        )

    def _deadline(self, timeout_s: float | None) -> Deadline:
        deadline = self._calls.caller.deadline(timeout_s)
        if deadline.remaining() == 0.0:
            raise DeadlineExceededError(f"timeout_s is {timeout_s:g}: the deadline is past before the call")
        return deadline

    def _check_codecs(self, local: Sequence[LocalInput]) -> None:
        """Check that the cluster reads what local features travel in."""
        for one in local:
            check_offered(check_codec(one.codec), self.info)

    def _extract(
        self,
        feed: Feed,
        slices: Sequence[str] | None,
        batch_size: int | None,
        max_in_flight: int,
        deadline: Deadline,
        progress: bool | None,
    ) -> npt.NDArray[np.float32]:
        calls, wanted = self._calls.inference, tuple(slices or ())
        with show_progress("Extracting", feed.num_rows, several(feed, batch_size, progress)) as bar:
            found = run(
                feed,
                batch_size=batch_size,
                max_in_flight=max_in_flight,
                one=lambda batch: calls.extract(feed.space, batch, wanted, deadline),
                many=lambda batches, window: calls.stream_extract(
                    feed.space, batches, wanted, window=window, deadline=deadline
                ),
                on_rows=bar.advance,
            )
        if found.errors:
            raise found.errors[min(found.errors)]
        return found.matrix_NX


def _sources(
    given: GivenImages, stems: Sequence[AnyStem], local_rows: Sequence[LocalInput], *, remote: bool
) -> list[RowSource]:
    """Return the inputs of a dataset, the first one first."""
    sources: list[RowSource] = [StemRows(given.pictures, one) for one in stems]
    if remote and not stems:
        sources.append(ImageRows(given.pictures))
    return [*sources, *(one.source() for one in local_rows)]


def _check_choice(stems: Sequence[AnyStem], local: object, remote: bool, input_size: int | None) -> None:
    """Check that what is to be uploaded makes sense together."""
    if not remote and (stems or input_size is not None):
        raise InvalidArgumentError(
            "remote=False sends local features alone: no backbone reads them", hint="Leave stem= and input_size= out"
        )
    if not remote and (local is None or (isinstance(local, (list, tuple)) and not local)):
        raise InvalidArgumentError("remote=False sends local features alone, and there are none", hint="Give local=")
    for one in stems:
        if input_size not in (None, one.space.input_size):
            raise InvalidArgumentError(
                f"input_size is {input_size}; the stem's is {one.space.input_size}", hint="Leave input_size= out"
            )
