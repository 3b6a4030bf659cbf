"""``trunkline upload`` and ``trunkline datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
    groups_column: Annotated[
        str | None,
        typer.Option(help="Column of the CSV file whose equal values belong together: no training splits them."),
    ] = None,
    views: Views = 1,
    augment: AugmentOption = None,
    view_seed: ViewSeed = 0,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say what would be sent at most, and send nothing.")
    ] = False,
) -> None:
    """Make a dataset of labelled images. Sends only what the cluster lacks; run it again after a failure."""
    changes = find_augment(augment)
    local_model = find_local(local, local_name, local_input_size)
    with session.connect() as client:
        found = find_stem(
            client, stem, input_size, codec=codec, precision=precision, max_error=max_error, threads=threads
        )
        if estimate:
            said = client.estimate_upload(
                images, stem=found, local=local_model, remote=remote, views=views, augment=changes, seed=view_seed
            )
            session.emit({**vars(said), "num_rows": said.num_rows}, str(said))
            return
        data = client.upload(
            images,
            name=name,
            stem=found,
            local=local_model,
            remote=remote,
            input_size=input_size,
            groups=groups_column,
            views=views,
            augment=changes,
            seed=view_seed,
        )
    report = data.report
    assert report is not None
    codecs = dict.fromkeys(one.codec for one in data.inputs if one.codec)
    as_codec = f" as {' and '.join(codecs)}" if codecs else ""
    of_views = f" ({data.views} views of each picture)" if data.views > 1 else ""
    text = (
        f"{data.reference}: {data.num_rows} rows{of_views}, {report.rows_sent} sent{as_codec} "
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
    from trunkline.datasets import describe_source, rows_summary

    return facts(
        [
            ("dataset", data.reference),
            ("rows", rows_summary(data)),
            ("labels", data.labels_summary),
            ("classes", ", ".join(data.class_names)),
            *(("and" if number else "input", describe_source(one)) for number, one in enumerate(data.inputs)),
            ("digest", data.digest),
            ("created", data.create_time),
        ]
    )
