"""``trunkline backbones``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trunkline.cli.cuts import show
from trunkline.cli.output import Session, columns, command
from trunkline.errors import InvalidArgumentError

if TYPE_CHECKING:
    from trunkline_wire.specs import BackboneSpec

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[show] [NAME]", help="One backbone in detail: its cuts, and what each of them costs."),
]
Images = Annotated[
    Path | None, typer.Option(help="Pictures of yours, whose size as JPEG files is compared.", metavar="FOLDER")
]


@command(missing="trunkline backbones")
def backbones(
    session: Session,
    words: Words = None,
    input_size: Annotated[int, typer.Option(help="At this input size, in pixels. 0: its own.", min=0)] = 0,
    every: Annotated[bool, typer.Option("--all", help="Every cut, not just the ends of the stages.")] = False,
    cut: Annotated[
        list[str] | None, typer.Option(help="Just this cut, its errors and zstd measured; may be repeated.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure every cut shown; takes seconds each.")] = False,
    images: Images = None,
    max_error: Annotated[
        float | None, typer.Option(help="Embedding error up to which a codec counts. Left out: 0.05.", min=0)
    ] = None,
) -> None:
    """List the backbones, or show one: its cuts, the bytes of each codec there, and where a JPEG needs fewer."""
    name = _name(words or [])
    if name is None and (every or cut or measure or images or input_size or max_error is not None):
        raise InvalidArgumentError("these options are about one backbone", hint="trunkline backbones show NAME ...")
    if cut and every:
        raise InvalidArgumentError("--cut shows just that cut, --all every one", hint="Leave one of them out")
    with session.connect() as client:
        if name is not None:
            data, text, following = show(
                client,
                name,
                input_size or None,
                every=every,
                cuts=cut or (),
                measure=measure,
                images=images,
                max_error=max_error,
            )
            session.emit(data, text, hint=following)
            return
        found = client.backbones()
    header = ("NAME", "INPUT", "PARAMETERS", "CUTS", "STAGES", "RUNTIME", "ROWS/S", "DEVICE")
    table = columns(header, [_line(one) for one in found], right=(1, 2, 3, 6))
    session.emit([asdict(one) for one in found], table, hint="trunkline backbones show NAME")


def _name(words: list[str]) -> str | None:
    """Return the backbone that ``NAME`` or ``show NAME`` names; None for no word at all."""
    if not words:
        return None
    if len(words) == 2 and words[0] == "show":
        return words[1]
    if len(words) > 1 or words == ["show"]:
        raise InvalidArgumentError(f"{' '.join(words)!r} names no backbone", hint="trunkline backbones show NAME")
    return words[0]


def _line(spec: BackboneSpec) -> tuple[object, ...]:
    stages = ", ".join(one.name for one in spec.cuts if one.is_stage)
    size = spec.preprocessing.input_size
    speed = f"{spec.rows_per_s:.0f}" if spec.rows_per_s else "-"
    parameters = f"{spec.num_parameters:,}"
    return (spec.name, size, parameters, len(spec.cuts), stages or "-", spec.runtime, speed, spec.device)
