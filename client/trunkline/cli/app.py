"""The root of the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from trunkline.cli import bench, catalogue, data, doctor_command, inference, jobs, report, tuning
from trunkline.cli.plugins import PluginGroup

app = typer.Typer(
    cls=PluginGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Use a heavy pretrained model from a light client.",
    epilog="Start with `trunkline up`, then `trunkline backbones`. If something is the matter: `trunkline doctor`.",
)

app.command("backbones")(catalogue.backbones)
app.command("tune")(tuning.tune)
app.command("upload")(data.upload)
app.command("datasets")(data.datasets)
app.command("train")(jobs.train)
app.command("sweep")(jobs.sweep)
app.command("jobs")(jobs.jobs)
app.command("models")(inference.models)
app.command("predict")(inference.predict)
app.command("evaluate")(inference.evaluate)
app.command("extract")(inference.extract)
app.command("report")(report.report)
app.command("doctor")(doctor_command.doctor)
app.add_typer(bench.app, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        import trunkline

        typer.echo(f"trunkline {trunkline.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Use a heavy pretrained model from a light client."""
