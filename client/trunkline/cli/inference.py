"""``trunkline models``, ``predict``, ``evaluate`` and ``extract``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from trunkline_wire.heads import CLASSIFICATION, ORDINAL, REGRESSION

from trunkline.cli.data import Images
from trunkline.cli.options import (
    AugmentOption,
    Codec,
    InputSize,
    LocalFile,
    LocalInputSize,
    LocalName,
    MaxError,
    Precision,
    StemOption,
    Threads,
    Views,
    ViewSeed,
    find_augment,
    find_local,
    find_model_stem,
    find_stem,
)
from trunkline.cli.output import EXIT_FAILED, GateNotMetError, Session, columns, command, facts
from trunkline.errors import InvalidArgumentError

if TYPE_CHECKING:
    from trunkline.models import Model
    from trunkline.predictions import Prediction

SHOWN_CANDIDATES = 10
"""Most sets of slices that are listed of one model."""

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="NAME or NAME@VERSION.")]
Files = Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Pictures, folders of them, or CSV files.")]
SendImages = Annotated[bool, typer.Option("--send-images", help="Send images even if a stem could run here.")]
Outliers = Annotated[bool, typer.Option("--outliers", help="Say how unlike the training rows each picture is.")]
BatchSize = Annotated[int | None, typer.Option(help="Rows that travel together.", min=1)]


@command(missing="trunkline models")
def models(
    session: Session,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One model: NAME or NAME@VERSION.")] = None,
) -> None:
    """List the models, or describe one."""
    with session.connect() as client:
        if name is not None:
            one = client.model(name)
            text = _detail(one) + _trials(one) + _candidates(one)
            session.emit(one.to_dict(), text, hint=f"trunkline predict {one.reference} IMAGE ...")
            return
        found = client.models()
    rows = [
        (
            one.reference,
            one.task,
            _metrics(one),
            " + ".join(source.space.source for source in one.inputs),
            one.head.kind if one.head else "-",
            one.record.dataset,
        )
        for one in found
    ]
    table = columns(("MODEL", "TASK", "METRICS", "OF", "HEAD", "DATASET"), rows)
    session.emit([one.to_dict() for one in found], table, hint="trunkline predict MODEL IMAGE ...")


@command(missing="trunkline models")
def predict(
    session: Session,
    model: ModelName,
    images: Files,
    stem: StemOption = None,
    codec: Codec = None,
    precision: Precision = None,
    max_error: MaxError = None,
    threads: Threads = None,
    send_images: SendImages = False,
    local: LocalFile = None,
    local_name: LocalName = None,
    local_input_size: LocalInputSize = None,
    views: Views = 1,
    augment: AugmentOption = None,
    view_seed: ViewSeed = 0,
    outliers: Outliers = False,
    batch_size: BatchSize = None,
) -> None:
    """Predict pictures. Those that cannot be read fail alone; the exit code is 1 then."""
    paths = _paths(images)
    changes = find_augment(augment)
    local_model = find_local(local, local_name, local_input_size)
    with session.connect() as client:
        chosen = client.model(model)
        found_stem = find_model_stem(
            client,
            chosen,
            stem,
            send_images=send_images,
            codec=codec,
            precision=precision,
            max_error=max_error,
            threads=threads,
        )
        found = chosen.predict(
            paths,
            stem=found_stem,
            local=local_model,
            views=views,
            augment=changes,
            seed=view_seed,
            outliers=outliers,
            batch_size=batch_size,
        )
    data = found.to_dict()
    for row, path in zip(data["rows"], paths, strict=True):
        row["path"] = str(path)
    session.emit(data, _predictions(found, paths))
    if found.errors:
        for row, error in sorted(found.errors.items()):
            print(f"error: {paths[row]}: {error.message}", file=sys.stderr)
        print(f"next:  leave out the {len(found.errors)} of {len(paths)} pictures that failed", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED)


@command(missing="trunkline models")
def evaluate(
    session: Session,
    model: ModelName,
    images: Images,
    min_accuracy: Annotated[float | None, typer.Option(help="Exit with 3 below this accuracy.", min=0, max=1)] = None,
    min_r2: Annotated[float | None, typer.Option(help="Exit with 3 below this R2.", max=1)] = None,
    stem: StemOption = None,
    codec: Codec = None,
    precision: Precision = None,
    max_error: MaxError = None,
    threads: Threads = None,
    send_images: SendImages = False,
    local: LocalFile = None,
    local_name: LocalName = None,
    local_input_size: LocalInputSize = None,
    views: Views = 1,
    augment: AugmentOption = None,
    view_seed: ViewSeed = 0,
    batch_size: BatchSize = None,
) -> None:
    """Measure a model on labelled pictures."""
    changes = find_augment(augment)
    local_model = find_local(local, local_name, local_input_size)
    with session.connect() as client:
        chosen = client.model(model)
        if min_accuracy is not None and chosen.task not in (CLASSIFICATION, ORDINAL):
            raise InvalidArgumentError(
                f"--min-accuracy fits models that find one class in a row; {chosen.reference} is of task {chosen.task}"
            )
        if min_r2 is not None and chosen.task != REGRESSION:
            raise InvalidArgumentError(
                f"--min-r2 fits models that predict numbers; {chosen.reference} is of task {chosen.task}"
            )
        found_stem = find_model_stem(
            client,
            chosen,
            stem,
            send_images=send_images,
            codec=codec,
            precision=precision,
            max_error=max_error,
            threads=threads,
        )
        report = chosen.evaluate(
            images,
            stem=found_stem,
            local=local_model,
            views=views,
            augment=changes,
            seed=view_seed,
            batch_size=batch_size,
        )
    session.emit(report.to_dict(), report.summary())
    reached = getattr(report, "accuracy", None) if min_accuracy is not None else getattr(report, "r2", None)
    wanted = min_accuracy if min_accuracy is not None else min_r2
    if wanted is not None and reached is not None and reached < wanted:
        what = "accuracy" if min_accuracy is not None else "R2"
        raise GateNotMetError(f"{what} is {reached:.4f}; at least {wanted:g} was asked for")


@command(missing="trunkline backbones")
def extract(
    session: Session,
    images: Files,
    out: Annotated[Path, typer.Option("--out", help="File to write the embedding to, .npy.")],
    stem: StemOption = None,
    backbone: Annotated[str | None, typer.Option(help="Without a stem: who reads the images.")] = None,
    input_size: InputSize = None,
    codec: Codec = None,
    precision: Precision = None,
    max_error: MaxError = None,
    threads: Threads = None,
    slices: Annotated[list[str] | None, typer.Option("--slice", help="Only these slices; may be repeated.")] = None,
    batch_size: BatchSize = None,
) -> None:
    """Write the embedding of pictures to a file, to train elsewhere."""
    import numpy as np

    paths = _paths(images)
    with session.connect() as client:
        local = find_stem(
            client, stem, input_size, codec=codec, precision=precision, max_error=max_error, threads=threads
        )
        embedding = client.extract(
            paths, stem=local, backbone=backbone, input_size=input_size, slices=slices, batch_size=batch_size
        )
    try:
        np.save(out, embedding, allow_pickle=False)
    except OSError as error:
        raise InvalidArgumentError(f"{out} cannot be written: {error.strerror}") from None
    num_rows, width = embedding.shape
    session.emit(
        {"out": str(out), "num_rows": num_rows, "width": width, "paths": [str(one) for one in paths]},
        f"{out}: {num_rows} rows, {width} columns, float32",
    )


def _paths(images: list[Path]) -> list[Path]:
    """Return the pictures of files, folders and tables, in order."""
    from trunkline.images import picture_paths

    return [path for one in images for path in picture_paths(one)]


def _predictions(found: Prediction, paths: list[Path]) -> str:
    has_outliers = found.outlier_scores is not None
    rows: list[tuple[object, ...]] = []
    for path, one in zip(paths, found, strict=True):
        if one.error is not None:
            cells: tuple[object, ...] = (path, "-", "failed")
        else:
            cells = (path, one.text, f"{float(one.outputs_K.max()):.3f}" if found.class_names else "")
        if has_outliers:
            is_known = one.error is None
            cells += (f"{one.outlier_distance:.2f}", f"{one.outlier_score:.3f}") if is_known else ("", "")
        rows.append(cells)
    header = ("IMAGE", "LABEL" if found.class_names else "VALUES", "PROBABILITY")
    return columns((*header, "DISTANCE", "NEARER") if has_outliers else header, rows)


def _metrics(model: Model) -> str:
    from trunkline.scores import held_out_scores

    return ", ".join(f"{name} {model.metrics[name]:.3f}" for name in list(held_out_scores(model.metrics))[:2]) or "-"


def _detail(model: Model) -> str:
    from trunkline.scores import all_scores

    record = model.record
    return facts(
        [
            ("model", model.reference),
            ("task", model.task),
            ("classes", ", ".join(model.class_names)),
            ("outputs", None if model.class_names else record.num_outputs),
            *all_scores(record.metrics).items(),
            *(("warning", one) for one in model.warnings),
            *model.facts(),
            ("dataset", record.dataset),
            ("job", record.job_id),
            ("head sha256", record.head_sha256),
            ("created", record.create_time),
        ]
    )


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ..."


def _trials(model: Model) -> str:
    """Return the configurations that a sweep tried, the best first."""
    tried = sorted(model.trials, key=lambda one: (bool(one.error), one.dropped, -one.score))
    if not tried:
        return ""
    shown = tried[:SHOWN_CANDIDATES]
    rows = [
        (
            "*" if one.won else "dropped" if one.dropped else "",
            "failed" if one.error else f"{one.score:.4f}",
            f"{one.l2:.3g}",
            "-".join(map(str, one.hidden)) or "linear",
            f"{one.learning_rate:g}" if one.learning_rate else "",
            f"{one.dropout:g}" if one.dropout else "",
            _short(one.error) if one.error else ", ".join(one.slices),
        )
        for one in shown
    ]
    which = f"the best {len(shown)} of {len(tried)}" if len(tried) > len(shown) else f"all {len(tried)}"
    table = columns(("", "SCORE", "L2", "HIDDEN", "RATE", "DROPOUT", "SLICES"), rows)
    return f"\n\nconfigurations of the sweep, {which}; * won\n{table}"


def _candidates(model: Model) -> str:
    """Return the sets of slices that were tried, those with the best scores."""
    tried = model.candidates
    if not tried:
        return ""
    shown = tried[:SHOWN_CANDIDATES]
    rows = [
        (f"{one.score:.3f}", "-" if one.accuracy is None else f"{one.accuracy:.4f}", one.width, ", ".join(one.slices))
        for one in shown
    ]
    which = f"the best {len(shown)} of {len(tried)}" if len(tried) > len(shown) else f"all {len(tried)}"
    table = columns(("SCORE", "ACCURACY", "COLUMNS", "SLICES"), rows)
    return f"\n\nsets of slices tried in cross-validation, {which}\n{table}"
