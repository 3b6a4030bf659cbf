"""``trunkline report``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from trunkline.cli.output import Session, command


@command(missing="trunkline models")
def report(
    session: Session,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="NAME or NAME@VERSION.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="File to write. Left out: NAME-VERSION.html.", metavar="FILE.html")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="What was uploaded, so that pictures are shown.", metavar="PATH")
    ] = None,
    card: Annotated[Path | None, typer.Option("--card", help="Write a model card as well.", metavar="FILE.md")] = None,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
) -> None:
    """Write a report on a model: one HTML file that needs nothing else."""
    with session.connect() as client:
        chosen = client.model(model)
        path = chosen.report(output, images=images)
        if card is not None:
            chosen.card(card)
    paths = [path] if card is None else [path, card]
    data = {"model": chosen.reference, "report": str(path), "card": None if card is None else str(card)}
    session.emit(data, "\n".join(map(str, paths)))
    if show and sys.stdout.isatty() and not session.json_output:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
