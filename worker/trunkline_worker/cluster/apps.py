"""From settings to Serve applications: used by the commands here, and by name in a Serve config file."""

from __future__ import annotations

import functools
import platform
from importlib import metadata
from typing import Any

from ray import serve
from ray.serve import Application

from trunkline_worker.cluster.controller import ControllerConfig
from trunkline_worker.cluster.metadata import ActorDirectory, ActorMetadata, connect_metadata
from trunkline_worker.cluster.settings import Settings
from trunkline_worker.serving.backends import TuningLimits
from trunkline_worker.serving.deployments import Backbone, BackboneConfig, Gateway, GatewayConfig
from trunkline_worker.store.records import TUNING_JOB
from trunkline_worker.training.ray_train import BackboneSource, LaneConfig

GATEWAY_APP = "trunkline-gateway"
"""Name of the gateway's Serve application."""

LIBRARIES = (
    "trunkline",
    "ray",
    "torch",
    "torchvision",
    "timm",
    "onnxruntime",
    "openvino",
    "numpy",
    "Pillow",
    "protobuf",
    "grpcio",
)
"""The libraries whose versions go into ``GetServerInfo`` and into every manifest."""

TUNING_IDLE_S = 60.0
"""How long the driver of fine-tuning runs waits for another job before it ends, in seconds."""

MAX_ONGOING_REQUESTS = 1000
"""Calls that Serve lets into a replica at a time. The batcher bounds the rows, which is what counts."""


def versions() -> dict[str, str]:
    """Return the versions of everything that decides results."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def backbone_app_name(backbone: str) -> str:
    """Return the name of a backbone's Serve application. Serve names files by it; no backbone's name has a plus."""
    return f"trunkline-backbone-{backbone.replace('/', '+')}"


def backbone_apps(settings: Settings) -> tuple[tuple[str, str], ...]:
    """Return (backbone, Serve application) of all that are served, the default first."""
    return tuple((name, backbone_app_name(name)) for name in settings.backbones)


def controller_config(settings: Settings) -> ControllerConfig:
    """Return what the controller needs to know."""
    apps = dict(backbone_apps(settings))
    lanes = tuple(
        LaneConfig(
            name=f"trunkline-lane-{index}",
            storage_url=settings.storage_url,
            storage_path=_train_path(settings),
            backbone_apps=apps,
            versions=versions(),
            num_threads=settings.lane_threads,
            lease_s=settings.lease_s,
            idle_s=settings.lane_idle_s,
            use_gpu=False,
        )
        for index in range(settings.lanes)
    )
    return ControllerConfig(settings.database_url, settings.storage_url, (*lanes, *_tuning(settings)), settings.lease_s)


def _tuning(settings: Settings) -> list[LaneConfig]:
    """Return the drivers of fine-tuning runs. They start for a job that waits, and end soon after."""
    sources = {
        name: BackboneSource(settings.weights.get(name), settings.allow_untrained, settings.manifest_of(name))
        for name in settings.backbones
    }
    return [
        LaneConfig(
            name=f"trunkline-tuning-{index}",
            storage_url=settings.storage_url,
            storage_path=_train_path(settings),
            backbone_apps=dict(backbone_apps(settings)),
            versions=versions(),
            num_threads=settings.lane_threads,
            lease_s=settings.lease_s,
            idle_s=TUNING_IDLE_S,
            use_gpu=settings.tuning_gpus > 0,
            kind=TUNING_JOB,
            backbones=sources,
            tuning_cpus=settings.tuning_cpus,
            tuning_gpus=max(0.0, settings.tuning_gpus),
        )
        for index in range(settings.tuning_runs)
    ]


def _train_path(settings: Settings) -> str:
    return f"{settings.storage_url.removeprefix('file://')}/train"


def build_backbone(settings: Settings, name: str) -> Application:
    """Return the Serve application of one backbone."""
    config = BackboneConfig(
        name=name,
        weights=settings.weights.get(name),
        allow_untrained=settings.allow_untrained,
        device=settings.device,
        num_threads=settings.num_threads,
        max_queued_rows=settings.max_queued_rows,
        head_capacity=settings.head_capacity,
        head_memory_mb=settings.head_memory_mb,
        storage_url=settings.storage_url,
        manifest=settings.manifest_of(name),
        samples=settings.samples or None,
        backbone_apps=backbone_apps(settings),
        direct=settings.direct_config,
        runtime=settings.runtimes.get(name),
        num_replicas=len(settings.backbones) * settings.backbone_replicas,
    )
    deployment = serve.deployment(
        name="Backbone",
        num_replicas=settings.backbone_replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 1, "num_gpus": max(0.0, settings.gpus_per_backbone)},
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=20,
    )(Backbone)
    return deployment.bind(config, ActorMetadata, ActorDirectory)


def build_gateway(settings: Settings, *, storage_shared: bool = True, storage_note: str = "") -> Application:
    """Return the Serve application of the gateway."""
    config = GatewayConfig(
        listener=settings.listener,
        backbone_apps=backbone_apps(settings),
        storage_url=settings.storage_url,
        versions=versions(),
        storage_shared=storage_shared,
        storage_note=storage_note,
        tuning=TuningLimits(settings.tuning_workers if settings.tuning_runs else 0, settings.tuning_memory_mb),
    )
    deployment = serve.deployment(
        name="Gateway",
        num_replicas=settings.gateway_replicas,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=20,
    )(Gateway)
    return deployment.bind(config, functools.partial(connect_metadata, controller_config(settings)), ActorDirectory)


def gateway(args: dict[str, Any]) -> Application:
    """Build the gateway from the ``args`` of a Serve config file: the names of ``Settings``."""
    return build_gateway(Settings(**args))


def backbone(args: dict[str, Any]) -> Application:
    """Build a backbone from the ``args`` of a Serve config file: ``name``, and the names of ``Settings``."""
    rest = dict(args)
    name = rest.pop("name")
    rest.setdefault("backbones", [name])
    return build_backbone(Settings(**rest), name)
