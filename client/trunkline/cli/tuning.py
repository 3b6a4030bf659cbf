"""``trunkline tune``: what the cluster measured of the runtimes of a backbone."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trunkline.cli.output import Session, columns, command, facts

if TYPE_CHECKING:
    from trunkline_wire.specs import RuntimeResult, Tuning

CHOSEN = "*"
"""Stands before the runtime in use."""


@command(missing="trunkline backbones")
def tune(
    session: Session,
    name: Annotated[str | None, typer.Argument(help="The backbone. Left out: the cluster's first.")] = None,
    cut: Annotated[str, typer.Option(help="Where rows enter.")] = "input",
    input_size: Annotated[int, typer.Option(help="At this input size, in pixels. 0: its own.", min=0)] = 0,
    again: Annotated[
        bool, typer.Option("--again", help="Measure anew, compiled runtimes too: minutes, in which rows wait longer.")
    ] = False,
) -> None:
    """Show how fast and how exact each runtime of a backbone is on the cluster, and which one is used."""
    with session.connect() as client:
        found = client.tune(name, cut=cut, input_size=input_size or None, again=again)
    following = "" if again else f"trunkline tune {found.backbone} --cut {found.cut} --again"
    session.emit(_plain(found), _text(found), hint=following)


def _plain(tuning: Tuning) -> dict[str, Any]:
    """Return plain values for JSON, which has no infinite numbers."""
    runtimes = [{**asdict(one), "error": one.error if math.isfinite(one.error) else None} for one in tuning.runtimes]
    return {**asdict(tuning), "runtimes": runtimes, "libraries": dict(tuning.libraries)}


def _text(tuning: Tuning) -> str:
    sizes = sorted({speed.batch_rows for one in tuning.runtimes for speed in one.speeds})
    header = ("", "RUNTIME", "ERROR", *(f"ROWS/S AT {size}" for size in sizes), "LOAD S", "REFUSED")
    rows = [_line(one, sizes, tuning.chosen) for one in tuning.runtimes]
    table = columns(header, rows, right=range(2, 4 + len(sizes)))
    why = "the operator fixed it" if tuning.fixed else "the fastest within the error bound"
    about = facts(
        [
            ("backbone", f"{tuning.backbone}, cut {tuning.cut}, {tuning.input_size} px"),
            ("device", f"{tuning.device}, {tuning.num_threads} CPU threads"),
            ("in use", f"{tuning.chosen} in batches of {tuning.batch_rows}: {why}"),
            ("libraries", ", ".join(f"{name} {version}" for name, version in tuning.libraries)),
        ]
    )
    return f"{about}\n\n{table}"


def _line(result: RuntimeResult, sizes: list[int], chosen: str) -> tuple[str, ...]:
    speeds = {one.batch_rows: one.rows_per_s for one in result.speeds}
    known = bool(result.speeds) or result.error > 0
    return (
        CHOSEN if result.runtime == chosen else "",
        result.runtime,
        f"{result.error:.1e}" if known else "-",
        *(f"{speeds[size]:.1f}" if size in speeds else "-" for size in sizes),
        f"{result.load_s:.1f}" if result.load_s else "-",
        result.refused,
    )
