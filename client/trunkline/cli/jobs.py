"""``trunkline train`` and ``trunkline jobs``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trunkline.cli.output import Session, columns, command, facts
from trunkline.cli.tracking import MLflowAddress, MLflowExperiment, TensorBoardFolder, trackers

if TYPE_CHECKING:
    from trunkline.fine_tuning import FineTune
    from trunkline.heads import Head
    from trunkline.models import Model
    from trunkline.records import JobStatus
    from trunkline.training import Job


_HEAD = "Head"
_LOSS = "What is minimised"
_ADAMW = "How AdamW goes about it"
_TUNE = "Fine-tuning"

Activation = Annotated[str | None, typer.Option(help="Of hidden layers: relu or gelu.", rich_help_panel=_HEAD)]
BatchNorm = Annotated[
    bool, typer.Option("--batch-norm", help="Normalise batches before each activation.", rich_help_panel=_HEAD)
]
Channels = Annotated[list[int] | None, typer.Option(help="Of a convolution; may be repeated.", rich_help_panel=_HEAD)]
Tap = Annotated[str | None, typer.Option(help="Cut whose features convolutions read.", rich_help_panel=_HEAD)]
Fuse = Annotated[str | None, typer.Option(help="Of several inputs: concat, add or gate.", rich_help_panel=_HEAD)]
SolverName = Annotated[str, typer.Option(help="auto, lbfgs or adamw.")]
LossName = Annotated[str, typer.Option(help="cross_entropy or focal for classes; mse, huber or quantile for numbers.")]
Quantile = Annotated[float, typer.Option(help="Which one quantile predicts.", rich_help_panel=_LOSS)]
LabelSmoothing = Annotated[
    float, typer.Option(help="Share of each label that is spread over all classes.", rich_help_panel=_LOSS)
]
Balanced = Annotated[
    bool, typer.Option("--balanced", help="Have each class count the same in all.", rich_help_panel=_LOSS)
]
ClassWeight = Annotated[
    list[str] | None,
    typer.Option(metavar="CLASS=NUMBER", help="What a class counts; may be repeated.", rich_help_panel=_LOSS),
]
Ordinal = Annotated[
    bool, typer.Option("--ordinal", help="The classes have an order: the dataset's.", rich_help_panel=_LOSS)
]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Wait = Annotated[bool, typer.Option(help="Wait for the model.")]


@command(missing="trunkline datasets")
def train(
    session: Session,
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="NAME or NAME@VERSION.")],
    name: Annotated[str, typer.Option("--name", help="Name of the model.")],
    backbone: Annotated[
        list[str] | None, typer.Option(help="For images: who reads them; may be repeated, for several.")
    ] = None,
    input_size: Annotated[int | None, typer.Option(help="For images: side of the square, in pixels.", min=1)] = None,
    embedding: Annotated[str, typer.Option(help="auto or pooled.")] = "auto",
    slices: Annotated[list[str] | None, typer.Option("--slice", help="Use these slices; may be repeated.")] = None,
    head: Annotated[str, typer.Option(help="linear, mlp, conv or prototype.")] = "linear",
    hidden: Annotated[
        list[int] | None, typer.Option(help="Width of a hidden layer; may be repeated.", rich_help_panel=_HEAD)
    ] = None,
    activation: Activation = None,
    batch_norm: BatchNorm = False,
    dropout: Annotated[float | None, typer.Option(help="Of hidden units.", rich_help_panel=_HEAD)] = None,
    channels: Channels = None,
    tap: Tap = None,
    fuse: Fuse = None,
    fuse_width: Annotated[int | None, typer.Option(help="Common width of add and gate.", rich_help_panel=_HEAD)] = None,
    loss: LossName = "auto",
    huber_delta: Annotated[
        float, typer.Option(help="From where on huber is linear, in standard deviations.", rich_help_panel=_LOSS)
    ] = 1.0,
    quantile: Quantile = 0.5,
    focal_gamma: Annotated[
        float, typer.Option(help="How little rows count that are right already.", rich_help_panel=_LOSS)
    ] = 2.0,
    label_smoothing: LabelSmoothing = 0.0,
    balanced: Balanced = False,
    class_weight: ClassWeight = None,
    ordinal: Ordinal = False,
    select_by: Annotated[
        str, typer.Option(help="Metric to choose strengths and epochs by, such as balanced_accuracy.")
    ] = "",
    solver: SolverName = "auto",
    epochs: Annotated[int, typer.Option(help="0: the default.", rich_help_panel=_ADAMW)] = 0,
    batch_size: Annotated[int, typer.Option(help="0: the default.", rich_help_panel=_ADAMW)] = 0,
    learning_rate: Annotated[float, typer.Option(help="0: the default.", rich_help_panel=_ADAMW)] = 0.0,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps in which the rate rises.", rich_help_panel=_ADAMW)
    ] = 0.05,
    clip_norm: Annotated[float, typer.Option(help="Longest gradient; 0: any.", rich_help_panel=_ADAMW)] = 1.0,
    ema: Annotated[
        float, typer.Option(help="Decay of the average of the weights that is kept.", rich_help_panel=_ADAMW)
    ] = 0.0,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.", rich_help_panel=_ADAMW)] = "float32",
    patience: Annotated[int, typer.Option(help="Epochs without a better one; 0: all.", rich_help_panel=_ADAMW)] = 0,
    mixup: Annotated[
        float, typer.Option(help="Mix rows in pairs, by shares from Beta(mixup, mixup); 0: no.", rich_help_panel=_ADAMW)
    ] = 0.0,
    l2: Annotated[
        float | None, typer.Option(help="L2 penalty, or weight decay. Left out: chosen by cross-validation.")
    ] = None,
    validation: Annotated[float, typer.Option(help="Fraction held out to measure.")] = 0.2,
    refit: Annotated[bool, typer.Option(help="Train once more on every row after measuring.")] = True,
    calibrate: Annotated[bool, typer.Option(help="Scale probabilities by the rows held out.")] = True,
    fine_tune: Annotated[
        bool,
        typer.Option("--fine-tune", help="Train the last blocks too; kept only if that helps.", rich_help_panel=_TUNE),
    ] = False,
    tune_cut: Annotated[str, typer.Option(help="Cut behind which blocks are trained.", rich_help_panel=_TUNE)] = "",
    lora_rank: Annotated[
        int, typer.Option(help="Train what is added, of that rank; 0: all weights.", rich_help_panel=_TUNE)
    ] = 0,
    tune_epochs: Annotated[int, typer.Option(help="0: the default.", rich_help_panel=_TUNE)] = 0,
    tune_batch_size: Annotated[int, typer.Option(help="0: the default.", rich_help_panel=_TUNE)] = 0,
    tune_learning_rate: Annotated[float, typer.Option(help="0: the default.", rich_help_panel=_TUNE)] = 0.0,
    layer_decay: Annotated[
        float, typer.Option(help="Of the rate, from a stage to the one before; 0: the default.", rich_help_panel=_TUNE)
    ] = 0.0,
    adapt_batch_norm: Annotated[
        bool, typer.Option("--adapt-batch-norm", help="Average statistics of these rows.", rich_help_panel=_TUNE)
    ] = False,
    workers: Annotated[
        str, typer.Option(metavar="N|MIN-MAX", help="That share the work.", rich_help_panel=_TUNE)
    ] = "1",
    seed: Seed = 0,
    tensorboard: TensorBoardFolder = None,
    mlflow: MLflowAddress = None,
    mlflow_experiment: MLflowExperiment = "trunkline",
    wait: Wait = True,
) -> None:
    """Train a head on a dataset."""
    from trunkline.losses import Loss, Optimiser

    tuning = _fine_tune(
        asked=fine_tune,
        cut=tune_cut,
        lora_rank=lora_rank,
        epochs=tune_epochs,
        batch_size=tune_batch_size,
        learning_rate=tune_learning_rate,
        layer_decay=layer_decay,
        batch_norm="adapt" if adapt_batch_norm else "frozen",
        workers=_workers(workers),
    )

    chosen = _head(
        head,
        hidden=hidden,
        activation=activation,
        batch_norm=batch_norm or None,
        dropout=dropout,
        channels=channels,
        tap=tap,
        fuse=fuse,
        fuse_width=fuse_width,
    )
    with session.connect() as client:
        job = client.train(
            dataset,
            name=name,
            backbone=backbone,
            input_size=input_size,
            embedding=slices or embedding,
            head=chosen,
            solver=solver,
            loss=Loss(loss, huber_delta, quantile, focal_gamma),
            label_smoothing=label_smoothing,
            class_weights=_class_weights(class_weight, balanced=balanced),
            ordinal=ordinal,
            select_by=select_by,
            optimiser=Optimiser(warmup, clip_norm, ema, precision, patience, mixup),
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            l2=l2,
            validation=validation,
            refit=refit,
            calibrate=calibrate,
            fine_tune=tuning,
            seed=seed,
            track=trackers(tensorboard, mlflow, mlflow_experiment, wait=wait),
        )
        _emit_model(session, job, wait=wait, hint="trunkline predict {} IMAGE ...")


def _fine_tune(*, asked: bool, **given: Any) -> FineTune | bool:
    """Return how to fine-tune, if it is asked for.

    Raises:
        InvalidArgumentError: It is not, but an option says how.
    """
    from trunkline.errors import InvalidArgumentError
    from trunkline.fine_tuning import FineTune

    wanted = FineTune(**given)
    if asked:
        return wanted
    if wanted != FineTune():
        raise InvalidArgumentError("an option says how to fine-tune, but not to do it", hint="Add --fine-tune")
    return False


def _workers(text: str) -> int | tuple[int, int]:
    from trunkline.errors import InvalidArgumentError

    least, dash, most = text.partition("-")
    try:
        return (int(least), int(most)) if dash else int(least)
    except ValueError:
        raise InvalidArgumentError(f"--workers is {text!r}; expected a number, or two such as 1-4") from None


@command(missing="trunkline datasets")
def sweep(
    session: Session,
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="NAME or NAME@VERSION.")],
    name: Annotated[str, typer.Option("--name", help="Name of the model.")],
    l2: Annotated[list[float] | None, typer.Option(help="Penalty, or weight decay, to try; may be repeated.")] = None,
    hidden: Annotated[
        list[str] | None,
        typer.Option(help="Widths to try, such as 256-64, or linear; may be repeated."),
    ] = None,
    learning_rate: Annotated[
        list[float] | None, typer.Option(help="Of heads with hidden layers, to try; may be repeated.")
    ] = None,
    dropout: Annotated[
        list[float] | None, typer.Option(help="Of heads with hidden layers, to try; may be repeated.")
    ] = None,
    slices: Annotated[
        list[str] | None, typer.Option("--slices", help="Slices to try, with commas between; may be repeated.")
    ] = None,
    folds: Annotated[int, typer.Option(help="Of the cross-validation.")] = 5,
    embedding: Annotated[str, typer.Option(help="auto or pooled, where no slices are tried.")] = "auto",
    head: Annotated[str, typer.Option(help="What all have in common: linear, mlp, conv or prototype.")] = "linear",
    activation: Activation = None,
    batch_norm: BatchNorm = False,
    channels: Channels = None,
    tap: Tap = None,
    fuse: Fuse = None,
    solver: SolverName = "auto",
    loss: LossName = "auto",
    quantile: Quantile = 0.5,
    label_smoothing: LabelSmoothing = 0.0,
    balanced: Balanced = False,
    class_weight: ClassWeight = None,
    ordinal: Ordinal = False,
    select_by: Annotated[str, typer.Option(help="Metric to win by, such as balanced_accuracy.")] = "",
    epochs: Annotated[int, typer.Option(help="Of heads that learn in steps. 0: the default.")] = 0,
    validation: Annotated[float, typer.Option(help="Fraction held out to measure the winner.")] = 0.2,
    seed: Seed = 0,
    tensorboard: TensorBoardFolder = None,
    mlflow: MLflowAddress = None,
    mlflow_experiment: MLflowExperiment = "trunkline",
    wait: Wait = True,
) -> None:
    """Try many heads by cross-validation, and train the best."""
    from trunkline.losses import Loss

    common = _head(head, activation=activation, batch_norm=batch_norm or None, channels=channels, tap=tap, fuse=fuse)
    with session.connect() as client:
        job = client.sweep(
            dataset,
            name=name,
            l2=l2 or (),
            hidden=[_widths(one) for one in hidden or ()],
            learning_rate=learning_rate or (),
            dropout=dropout or (),
            embeddings=[one.split(",") for one in slices or ()],
            folds=folds,
            embedding=embedding,
            head=common,
            solver=solver,
            loss=Loss(loss, quantile=quantile),
            label_smoothing=label_smoothing,
            class_weights=_class_weights(class_weight, balanced=balanced),
            ordinal=ordinal,
            select_by=select_by,
            epochs=epochs,
            validation=validation,
            seed=seed,
            track=trackers(tensorboard, mlflow, mlflow_experiment, wait=wait),
        )
        _emit_model(session, job, wait=wait, hint="trunkline models {}")


def _emit_model(session: Session, job: Job, *, wait: bool, hint: str) -> None:
    """Wait for a job's model and say what it is, or say the job. ``hint`` has a place for the model."""
    from trunkline.training import job_to_dict

    if not wait:
        session.emit(job_to_dict(job.status()), job.id, hint=f"trunkline jobs {job.id} --wait")
        return
    print(f"job {job.id}", file=sys.stderr)
    model = job.result()
    session.emit({"job": job.id, "model": model.to_dict()}, _trained(model), hint=hint.format(model.reference))


def _widths(text: str) -> tuple[int, ...]:
    from trunkline.errors import InvalidArgumentError

    if text == "linear":
        return ()
    try:
        return tuple(int(one) for one in text.split("-"))
    except ValueError:
        raise InvalidArgumentError(f"--hidden is {text!r}; expected widths such as 256-64, or linear") from None


@command(missing="trunkline jobs")
def jobs(
    session: Session,
    job_id: Annotated[str | None, typer.Argument(metavar="ID", help="One job, in detail.")] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="End it.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its model.")] = False,
    events: Annotated[bool, typer.Option("--events", help="Show what happened and what happens, to its end.")] = False,
    tensorboard: TensorBoardFolder = None,
    mlflow: MLflowAddress = None,
    mlflow_experiment: MLflowExperiment = "trunkline",
) -> None:
    """List the jobs, or show, follow or end one."""
    from trunkline.errors import InvalidArgumentError
    from trunkline.training import event_to_dict, job_to_dict

    if job_id is None and (cancel or wait or events):
        raise InvalidArgumentError("--cancel, --wait and --events need the id of a job", hint="`trunkline jobs` has it")
    track = trackers(tensorboard, mlflow, mlflow_experiment, wait=wait, hint="Add --wait")
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
            model = job.result(track=track)
            session.emit({"job": job.id, "model": model.to_dict()}, _trained(model))
            return
        status = job.status()
        session.emit(job_to_dict(status), _detail(status), hint=_following(status))


def _head(kind: str, **given: Any) -> Head:
    """Return the head that options describe.

    Raises:
        InvalidArgumentError: There is no such kind, or an option that was given means nothing to it.
    """
    from trunkline.heads import head_of_kind

    return head_of_kind(kind, {name: value for name, value in given.items() if value not in (None, [])})


def _trained(model: Model) -> str:
    from trunkline.scores import held_out_scores

    metrics = ", ".join(f"{name} {text}" for name, text in list(held_out_scores(model.metrics).items())[:3])
    read = [f"{one.space.source} ({', '.join(slices)})" for one, slices in model.slices_by_input()]
    tuned = model.fine_tuning
    blocks = "" if tuned is None else f"\nblocks behind {tuned.cut}: {tuned.reason}"
    doubts = "".join(f"\nwarning: {one}" for one in model.warnings)
    return f"{model.reference}: {metrics or 'not measured'}\nreads: {' and '.join(read)}{blocks}{doubts}"


def _class_weights(given: list[str] | None, *, balanced: bool) -> str | dict[str, float] | None:
    from trunkline.errors import InvalidArgumentError

    if balanced and given:
        raise InvalidArgumentError("--balanced and --class-weight exclude each other", hint="Leave one of them out")
    weights = {}
    for one in given or ():
        name, _, number = one.rpartition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            name = ""
        if not name:
            raise InvalidArgumentError(f"--class-weight is {one!r}; expected CLASS=NUMBER, such as cat=2")
    return "balanced" if balanced else weights or None


def _detail(status: JobStatus) -> str:
    from trunkline.heads import head_summary

    loss = status.spec.fit.loss
    return facts(
        [
            ("job", status.id),
            ("state", status.state.name),
            ("model", status.model or status.spec.model),
            ("dataset", status.spec.dataset),
            ("backbones", ", ".join([status.spec.backbone, *(one.backbone for one in status.spec.more_backbones)])),
            ("embedding", ", ".join(status.spec.slices) or status.spec.embedding),
            ("head", head_summary(status.spec.head) if status.spec.head else None),
            ("fine-tuned", None if status.spec.fine_tune is None else f"behind {status.spec.fine_tune.cut}"),
            ("loss", None if loss is None or loss.kind == "auto" else loss.kind),
            ("selected by", status.spec.fit.select_by or None),
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
