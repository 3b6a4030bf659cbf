"""The model that every contestant serves: pictures in, ten probabilities a picture out. Runs inside the peers.

Two runtimes. ``torch`` is what tutorials show: the network in eager mode, float32, memory as it comes. ``onnx`` is the
file that Trunkline exported, in ONNX Runtime with the options that Trunkline uses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

# Shape suffix legend: B = rows, H = height, W = width, D = embedding columns, K = classes

FOLDER_VARIABLE = "TRUNKLINE_BENCH_MODEL"
RUNTIME_VARIABLE = "TRUNKLINE_BENCH_RUNTIME"
THREADS_VARIABLE = "TRUNKLINE_BENCH_THREADS"
PORT_VARIABLE = "TRUNKLINE_BENCH_PORT"
"""How a server is told what to serve, and where."""

TORCH, ONNX = "torch", "onnx"

MAX_BATCH_ROWS = 32
"""Largest batch of every server, Trunkline's own among them: beyond it a CPU gains nothing."""

BATCH_WAIT_S = 0.01
"""How long a server that waits for a batch to fill does so: what mosec and Ray Serve do unless told otherwise."""

CALL_TIMEOUT_S = 60.0
"""After this a call counts as failed. Servers with a limit of their own have it raised to this."""

_BACKBONE_FILE, _HEAD_FILE, _ONNX_FILE = "backbone.json", "head.npz", "embedding.onnx"
_IMAGES, _EMBEDDING = "images", "embedding"

Embed = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]


class PeerModel:
    """Pictures to probabilities. For one thread."""

    def __init__(self, embed: Embed, weight_KD: npt.NDArray[np.float32], bias_K: npt.NDArray[np.float32]) -> None:
        """Take what makes the embedding, and the head."""
        self._embed = embed
        self._weight_DK = np.ascontiguousarray(weight_KD.T)
        self._bias_K = bias_K

    def __call__(self, images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return probabilities.

        Shape:
            images_BHWC: (B, H, W, 3), uint8; returns (B, K), float32.
        """
        return self.head(self._embed(images_BHWC))

    def head(self, embedding_BD: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the probabilities of an embedding."""
        return softmax(embedding_BD @ self._weight_DK + self._bias_K)


def softmax(logits_BK: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return probabilities, row by row."""
    powers_BK = np.exp(logits_BK - logits_BK.max(axis=1, keepdims=True))
    probabilities_BK: npt.NDArray[np.float32] = powers_BK / powers_BK.sum(axis=1, keepdims=True)
    return probabilities_BK


def fold(
    mean_D: npt.NDArray[np.float32],
    scale_D: npt.NDArray[np.float32],
    weight_KD: npt.NDArray[np.float32],
    bias_K: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return weight and bias of one linear layer that standardises too: (x - mean) / scale first, then the layer."""
    weight = weight_KD.astype(np.float64) / scale_D.astype(np.float64)
    bias = bias_K.astype(np.float64) - weight @ mean_D.astype(np.float64)
    return weight.astype(np.float32), bias.astype(np.float32)


def save_parts(
    folder: Path,
    backbone: str,
    input_size: int,
    onnx: bytes,
    weight_KD: npt.NDArray[np.float32],
    bias_K: npt.NDArray[np.float32],
) -> None:
    """Write what servers load."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _BACKBONE_FILE).write_text(json.dumps({"name": backbone, "input_size": input_size}))
    (folder / _ONNX_FILE).write_bytes(onnx)
    np.savez(folder / _HEAD_FILE, weight=weight_KD, bias=bias_K)


def row_shape(folder: Path) -> tuple[int, int, int]:
    """Return (H, W, 3) of the pictures that the model takes."""
    size = int(json.loads((folder / _BACKBONE_FILE).read_text())["input_size"])
    return size, size, 3


def load(folder: Path, runtime: str, num_threads: int) -> PeerModel:
    """Load the model with one of the two runtimes.

    Raises:
        ValueError: There is no such runtime.
    """
    loaders: dict[str, Callable[[Path, int], Embed]] = {TORCH: _torch, ONNX: _onnx}
    if runtime not in loaders:
        raise ValueError(f"{runtime!r} is not one of {', '.join(loaders)}")
    return with_head(folder, loaders[runtime](folder, num_threads))


def with_head(folder: Path, embed: Embed) -> PeerModel:
    """Return the model of a given embedding and the common head."""
    with np.load(folder / _HEAD_FILE) as head:
        return PeerModel(embed, head["weight"], head["bias"])


def _torch(folder: Path, num_threads: int) -> Embed:
    import torch
    from trunkline_worker.backbones.catalogue import load_backbone

    torch.set_num_threads(num_threads)
    backbone = load_backbone(json.loads((folder / _BACKBONE_FILE).read_text())["name"], allow_untrained=True)
    network = backbone.reader("input", ["pooled"])

    @torch.inference_mode()
    def embed(images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        # Bytes off a connection are read-only, which torch does not accept.
        writable = images_BHWC if images_BHWC.flags.writeable else images_BHWC.copy()
        embedding_BD: npt.NDArray[np.float32] = network(torch.from_numpy(writable)).numpy()
        return embedding_BD

    return embed


def _onnx(folder: Path, num_threads: int) -> Embed:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(folder / _ONNX_FILE), options, providers=["CPUExecutionProvider"])

    def embed(images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        (embedding_BD,) = session.run([_EMBEDDING], {_IMAGES: np.ascontiguousarray(images_BHWC)})
        return np.asarray(embedding_BD, dtype=np.float32)

    return embed


# --- for servers ------------------------------------------------------------------------------------------------------


def served() -> PeerModel:
    """Load what the environment names, and run it once: the first run of a runtime is slow."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    model = load(folder, os.environ[RUNTIME_VARIABLE], int(os.environ[THREADS_VARIABLE]))
    for rows in (1, MAX_BATCH_ROWS):
        model(np.zeros((rows, *row_shape(folder)), dtype=np.uint8))
    return model


def served_shape() -> tuple[int, int, int]:
    """Return (H, W, 3) of the pictures that the environment's model takes."""
    return row_shape(Path(os.environ[FOLDER_VARIABLE]))


def port() -> int:
    """Return the port to listen on."""
    return int(os.environ[PORT_VARIABLE])


def images_of(body: bytes, shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Return the pictures in a body: their bytes one after another.

    Raises:
        ValueError: The bytes are no whole number of pictures.
    """
    return np.frombuffer(body, dtype=np.uint8).reshape(-1, *shape)


def joined(
    parts: list[npt.NDArray[np.uint8]], model: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
) -> list[npt.NDArray[np.float32]]:
    """Run several requests' pictures as one batch, and return each request's answer."""
    counts = [len(one) for one in parts]
    outputs_BK = model(parts[0] if len(parts) == 1 else np.concatenate(parts))
    return list(np.split(outputs_BK, np.cumsum(counts)[:-1]))
