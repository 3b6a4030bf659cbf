"""The file by which a cluster on this machine is found: written by the worker, read by the client."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs

STATE_DIR_VARIABLE = "TRUNKLINE_STATE_DIR"
"""Overrides where the local cluster keeps its file, token and data."""


@dataclass(frozen=True)
class LocalCluster:
    """How to reach the cluster on this machine.

    Attributes:
        address: ``host:port`` of the gateway.
        token_file: File with the bearer token, mode 0600.
        ca_file: PEM certificate to trust, empty without TLS.
        pid: Process that holds the cluster.
        id: Random; every process of the cluster carries it in its environment.
    """

    address: str
    token_file: str
    ca_file: str
    pid: int
    id: str


def state_dir() -> Path:
    """Return the directory of the local cluster's state, whether or not it exists."""
    override = os.environ.get(STATE_DIR_VARIABLE)
    return Path(override) if override else Path(platformdirs.user_state_dir("trunkline"))


def cluster_file() -> Path:
    """Return the path of the local cluster's file."""
    return state_dir() / "cluster.json"


def read_local_cluster() -> LocalCluster | None:
    """Return the local cluster, or None where its file is missing or not ours to read."""
    try:
        return LocalCluster(**json.loads(cluster_file().read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_local_cluster(cluster: LocalCluster) -> None:
    """Write the local cluster's file, whole or not at all, readable by its owner only."""
    path = cluster_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    # A file left over from an earlier try may have another mode, or be a link: it is never written through.
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(asdict(cluster), file)
    temporary.replace(path)


def remove_local_cluster() -> None:
    """Remove the local cluster's file, if it is there."""
    cluster_file().unlink(missing_ok=True)
