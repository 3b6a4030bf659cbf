"""``trunkline upload`` and ``trunkline datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trunkline.cli.options import (
    Codec,
    InputSize,
    LocalFile,
    LocalInputSize,
    LocalName,
    MaxError,
    Precision,
    StemOption,
    Threads,
    find_local,
    find_stem,
)
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
    local: LocalFile = None,
    local_name: LocalName = None,
    local_input_size: LocalInputSize = None,
    remote: Annotated[
        bool, typer.Option("--remote/--no-remote", help="Send images or features of a stem, not local features alone.")
    ] = True,
) -> None:
    """Make a dataset of labelled images. Sends only what the cluster lacks; run it again after a failure."""
    local_model = find_local(local, local_name, local_input_size)
    with session.connect() as client:
        found = find_stem(
            client, stem, input_size, codec=codec, precision=precision, max_error=max_error, threads=threads
        )
        data = client.upload(images, name=name, stem=found, local=local_model, remote=remote, input_size=input_size)
    report = data.report
    assert report is not None
    codecs = dict.fromkeys(one.codec for one in data.inputs if one.codec)
    as_codec = f" as {' and '.join(codecs)}" if codecs else ""
    text = (
        f"{data.reference}: {data.num_rows} rows, {report.rows_sent} sent{as_codec} "
        f"({report.feature_bytes_sent / 1e6:.1f} MB) in {report.seconds:.1f} s"
    )
    size = f" --input-size {input_size}" if input_size and found is None else ""
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
            one.labels_summary,
            one.space.cut or "-",
            " + ".join(source.codec for source in one.inputs if source.codec) or "-",
            " + ".join(source.space.source or "images" for source in one.inputs),
            one.digest[:12],
        )
        for one in found
    ]
    table = columns(("DATASET", "ROWS", "LABELS", "CUT", "CODEC", "OF", "DIGEST"), rows)
    session.emit([one.to_dict() for one in found], table, hint="trunkline train DATASET --name MODEL")


def _detail(data: Dataset) -> str:
    from trunkline.datasets import describe_source

    return facts(
        [
            ("dataset", data.reference),
            ("rows", data.num_rows),
            ("labels", data.labels_summary),
            ("classes", ", ".join(data.class_names)),
            *(("and" if number else "input", describe_source(one)) for number, one in enumerate(data.inputs)),
            ("digest", data.digest),
            ("created", data.create_time),
        ]
    )
