"""``trunkline upload`` and ``trunkline datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trunkline.cli.options import Codec, InputSize, MaxError, Precision, StemOption, Threads, find_stem
from trunkline.cli.output import Session, columns, command, facts

if TYPE_CHECKING:
    from trunkline.datasets import Dataset

Images = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Folder of class folders, or a CSV file with columns path and label.")
]


@command(missing="trunkline backbones")
def upload(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the dataset.")],
    images: Images,
    stem: StemOption = None,
    input_size: InputSize = None,
    codec: Codec = None,
    precision: Precision = None,
    max_error: MaxError = None,
    threads: Threads = None,
) -> None:
    """Make a dataset of labelled images. Sends only what the cluster lacks; run it again after a failure."""
    with session.connect() as client:
        local = find_stem(
            client, stem, input_size, codec=codec, precision=precision, max_error=max_error, threads=threads
        )
        data = client.upload(images, name=name, stem=local, input_size=input_size)
    report = data.report
    assert report is not None
    as_codec = f" as {data.codec}" if data.codec else ""
    text = (
        f"{data.reference}: {data.num_rows} rows, {report.rows_sent} sent{as_codec} "
        f"({report.feature_bytes_sent / 1e6:.1f} MB) in {report.seconds:.1f} s"
    )
    size = f" --input-size {input_size}" if input_size and local is None else ""
    session.emit(data.to_dict(), text, hint=f"trunkline train {data.reference} --name {name}-head{size}")


@command(missing="trunkline datasets")
def datasets(
    session: Session,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One dataset: NAME or NAME@VERSION.")] = None,
) -> None:
    """List the datasets, or describe one."""
    with session.connect() as client:
        if name is not None:
            one = client.dataset(name)
            session.emit(one.to_dict(), _detail(one), hint=f"trunkline train {one.reference} --name MODEL")
            return
        found = client.datasets()
    rows = [
        (
            one.reference,
            one.num_rows,
            _labels(one),
            one.space.cut,
            one.codec or "-",
            one.space.backbone or "-",
            one.digest[:12],
        )
        for one in found
    ]
    table = columns(("DATASET", "ROWS", "LABELS", "CUT", "CODEC", "BACKBONE", "DIGEST"), rows)
    session.emit([one.to_dict() for one in found], table, hint="trunkline train DATASET --name MODEL")


def _labels(data: Dataset) -> str:
    return f"{len(data.class_names)} classes" if data.class_names else f"{data.record.num_targets} numbers"


def _detail(data: Dataset) -> str:
    return facts(
        [
            ("dataset", data.reference),
            ("rows", data.num_rows),
            ("labels", _labels(data)),
            ("classes", ", ".join(data.class_names)),
            ("cut", data.space.cut),
            ("codec", data.codec),
            ("backbone", data.space.backbone),
            ("input size", data.space.input_size or None),
            ("digest", data.digest),
            ("created", data.create_time),
        ]
    )
