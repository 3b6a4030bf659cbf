"""``trunkline up|down|status|serve``: the commands of whoever runs a cluster."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import pydantic
import typer
from rich.console import Console
from trunkline_wire.local import LocalCluster, read_local_cluster, remove_local_cluster, state_dir

from trunkline_worker.cluster import processes
from trunkline_worker.cluster.settings import Settings

app = typer.Typer(no_args_is_help=True)

DOWN_PATIENCE_S = 40.0
"""How long ``down`` waits for an orderly end, in seconds."""

_Host = Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")]
_Port = Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. Default: 50051.")]
_Backbones = Annotated[list[str] | None, typer.Option("--backbone", help="Backbone to serve; may be repeated.")]
_Weights = Annotated[list[str] | None, typer.Option(help="NAME=FILE: weights of a backbone; may be repeated.")]
_Untrained = Annotated[bool | None, typer.Option("--allow-untrained", help="Serve backbones without weights.")]
_TokenFile = Annotated[str | None, typer.Option(help="File of tokens. Default: one is made in the state folder.")]
_Cert = Annotated[str | None, typer.Option(help="PEM file with the certificate chain.")]
_Key = Annotated[str | None, typer.Option(help="PEM file with the private key.")]
_ClientCa = Annotated[str | None, typer.Option(help="PEM file; clients must show a certificate of this authority.")]
_Insecure = Annotated[bool | None, typer.Option("--insecure", help="Allow plaintext beyond loopback, or no tokens.")]
_Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@app.command()
def up(
    host: _Host = None,
    port: _Port = None,
    backbone: _Backbones = None,
    weights: _Weights = None,
    allow_untrained: _Untrained = None,
    token_file: _TokenFile = None,
    tls_cert: _Cert = None,
    tls_key: _Key = None,
    tls_client_ca: _ClientCa = None,
    insecure: _Insecure = None,
    device: _Device = None,
    as_json: _Json = False,
) -> None:
    """Bring the embedded cluster up on this machine, and return when it answers."""
    running = _running()
    if running is not None:
        _print_up({"address": running.address}, as_json, already=True)
        given = (host, port, backbone, weights, allow_untrained, token_file, tls_cert, tls_key, tls_client_ca, insecure)
        if any(one is not None for one in (*given, device)):
            _note(
                "It runs as it was started: your options changed nothing. To apply them: trunkline down, then up again"
            )
        return
    settings = _settings(
        host=host,
        port=port,
        backbones=tuple(backbone) if backbone else None,
        weights=_weights(weights),
        allow_untrained=allow_untrained,
        token_file=token_file,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        insecure=insecure,
        device=device,
    )
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
def serve(
    host: _Host = None,
    port: _Port = None,
    backbone: _Backbones = None,
    weights: _Weights = None,
    allow_untrained: _Untrained = None,
    token_file: _TokenFile = None,
    tls_cert: _Cert = None,
    tls_key: _Key = None,
    tls_client_ca: _ClientCa = None,
    insecure: _Insecure = None,
    device: _Device = None,
    address: Annotated[str, typer.Option(help="Ray cluster. Default: the one this runs on.")] = "auto",
    as_json: _Json = False,
) -> None:
    """Put Trunkline onto a Ray cluster that runs already, and return when it answers.

    Made for: ray job submit --address http://HEAD:8265 -- trunkline serve
    """
    settings = _settings(
        host=host,
        port=port,
        backbones=tuple(backbone) if backbone else None,
        weights=_weights(weights),
        allow_untrained=allow_untrained,
        token_file=token_file,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        insecure=insecure,
        device=device,
    )
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


def _settings(**given: Any) -> Settings:
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
        if settings.token_file is None and not settings.insecure:
            settings.model_copy(update={"token_file": "made later"}).listener.check()
        else:
            settings.listener.check()
        return settings
    except pydantic.ValidationError as error:
        _fail("; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()), code=2)
    except ValueError as error:
        _fail(str(error), code=2)


def _weights(given: list[str] | None) -> dict[str, str] | None:
    if not given:
        return None
    pairs = {}
    for one in given:
        name, separator, path = one.partition("=")
        if not separator or not Path(path).is_file():
            _fail(f"--weights {one}: expected NAME=FILE with a file that is there", code=2)
        pairs[name] = str(Path(path).absolute())
    return pairs


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
