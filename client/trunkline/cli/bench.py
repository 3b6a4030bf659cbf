"""``trunkline bench``: how fast things run on this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trunkline.cli.options import split_stem
from trunkline.cli.output import Session, columns, command
from trunkline.errors import InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from trunkline._bench import StemSpeed

app = typer.Typer(no_args_is_help=True, help="Measure how fast things run on this machine.")


@app.callback()
def bench() -> None:
    """Measure how fast things run on this machine."""


@app.command("stem")
@command(missing="trunkline backbones", name="bench stem")
def stem(
    session: Session,
    which: Annotated[str, typer.Argument(metavar="BACKBONE:CUT", help="Where the stem ends.")],
    input_size: Annotated[int | None, typer.Option(help="Side of the square, in pixels.", min=1)] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="float32 or int8; may be repeated. Left out: both.")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(help="Threads; may be repeated. 0: ONNX Runtime's choice. Left out: 1.", min=0)
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Pictures to run on. Left out: generated ones.", metavar="FOLDER")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long each rate is measured.", min=0.1, max=600.0)] = 3.0,
) -> None:
    """Fetch the stems before a cut and measure them: size, time to load, pictures a second, bytes a picture."""
    from trunkline._bench import generated_pictures, measure_codecs, measure_speed
    from trunkline._jpeg import spread
    from trunkline.images import pictures
    from trunkline.stems import RUN_ROWS

    backbone, cut = split_stem(which)
    rows = spread(pictures(images), RUN_ROWS) if images else generated_pictures(RUN_ROWS)
    speeds: list[StemSpeed] = []
    refused: dict[str, str] = {}
    sizes: dict[str, dict[str, float | None]] = {}
    with session.connect() as client:
        spec = client.describe(backbone, input_size=input_size)
        for one in dict.fromkeys(precision or ("float32", "int8")):
            try:
                for count in dict.fromkeys(threads or (1,)):
                    made = client.stem(
                        backbone, cut=cut, input_size=input_size, precision=one, codec="float32", threads=count or None
                    )
                    speeds.append(measure_speed(made, rows, seconds))
                    if one not in sizes:
                        sizes[one] = measure_codecs(made, rows)
            except UnsupportedError as error:
                refused[one] = error.message
    if not speeds:
        raise InvalidArgumentError("; ".join(refused.values()), hint="Leave --precision out, or name another cut")
    data = {
        "backbone": spec.name,
        "cut": cut,
        "input_size": spec.preprocessing.input_size,
        "pictures": _source(images, len(rows)),
        "runs": [asdict(one) for one in speeds],
        "refused": refused,
        "bytes_per_row": sizes,
    }
    session.emit(data, _text(data, speeds), hint=f"trunkline backbones show {spec.name} --cut {cut}")


def _source(images: Path | None, number: int) -> str:
    return f"{number} generated pictures" if images is None else f"{number} pictures of {images}"


def _text(data: dict[str, Any], speeds: list[StemSpeed]) -> str:
    head = f"{data['backbone']} up to {data['cut']} at {data['input_size']} px, on {data['pictures']}"
    rows = speeds[0].rows_per_batch
    header = ("STEM", "THREADS", "MB", "ERROR", "LOAD MS", f"FIRST {rows} MS", "PICTURES/S", "WITH DECODING/S")
    lines = [
        (
            one.precision,
            one.threads or "auto",
            f"{one.size_bytes / 1e6:.2f}",
            "-" if one.stem_error is None else f"{one.stem_error:.2g}",
            f"{1e3 * one.load_s:,.1f}",
            f"{1e3 * one.first_s:,.1f}",
            f"{one.images_per_s:,.1f}",
            f"{one.decoded_images_per_s:,.1f}",
        )
        for one in speeds
    ]
    parts = [f"{head}\n\n{columns(header, lines, right=range(1, 8))}"]
    parts += [f"no {name} stem: {reason}" for name, reason in data["refused"].items()]
    parts.append(_sizes_text(data["bytes_per_row"]))
    return "\n\n".join(parts)


def _sizes_text(sizes: dict[str, dict[str, float | None]]) -> str:
    """Return the bytes of features in each codec, a column for each stem."""
    header = ("KB A PICTURE", *(f"{name.upper()} STEM" for name in sizes))
    codecs = next(iter(sizes.values()))
    lines = [(codec, *(_kb(one[codec]) for one in sizes.values())) for codec in codecs]
    return columns(header, lines, right=range(1, len(header)))


def _kb(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e3:,.2f}"
