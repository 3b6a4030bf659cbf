"""Puts Trunkline onto the Ray cluster that this process is connected to."""

from __future__ import annotations

import logging
import re
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from trunkline_wire.errors import WireError

from trunkline_worker.cluster.apps import (
    GATEWAY_APP,
    backbone_app_name,
    build_backbone,
    build_gateway,
    controller_config,
)
from trunkline_worker.cluster.controller import replace_controller
from trunkline_worker.cluster.settings import Settings
from trunkline_worker.store.blobs import BlobStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Deployed:
    """What came up. ``port`` is the gateway's."""

    port: int
    storage_note: str


def deploy(settings: Settings, on_phase: Callable[[str], None]) -> Deployed:
    """Start controller, lanes, backbones and gateway, and return when the gateway answers.

    Args:
        settings: What to deploy.
        on_phase: Told what is being waited for.

    Raises:
        ValueError: The settings are not safe, or storage is not shared by all nodes.
        RuntimeError: A deployment did not come up.
    """
    settings.listener.check()
    if settings.port == 0:
        # Chosen once and for all replicas: one that is started again must be found where the last one was.
        settings = settings.model_copy(update={"port": free_port(settings.host)})
    elif GATEWAY_APP not in serve.status().applications:
        check_port(settings.host, settings.port)
    if settings.tuning_gpus < 0:
        settings = settings.model_copy(update={"tuning_gpus": _tuning_share(settings)})
    if settings.gpus_per_backbone < 0:
        settings = settings.model_copy(update={"gpus_per_backbone": _gpu_share(settings)})
    on_phase("checking storage")
    shared, note = check_storage(settings.storage_url)
    if not shared:
        raise ValueError(note)
    on_phase("starting the controller")
    replace_controller(controller_config(settings))
    serve.start(proxy_location="Disabled", http_options={"location": "NoServer"})
    for name in settings.backbones:
        on_phase(f"loading {name}")
        _run(build_backbone(settings, name), backbone_app_name(name))
    on_phase("starting the gateway")
    handle = _run(build_gateway(settings, storage_shared=shared, storage_note=note), GATEWAY_APP)
    return Deployed(handle.port.remote().result(timeout_s=30), note)


def _run(app: Application, name: str) -> DeploymentHandle:
    """Run a Serve application and wait for it.

    Raises:
        ValueError: It says why it cannot come up.
        RuntimeError: It does not come up for another reason; the message holds what Serve knows.
    """
    try:
        return serve.run(app, name=name, route_prefix=None)
    except RuntimeError as error:
        status = serve.status().applications.get(name)
        messages = [deployment.message for deployment in status.deployments.values()] if status else []
        serve.delete(name)
        for message in messages:
            # Serve keeps the traceback of the replica's start as text; the last line of ours is for the operator.
            reason = re.search(r"WireError: \[\w+\] (.*)", message)
            if reason:
                raise ValueError(reason[1]) from error
        raise RuntimeError("\n".join([str(error), *messages])) from error


def _gpu_share(settings: Settings) -> float:
    """Return how many GPUs each backbone replica gets: without a reservation, Ray hides them all."""
    if settings.device == "cpu":
        return 0.0
    num_gpus = ray.cluster_resources().get("GPU", 0.0)
    # What fine-tuning reserves is left over, or its runs would wait for ever.
    num_gpus = max(0.0, num_gpus - settings.tuning_gpus * settings.tuning_runs * settings.tuning_workers)
    share: float = min(1.0, num_gpus / (len(settings.backbones) * settings.backbone_replicas))
    return share


def _tuning_share(settings: Settings) -> float:
    """Return how many GPUs each worker of a fine-tuning run gets: a share beside the backbones, if there are any."""
    if settings.device == "cpu" or not ray.cluster_resources().get("GPU", 0.0):
        return 0.0
    return 0.1


def free_port(host: str) -> int:
    """Return a port that nothing listens on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def check_port(host: str, port: int) -> None:
    """Check that nothing listens on a port.

    Gateways of one node share theirs, so the kernel would let a gateway of another cluster share it, too, and divide
    the callers between the two without a word.

    Raises:
        ValueError: Something does.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error


def check_storage(url: str) -> tuple[bool, str]:
    """Return whether every node reads what this one wrote, and what was found out, in words."""
    blobs = BlobStore(url)
    path, content = f"probes/{secrets.token_hex(8)}", secrets.token_bytes(16)
    blobs.put(path, content)
    try:
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        answers = [
            _reads.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                url, path, content
            )
            for node in nodes
        ]
        blind = [node for node, answer in zip(nodes, ray.get(answers), strict=True) if not answer]
    finally:
        blobs.delete(path)
    if blind:
        return False, (
            f"{len(blind)} of {len(nodes)} nodes cannot read what this one wrote to {url}: use an object store "
            "(s3://, gs://) or a path that all nodes mount"
        )
    return True, f"{len(nodes)} of {len(nodes)} nodes read what one wrote"


@ray.remote(num_cpus=0)
def _reads(url: str, path: str, content: bytes) -> bool:
    try:
        return BlobStore(url).get(path) == content
    except (WireError, OSError):
        return False
