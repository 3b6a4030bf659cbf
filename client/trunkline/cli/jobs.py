"""``trunkline train`` and ``trunkline jobs``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from trunkline.cli.output import Session, columns, command, facts

if TYPE_CHECKING:
    from trunkline.models import Model
    from trunkline.records import JobStatus


@command(missing="trunkline datasets")
def train(
    session: Session,
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="NAME or NAME@VERSION.")],
    name: Annotated[str, typer.Option("--name", help="Name of the model.")],
    backbone: Annotated[str | None, typer.Option(help="For images: who reads them.")] = None,
    input_size: Annotated[int | None, typer.Option(help="For images: side of the square, in pixels.", min=1)] = None,
    embedding: Annotated[str, typer.Option(help="auto or pooled.")] = "auto",
    slices: Annotated[list[str] | None, typer.Option("--slice", help="Use these slices; may be repeated.")] = None,
    head: Annotated[str, typer.Option(help="linear or mlp.")] = "linear",
    hidden: Annotated[list[int] | None, typer.Option(help="Width of a hidden layer; may be repeated.")] = None,
    dropout: Annotated[float, typer.Option(help="Of an MLP.")] = 0.0,
    solver: Annotated[str, typer.Option(help="auto, lbfgs or adam.")] = "auto",
    epochs: Annotated[int, typer.Option(help="Of adam. 0: the default.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Of adam. 0: the default.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Of adam. 0: the default.")] = 0.0,
    l2: Annotated[float | None, typer.Option(help="L2 penalty. Left out: chosen by cross-validation.")] = None,
    validation: Annotated[float, typer.Option(help="Fraction held out to measure.")] = 0.2,
    refit: Annotated[bool, typer.Option(help="Train once more on every row after measuring.")] = True,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    wait: Annotated[bool, typer.Option(help="Wait for the model.")] = True,
) -> None:
    """Train a head on a dataset."""
    from trunkline.records import MLP
    from trunkline.training import job_to_dict

    chosen: str | MLP = head
    if head == "mlp" and (hidden or dropout):
        chosen = MLP(tuple(hidden or (1024,)), dropout)
    with session.connect() as client:
        job = client.train(
            dataset,
            name=name,
            backbone=backbone,
            input_size=input_size,
            embedding=slices or embedding,
            head=chosen,
            solver=solver,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            l2=l2,
            validation=validation,
            refit=refit,
            seed=seed,
        )
        if not wait:
            session.emit(job_to_dict(job.status()), job.id, hint=f"trunkline jobs {job.id} --wait")
            return
        print(f"job {job.id}", file=sys.stderr)
        model = job.result()
    data = {"job": job.id, "model": model.to_dict()}
    session.emit(data, _trained(model), hint=f"trunkline predict {model.reference} IMAGE ...")


@command(missing="trunkline jobs")
def jobs(
    session: Session,
    job_id: Annotated[str | None, typer.Argument(metavar="ID", help="One job, in detail.")] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="End it.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its model.")] = False,
    events: Annotated[bool, typer.Option("--events", help="Show what happened and what happens, to its end.")] = False,
) -> None:
    """List the jobs, or show, follow or end one."""
    from trunkline.errors import InvalidArgumentError
    from trunkline.training import event_to_dict, job_to_dict

    if job_id is None and (cancel or wait or events):
        raise InvalidArgumentError("--cancel, --wait and --events need the id of a job", hint="`trunkline jobs` has it")
    with session.connect() as client:
        if job_id is None:
            statuses = [job._last for job in client.jobs()]
            rows = [(one.id, one.state.name, one.model or one.spec.model, one.spec.dataset) for one in statuses]
            table = columns(("JOB", "STATE", "MODEL", "DATASET"), rows)
            session.emit([job_to_dict(one) for one in statuses], table, hint="trunkline jobs ID")
            return
        job = client.job(job_id)
        if cancel:
            job.cancel()
        if events:
            for event in job.events():
                note = " ".join([event.message, *(f"{k}={v:.4g}" for k, v in sorted(event.metrics.items()))])
                text = f"{event.seq:>4}  {event.phase:<8} {event.progress:>4.0%}  {note}".rstrip()
                session.emit(event_to_dict(event), text)
            return
        if wait:
            model = job.result()
            session.emit({"job": job.id, "model": model.to_dict()}, _trained(model))
            return
        status = job.status()
        session.emit(job_to_dict(status), _detail(status), hint=_following(status))


def _trained(model: Model) -> str:
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in sorted(model.metrics.items()))
    slices = ", ".join(model.slices)
    return f"{model.reference}: {metrics or 'not measured'}" + (f"\nslices: {slices}" if slices else "")


def _detail(status: JobStatus) -> str:
    return facts(
        [
            ("job", status.id),
            ("state", status.state.name),
            ("model", status.model or status.spec.model),
            ("dataset", status.spec.dataset),
            ("embedding", ", ".join(status.spec.slices) or status.spec.embedding),
            ("restarts", status.num_restarts or None),
            ("error", status.error.message if status.error else None),
            ("created", status.create_time),
            ("started", status.start_time),
            ("ended", status.end_time),
        ]
    )


def _following(status: JobStatus) -> str:
    if status.model:
        return f"trunkline predict {status.model} IMAGE ..."
    if status.state.has_ended:
        return f"trunkline train {status.spec.dataset} --name {status.spec.model}"
    return f"trunkline jobs {status.id} --wait"
