"""``trunkline backbones``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from trunkline.cli.output import Session, columns, command, facts

if TYPE_CHECKING:
    from trunkline_wire.specs import BackboneSpec


@command(missing="trunkline backbones")
def backbones(
    session: Session,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One backbone, in detail.")] = None,
    input_size: Annotated[int, typer.Option(help="At this input size, in pixels. 0: its own.", min=0)] = 0,
) -> None:
    """List the backbones, or describe one: its cuts, slices and runtime."""
    with session.connect() as client:
        if name is not None:
            spec = client.describe(name, input_size=input_size or None)
            cut = next((one.name for one in spec.cuts if one.name != "input"), "CUT")
            session.emit(asdict(spec), _detail(spec), hint=f"trunkline upload NAME FOLDER --stem {spec.name}:{cut}")
            return
        found = client.backbones()
    rows = [
        (one.name, one.preprocessing.input_size, ", ".join(cut.name for cut in one.cuts), one.runtime, one.device)
        for one in found
    ]
    table = columns(("NAME", "INPUT", "CUTS", "RUNTIME", "DEVICE"), rows)
    session.emit([asdict(one) for one in found], table, hint="trunkline backbones NAME")


def _detail(spec: BackboneSpec) -> str:
    pre = spec.preprocessing
    head = facts(
        [
            ("name", spec.name),
            ("weights", spec.weights if spec.pretrained else f"{spec.weights} (NOT pretrained)"),
            ("parameters", f"{spec.num_parameters:,}"),
            ("input", f"{pre.input_size} px, {pre.interpolation}, crop {pre.crop_fraction:g}"),
            ("resizable", "yes" if spec.resizable else "no"),
            ("runtime", f"{spec.runtime} on {spec.device}, relative error {spec.runtime_error:.2g}"),
        ]
    )
    cuts = columns(
        ("CUT", "FEATURES", "FINGERPRINT"),
        [(cut.name, "x".join(map(str, cut.feature_shape)), cut.fingerprint[:16]) for cut in spec.cuts],
    )
    slices = columns(("SLICE", "WIDTH"), [(one.name, one.width) for one in spec.slices])
    return f"{head}\n\n{cuts}\n\n{slices}"
