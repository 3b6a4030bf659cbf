"""``trunkline upload`` and ``trunkline datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trunkline.cli.output import Session, columns, command, facts
from trunkline.errors import InvalidArgumentError

if TYPE_CHECKING:
    from trunkline.client import Client
    from trunkline.datasets import Dataset
    from trunkline.stems import Stem

StemOption = Annotated[
    str | None,
    typer.Option("--stem", help="BACKBONE:CUT. Send features computed here instead of images.", metavar="BACKBONE:CUT"),
]
InputSize = Annotated[int | None, typer.Option(help="Side of the square images are brought to, in pixels.", min=1)]
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
    float32: Annotated[bool, typer.Option("--float32", help="Send features as float32 instead of float16.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads of the stem.", min=1)] = None,
) -> None:
    """Make a dataset of labelled images. Sends only what the cluster lacks; run it again after a failure."""
    with session.connect() as client:
        local = find_stem(client, stem, input_size, float32=float32, threads=threads)
        data = client.upload(images, name=name, stem=local, input_size=input_size)
    report = data.report
    assert report is not None
    text = (
        f"{data.reference}: {data.num_rows} rows, {report.rows_sent} sent "
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
        (one.reference, one.num_rows, _labels(one), one.space.cut, one.space.backbone or "-", one.digest[:12])
        for one in found
    ]
    table = columns(("DATASET", "ROWS", "LABELS", "CUT", "BACKBONE", "DIGEST"), rows)
    session.emit([one.to_dict() for one in found], table, hint="trunkline train DATASET --name MODEL")


def find_stem(
    client: Client, text: str | None, input_size: int | None, *, float32: bool = False, threads: int | None = None
) -> Stem | None:
    """Return the stem that ``BACKBONE:CUT`` names, or None."""
    if text is None:
        return None
    backbone, colon, cut = text.partition(":")
    if not backbone or not colon or not cut:
        raise InvalidArgumentError(f"--stem is {text!r}; expected BACKBONE:CUT", hint="`trunkline backbones` has both")
    dtype = "float32" if float32 else "float16"
    return client.stem(backbone, cut=cut, input_size=input_size, dtype=dtype, threads=threads)


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
            ("backbone", data.space.backbone),
            ("input size", data.space.input_size or None),
            ("digest", data.digest),
            ("created", data.create_time),
        ]
    )
