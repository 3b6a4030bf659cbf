"""``trunkline up|down|status|serve|validate``: the commands of whoever runs a cluster."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from trunkline_wire.errors import WireError
from trunkline_wire.local import LocalCluster, read_local_cluster, remove_local_cluster, state_dir

from trunkline_worker.cluster import processes
from trunkline_worker.cluster.options import ClusterOptions, with_cluster_options
from trunkline_worker.cluster.settings import Settings

app = typer.Typer(no_args_is_help=True)

DOWN_PATIENCE_S = 40.0
"""How long ``down`` waits for an orderly end, in seconds."""

_Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@app.command()
@with_cluster_options
def up(options: ClusterOptions, as_json: _Json = False) -> None:
    """Bring the embedded cluster up on this machine, and return when it answers."""
    running = _running()
    if running is not None:
        _print_up({"address": running.address}, as_json, already=True)
        if options.are_given:
            _note(
                "It runs as it was started: your options changed nothing. To apply them: trunkline down, then up again"
            )
        return
    settings = _settings(options)
    cluster_id = secrets.token_hex(8)
    state = state_dir()
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    read_fd, write_fd = os.pipe()
    with open(state / "cluster.log", "w") as log:
        holder = subprocess.Popen(
            [sys.executable, "-m", "trunkline_worker.cluster.embedded", settings.model_dump_json(), str(write_fd)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[write_fd],
            start_new_session=True,
            env={**os.environ, processes.CLUSTER_ID_VARIABLE: cluster_id},
        )
    os.close(write_fd)
    try:
        answer = _follow(read_fd)
    except KeyboardInterrupt:
        processes.end(holder.pid, cluster_id, patience_s=DOWN_PATIENCE_S)
        _fail("interrupted; nothing is left running", code=2)
    if "ready" not in answer:
        processes.end(holder.pid, cluster_id, patience_s=5.0)
        reason = answer.get("error", "the cluster ended before it was ready")
        _fail(f"{reason}\nThe whole story: {state / 'cluster.log'}")
    _print_up(answer, as_json)


@app.command()
def down(as_json: _Json = False) -> None:
    """End the embedded cluster of this machine, and nothing else."""
    cluster = read_local_cluster()
    if cluster is None:
        if as_json:
            print(json.dumps({"ended": False}))
        else:
            _note("No cluster of yours is up.")
        return
    ended = processes.end(cluster.pid, cluster.id, patience_s=DOWN_PATIENCE_S)
    remove_local_cluster()
    if ended.left:
        _fail(f"{len(ended.left)} processes could not be ended: {ended.left}")
    if as_json:
        print(json.dumps({"ended": True, "forced": len(ended.forced)}))
    else:
        _note("The cluster has ended." + (f" {len(ended.forced)} processes had to be forced." if ended.forced else ""))


@app.command()
def status(as_json: _Json = False) -> None:
    """Say whether the embedded cluster is up and serving. Exit code 1 where it is not."""
    cluster = read_local_cluster()
    if cluster is None:
        answer: dict[str, Any] = {"up": False}
    else:
        running = processes.is_running(cluster.pid)
        answer = {
            "up": running,
            "serving": running and _is_serving(cluster),
            "address": cluster.address,
            "pid": cluster.pid,
            "processes": len(processes.processes_of(cluster.id)),
            "log": str(state_dir() / "cluster.log"),
        }
    if as_json:
        print(json.dumps(answer))
    elif not answer["up"]:
        _note("No cluster of yours is up. Bring one up: trunkline up")
    else:
        word = "serving" if answer["serving"] else "not serving"
        _note(f"Up at {answer['address']}, {word}; {answer['processes']} processes, log {answer['log']}")
    if not answer["up"] or not answer["serving"]:
        raise typer.Exit(1)


@app.command()
@with_cluster_options
def serve(
    options: ClusterOptions,
    address: Annotated[str, typer.Option(help="Ray cluster. Default: the one this runs on.")] = "auto",
    as_json: _Json = False,
) -> None:
    """Put Trunkline onto a Ray cluster that runs already, and return when it answers.

    Made for: ray job submit --address http://HEAD:8265 -- trunkline serve
    """
    settings = _settings(options)
    import ray

    from trunkline_worker.cluster.deploy import deploy
    from trunkline_worker.serving.auth import create_token_file

    if settings.token_file is None and not settings.insecure:
        path = state_dir() / "token"
        create_token_file(path)
        settings = settings.model_copy(update={"token_file": str(path)})
    ray.init(address=address, namespace="trunkline", log_to_driver=False)
    try:
        deployed = deploy(settings, _note)
    except (ValueError, RuntimeError) as error:
        _fail(str(error))
    answer = {"port": deployed.port, "token_file": settings.token_file, "storage": deployed.storage_note}
    if as_json:
        print(json.dumps(answer))
    else:
        _note(f"Serving on port {deployed.port} of the nodes with a gateway. Token file: {settings.token_file}")


@app.command()
def validate(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Manifest or folder of a backbone of your own.")],
    samples: Annotated[str | None, typer.Option(help="Folder of pictures to check it with.")] = None,
    as_json: _Json = False,
) -> None:
    """Load a backbone of your own and check it as `up --own-backbone` does, without a cluster.

    Exit code 1 where it may not be served.
    """
    if not Path(path).exists():
        _fail(f"no backbone at {path}: expected a folder with a backbone.toml, or such a file", code=2)
    from trunkline_worker.cluster.validation import report, text

    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the backbone's own code prints is no part of the answer
            answer = report(path, samples)
    except WireError as error:
        _fail(json.dumps({"error": {"code": error.code.name, "message": error.message}}) if as_json else error.message)
    print(json.dumps(answer, indent=2) if as_json else text(answer))
    if not as_json:
        _note(f"Next:  trunkline up --own-backbone {path}")


def _settings(options: ClusterOptions) -> Settings:
    try:
        return options.settings()
    except ValueError as error:
        _fail(str(error), code=2)


def _running() -> LocalCluster | None:
    cluster = read_local_cluster()
    if cluster is None:
        return None
    if cluster.pid in processes.processes_of(cluster.id):
        return cluster
    remove_local_cluster()
    return None


def _follow(read_fd: int) -> dict[str, Any]:
    """Show how far the holder is, and return its last word."""
    console = Console(stderr=True)
    answer: dict[str, Any] = {}
    with os.fdopen(read_fd) as lines, console.status("starting") as spinner:
        for line in lines:
            answer = json.loads(line)
            if "phase" in answer:
                spinner.update(answer["phase"])
                if not console.is_terminal:
                    _note(answer["phase"])
            else:
                return answer
    return {}


def _print_up(answer: dict[str, Any], as_json: bool, *, already: bool = False) -> None:
    if as_json:
        print(json.dumps({**answer, "already_up": already, "state_dir": str(state_dir())}))
        return
    _note(f"{'Already up' if already else 'Up'} at {answer['address']}. Your token is found by itself.")
    if "dashboard" in answer:
        _note(f"Ray's dashboard: http://{answer['dashboard']} (its token: {state_dir() / 'ray_token'})")
    _note("Next:  trunkline backbones")
    _note('       python -c "import trunkline; print(trunkline.connect().backbones())"')
    _note("       trunkline down")


def _is_serving(cluster: LocalCluster) -> bool:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    if cluster.ca_file:
        credentials = grpc.ssl_channel_credentials(Path(cluster.ca_file).read_bytes())
        channel = grpc.secure_channel(cluster.address, credentials)
    else:
        channel = grpc.insecure_channel(cluster.address)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2.0)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _fail(text: str, code: int = 1) -> NoReturn:
    print(text, file=sys.stderr)
    raise typer.Exit(code)
