"""``ray job submit ... -- trunkline serve`` onto a Ray head that runs already, with its dashboard on."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import trunkline
from trunkline_worker.cluster.processes import CLUSTER_ID_VARIABLE, processes_of

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def free_ports(count):
    """Return ports that nothing listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def head(tmp_path):
    """A Ray head of its own, tokens on, and nothing of Trunkline on it."""
    gcs, dashboard, client_port, agent = free_ports(4)
    (tmp_path / "ray_token").write_text(secrets.token_hex(32))
    cluster_id = secrets.token_hex(8)
    bin_dir = Path(sys.executable).parent
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("TRUNKLINE_", "RAY_"))},
        "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "ray_token"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TRUNKLINE_STATE_DIR": str(tmp_path / "state"),
        "TRUNKLINE_CACHE_DIR": str(tmp_path / "cache"),
        CLUSTER_ID_VARIABLE: cluster_id,
    }
    with tempfile.TemporaryDirectory(prefix="tl-") as short, open(tmp_path / "head.log", "w") as log:
        holder = subprocess.Popen(
            [
                *(str(bin_dir / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=6"),
                *(f"--port={gcs}", f"--ray-client-server-port={client_port}", f"--dashboard-agent-listen-port={agent}"),
                *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
                *(f"--temp-dir={short}", "--object-store-memory=300000000"),
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 90
            while True:
                assert holder.poll() is None and time.monotonic() < deadline, (tmp_path / "head.log").read_text()
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", dashboard), 0.5):
                    break
                time.sleep(0.2)
            yield environment, f"http://127.0.0.1:{dashboard}", tmp_path
        finally:
            holder.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                holder.wait(3)
            for pid in processes_of(cluster_id):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            holder.wait(30)


def test_a_submitted_job_puts_trunkline_onto_the_cluster(head):
    environment, dashboard, folder = head
    [port] = free_ports(1)
    ray = str(Path(sys.executable).parent / "ray")
    submit = [ray, "job", "submit", "--address", dashboard, "--", "trunkline", "serve", "--port", str(port), "--json"]
    done = subprocess.run(submit, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert f'"port": {port}' in done.stdout
    token = (folder / "state" / "token").read_text().strip()
    with trunkline.connect(f"127.0.0.1:{port}", token=token) as client:
        [backbone] = client.backbones()
        assert (backbone.name, backbone.pretrained) == ("efficientnet_lite0", True)
    # The same command with other settings replaces the controller; what it knew is in the database.
    environment_of_job = json.dumps({"env_vars": {"TRUNKLINE_CLUSTER_LEASE_S": "7"}})
    again = [*submit[: submit.index("--")], "--runtime-env-json", environment_of_job, *submit[submit.index("--") :]]
    done = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    with trunkline.connect(f"127.0.0.1:{port}", token=token) as client:
        assert client.models(timeout_s=60) == []
    listed = subprocess.run(
        [ray, "job", "list", "--address", dashboard], env=environment, capture_output=True, text=True, check=True
    )
    assert listed.stdout.count("SUCCEEDED") >= 2
