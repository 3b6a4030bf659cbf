"""The process that holds the embedded cluster: Ray on loopback, Trunkline on top, until it is told to end.

Run by ``trunkline up``; it tells how far it is on the file descriptor it is given, one JSON object per line.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

from trunkline_wire.local import LocalCluster, remove_local_cluster, state_dir, write_local_cluster

from trunkline_worker.cluster.processes import CLUSTER_ID_VARIABLE
from trunkline_worker.cluster.settings import Settings
from trunkline_worker.serving.auth import create_token_file
from trunkline_worker.serving.loopback import LOOPBACK_VARIABLE

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 512 * 2**20
"""Shared memory for what passes between processes."""


def main() -> int:
    """Bring the cluster up, hold it, take it down. Arguments: the settings as JSON, and a file descriptor."""
    settings = Settings(**json.loads(sys.argv[1]))
    with os.fdopen(int(sys.argv[2]), "w") as status:
        logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        state = state_dir()
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The lock is held as long as the process lives.
        with open(state / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(status, error="another cluster is being brought up or runs in this state folder")
                return 1
            # Unix sockets have short names: Ray's folder cannot lie under a long path.
            ray_dir = Path(tempfile.mkdtemp(prefix="trunkline-"))
            try:
                return _hold(settings, state, ray_dir, status)
            except Exception as error:
                logger.exception("the cluster could not be brought up")
                # A ValueError is meant for the operator; anything else is told with its kind.
                _say(status, error=str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
                return 1
            finally:
                remove_local_cluster()
                shutil.rmtree(ray_dir, ignore_errors=True)


def _hold(settings: Settings, state: Path, ray_dir: Path, status: IO[str]) -> int:
    stop = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    cluster_id = os.environ[CLUSTER_ID_VARIABLE]
    if settings.token_file is None and not settings.insecure:
        create_token_file(state / "token")
        settings = settings.model_copy(update={"token_file": str(state / "token")})
    settings.listener.check()
    _set_environment(state)

    import ray
    from ray import serve

    from trunkline_worker.cluster.deploy import deploy

    _say(status, phase="starting Ray")
    context = ray.init(
        address="local",
        num_cpus=_logical_cpus(settings),
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=settings.dashboard_port or None,
        object_store_memory=OBJECT_STORE_BYTES,
        namespace="trunkline",
        log_to_driver=False,
        logging_level=logging.WARNING,
        _temp_dir=str(ray_dir),
    )
    signal.signal(signal.SIGTERM, lambda *_: stop.set())  # Ray put its own handler there
    try:

        def on_phase(phase: str) -> None:
            if stop.is_set():
                raise InterruptedError("told to end before it was ready")
            _say(status, phase=phase)

        deployed = deploy(settings, on_phase)
        host = "127.0.0.1" if settings.host in ("0.0.0.0", "::", "localhost") else settings.host
        address = f"{host}:{deployed.port}"
        write_local_cluster(
            LocalCluster(
                address=address,
                token_file=settings.token_file or "",
                ca_file=settings.tls_cert or "",
                pid=os.getpid(),
                id=cluster_id,
            )
        )
        info: dict[str, Any] = context.address_info  # type: ignore[attr-defined]
        _say(status, ready=True, address=address, ray_address=info["address"], dashboard=info["webui_url"])
        with contextlib.suppress(OSError):
            status.close()
        stop.wait()
        logger.info("told to end")
        remove_local_cluster()
        serve.shutdown()  # gateways drain
    finally:
        ray.shutdown()
    return 0


def _set_environment(state: Path) -> None:
    ray_token = state / "ray_token"
    if not ray_token.exists():
        with open(os.open(ray_token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    os.environ.update(
        {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(ray_token),
            # Makes Ray call this node 127.0.0.1 and put its ports there; on Linux it would take the machine's address.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            LOOPBACK_VARIABLE: "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_LOG_TO_STDERR": "0",
        }
    )
    # Lanes and backbones share the cores: threads that wait must not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.pop("RAY_ADDRESS", None)


def _logical_cpus(settings: Settings) -> int:
    """Return how many CPUs Ray may hand out: enough for every part to be placed, however few cores there are."""
    parts = settings.lanes + len(settings.backbones) * settings.backbone_replicas + 2
    tuning = settings.tuning_runs * settings.tuning_workers * settings.tuning_cpus
    return max(parts + math.ceil(tuning), os.cpu_count() or 1)


def _say(status: IO[str], **words: Any) -> None:
    with contextlib.suppress(OSError, ValueError):  # whoever started us may be gone
        status.write(json.dumps(words) + "\n")
        status.flush()


if __name__ == "__main__":
    sys.exit(main())
