"""Trunkline as a contestant: a cluster as ``trunkline up`` makes it, and the one model that everybody serves.

The model is trained once; its head is what every peer gets, so that all answer the same numbers. The cluster is taken
down while others are measured, for it is never quite idle, and brought up again on what it stored.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import model as peer_model
import numpy as np
import numpy.typing as npt
from chosen import CUT, SLICE
from common import Cluster
from processes import MARK_VARIABLE, cpu_seconds, marked, new_mark
from targets import NUM_CLASSES

# Shape suffix legend: N = rows, H = height, W = width, D = embedding columns, K = classes

MODEL = "peers"

_TRAINED_ROWS = 80
_COMMAND = (sys.executable, "-c", "from trunkline.cli import main; main()")


class TrunklineServer:
    """The cluster of one run. What it stores outlives being taken down."""

    def __init__(self, folder: Path, backbone: str) -> None:
        """Choose where it stores; nothing is started."""
        self._folder = folder
        self._mark = new_mark()
        self.backbone = backbone
        self.environment = {
            **os.environ,
            MARK_VARIABLE: self._mark,
            "TRUNKLINE_STATE_DIR": str(folder / "state"),
            "TRUNKLINE_CACHE_DIR": str(folder / "cache"),
            "TRUNKLINE_CLUSTER_BACKBONES": json.dumps([backbone]),
            "TRUNKLINE_CLUSTER_ALLOW_UNTRAINED": "true",
        }

    @property
    def data(self) -> Path:
        """Where the cluster keeps its files."""
        return self._folder / "state" / "data"

    def start(self) -> Cluster:
        """Bring it up."""
        self._run("up", "--port", "0")
        os.environ["TRUNKLINE_CACHE_DIR"] = self.environment["TRUNKLINE_CACHE_DIR"]
        record = json.loads((self._folder / "state" / "cluster.json").read_text())
        return Cluster(self._folder / "state", record["id"])

    def stop(self) -> None:
        """Take it down."""
        self._run("down")

    def cpu_seconds(self) -> float:
        """Return the CPU time that its processes have used."""
        return cpu_seconds(marked(self._mark))

    def _run(self, *arguments: str) -> None:
        done = subprocess.run(
            [*_COMMAND, *arguments], env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"trunkline {arguments[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def pictures(num_rows: int, size: int, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return random pictures of ten kinds, and the kind of each: noise at several scales, the coarsest a kind's own.

    Shape:
        returns (N, H, W, 3): (num_rows, size, size, 3), uint8; and (N,).
    """
    rng = np.random.default_rng(seed)
    cells = (7, 14, 28, 56)
    kinds = rng.normal(size=(NUM_CLASSES, cells[0], cells[0], 3))
    labels = np.arange(num_rows) % NUM_CLASSES
    images = np.empty((num_rows, size, size, 3), dtype=np.uint8)
    for row, label in enumerate(labels):
        total = np.zeros((size, size, 3))
        for count in cells:
            noise = 0.6 * rng.normal(size=(count, count, 3)) + (kinds[label] if count == cells[0] else 0)
            repeat = -(-size // count)
            total += noise.repeat(repeat, axis=0).repeat(repeat, axis=1)[:size, :size]
        images[row] = np.clip(128 + 45 * total, 0, 255).astype(np.uint8)
    return images, labels


def train(server: TrunklineServer, cluster: Cluster, images_NHWC: npt.NDArray[np.uint8], labels: Any) -> dict[str, Any]:
    """Train the model, and return what a target needs: its name, its space, and the runtime that was chosen."""
    with cluster.connect() as client:
        spec = client.describe(server.backbone)
        found = spec.cut(CUT)
        assert found is not None
        space = spec.space(found)
        rows = slice(0, _TRAINED_ROWS)
        data = client.upload_features(images_NHWC[rows], labels[rows], name=MODEL, space=space, progress=False)
        trained = client.train(data, name=MODEL, embedding=SLICE, head="linear").result(progress=False)
        trained.predict_features(images_NHWC[:32], space=space, progress=False)
        return {
            "model": trained.reference,
            "space": asdict(space),
            "head_sha256": trained.record.head_sha256,
            "runtime": client.describe(server.backbone).runtime,
        }


def head_of(data: Path, sha256: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return weight (K, D) and bias (K,) of a stored linear head, standardisation folded in."""
    from trunkline_worker.heads.artefact import head_from_bytes, head_path
    from trunkline_worker.store.blobs import BlobStore

    head = head_from_bytes(BlobStore(f"file://{data}").get_checked(head_path(sha256), sha256)).head
    output = head.output
    parts = (head.mean, head.scale, output.weight, output.bias)
    return peer_model.fold(*(one.detach().numpy() for one in parts))


def export_embedding(backbone: str) -> tuple[bytes, int]:
    """Return the network from pictures to the pooled embedding as an ONNX file, and its input size in pixels."""
    from trunkline_worker.backbones.catalogue import load_backbone
    from trunkline_worker.backbones.export import export_module, sample_images

    loaded = load_backbone(backbone, allow_untrained=True)
    size = loaded.preprocessing.input_size
    return export_module(loaded.reader(CUT, [SLICE]), sample_images(2, size), "images", "embedding"), size


def reference(folder: Path, images_NHWC: npt.NDArray[np.uint8], num_threads: int) -> npt.NDArray[np.float32]:
    """Return what everybody must answer: eager torch in float32, one row after another."""
    exact: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]] = peer_model.load(
        folder, peer_model.TORCH, num_threads
    )
    return np.concatenate([exact(images_NHWC[row : row + 1]) for row in range(len(images_NHWC))])
