"""Options of the commands that can record a job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from trunkline.track import Tracker

_PANEL = "Recording it"

TensorBoardFolder = Annotated[
    str | None, typer.Option("--tensorboard", metavar="DIR", help="Write event files there.", rich_help_panel=_PANEL)
]
MLflowAddress = Annotated[
    str | None,
    typer.Option("--mlflow", metavar="URI", help="Make a run on this tracking server.", rich_help_panel=_PANEL),
]
MLflowExperiment = Annotated[
    str, typer.Option("--mlflow-experiment", metavar="NAME", help="Of the run.", rich_help_panel=_PANEL)
]


def trackers(
    tensorboard: str | None, mlflow: str | None, experiment: str, *, wait: bool, hint: str = "Leave --no-wait out"
) -> list[Tracker]:
    """Return who records a job.

    Raises:
        InvalidArgumentError: Nobody would wait for the job, so nobody would record it.
    """
    from trunkline.errors import InvalidArgumentError
    from trunkline.track import MLflow, TensorBoard

    found: list[Tracker] = [] if tensorboard is None else [TensorBoard(tensorboard)]
    if mlflow is not None:
        found.append(MLflow(mlflow, experiment=experiment))
    if found and not wait:
        raise InvalidArgumentError("--tensorboard and --mlflow record a job while it is waited for", hint=hint)
    return found
