"""An embedded cluster for tests, brought up and down by the commands that users type."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import trunkline
from trunkline_wire.local import LocalCluster
from trunkline_worker.cluster.processes import processes_of


def trunkline_command(*arguments):
    """Return the command line of ``trunkline``, in this interpreter."""
    return [sys.executable, "-c", "from trunkline.cli import main; main()", *arguments]


FIXED = "efficientnet_lite0"
"""The backbone that a cluster serves where none is named."""

EXACT_RUNTIME = "onnxruntime-fp32"


class EmbeddedCluster:
    """A cluster of its own: state folder, cache, port.

    The runtime of the default backbone is fixed to an exact one, unless ``exact`` or ``runtimes`` says otherwise: tests
    compare answers with PyTorch's, and need not wait while runtimes are measured. One that is chosen by measuring may
    be one whose embedding is wrong by 2 %.
    """

    def __init__(self, folder, *, exact=(FIXED,), **settings):
        """Prepare.

        Args:
            folder: For its state and cache.
            exact: The backbones whose runtime is fixed to an exact one; ``up`` must name them, or none.
            settings: Of the cluster, as its environment variables name them.
        """
        if "backbones" not in settings:
            settings.setdefault("runtimes", json.dumps({name: EXACT_RUNTIME for name in exact}))
        self.exact = exact
        self.folder = Path(folder)
        self.state_dir = self.folder / "state"
        self.environment = {
            # How many threads it takes is its own affair, not that of the process that tests.
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith("TRUNKLINE_") and name != "OMP_NUM_THREADS"
            },
            "TRUNKLINE_STATE_DIR": str(self.state_dir),
            "TRUNKLINE_CACHE_DIR": str(self.folder / "cache"),
            **{f"TRUNKLINE_CLUSTER_{name.upper()}": value for name, value in settings.items()},
        }
        self.address = self.token = self.ca_file = self.id = None

    def run(self, *arguments, check=True, timeout=240):
        """Run a ``trunkline`` command against this cluster."""
        environment = dict(self.environment)
        served = arguments if "--backbone" in arguments else (FIXED,)
        if not set(self.exact) <= set(served):  # a runtime cannot be fixed for what is not served
            environment.pop("TRUNKLINE_CLUSTER_RUNTIMES", None)
        return subprocess.run(
            trunkline_command(*arguments),
            env=environment,
            capture_output=True,
            text=True,
            check=check,
            timeout=timeout,
        )

    def up(self, *arguments):
        """Bring it up."""
        done = self.run("up", "--port", "0", "--json", *arguments, check=False)
        log = self.state_dir / "cluster.log"
        assert done.returncode == 0, done.stderr + (log.read_text()[-5000:] if log.exists() else "")
        answer = json.loads(done.stdout)
        record = LocalCluster(**json.loads((self.state_dir / "cluster.json").read_text()))
        self.address, self.id, self.holder = record.address, record.id, record.pid
        self.token = Path(record.token_file).read_text().strip()
        self.ray_address = answer["ray_address"]
        self.dashboard = answer["dashboard"]
        return self

    def down(self):
        """End it, and return the processes that are left: there must be none."""
        self.run("down", "--json")
        return processes_of(self.id)

    def connect(self):
        """Return a client of it."""
        return trunkline.connect(self.address, token=self.token)

    def pid_of(self, title):
        """Return the process whose title starts so, for example ``ray::RayTrainWorker``."""
        for pid in processes_of(self.id):
            try:
                if Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").startswith(title):
                    return pid
            except OSError:
                continue
        raise AssertionError(f"no process {title!r} in {self.titles()}")

    def titles(self):
        """Return the titles of all its processes."""
        found = []
        for pid in processes_of(self.id):
            try:
                found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:60])
            except OSError:
                continue
        return found


def digits(count=None):
    """Return real 8x8 digits as uint8 pictures, and their labels."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pictures = (loaded.images * (255 / 16)).round().astype("uint8")
    # The data set is sorted by writer: mixed, so that every part of it holds all of them.
    order = np.random.default_rng(0).permutation(len(pictures))[:count]
    return pictures[order], loaded.target[order]
