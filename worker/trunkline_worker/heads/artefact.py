"""A trained head as bytes and back: safetensors with one JSON text beside the tensors. Never pickle."""

from __future__ import annotations

import json
import re
from typing import Any

import safetensors
import safetensors.torch
import torch
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.heads.config import HeadConfig
from trunkline_worker.heads.model import Head, TrainedHead

FORMAT_VERSION = 1
"""Raised when an older worker could not read, or would misread, what this one writes."""

MAX_HEADER_BYTES = 64 * 2**20
"""Largest header that is parsed: room for the most class names a dataset may have."""

# All in one entry: safetensors writes several in an order that differs from process to process.
_METADATA_KEY = "trunkline_head"
_FIELDS = {"format", "kind", "hidden", "dropout", "task", "class_names", "slices", "slice_widths", "num_outputs"}
_SHA256 = re.compile(r"[0-9a-f]{64}")


def head_path(sha256: str) -> str:
    """Return where the head of that hex SHA-256 lies in storage.

    Raises:
        WireError: INVALID_ARGUMENT if it is no hex SHA-256.
    """
    if not _SHA256.fullmatch(sha256):
        raise WireError(ErrorCode.INVALID_ARGUMENT, f"{sha256[:80]!r} is not a SHA-256 in lower-case hex")
    return f"heads/{sha256[:2]}/{sha256}.safetensors"


def head_to_bytes(head: TrainedHead) -> bytes:
    """Return the head's bytes. Equal heads give equal bytes, in any process."""
    metadata = {
        "format": FORMAT_VERSION,
        "kind": head.config.kind,
        "hidden": list(head.config.hidden),
        "dropout": head.config.dropout,
        "task": head.task,
        "class_names": list(head.class_names),
        "slices": list(head.slices),
        "slice_widths": list(head.slice_widths),
        "num_outputs": head.num_outputs,
    }
    tensors = {name: one.detach().to("cpu", torch.float32).contiguous() for name, one in head.head.state_dict().items()}
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return safetensors.torch.save(tensors, metadata={_METADATA_KEY: text})


def head_from_bytes(data: bytes) -> TrainedHead:
    """Return the head that ``head_to_bytes`` wrote, on the CPU, ready to predict.

    The caller has checked the bytes against their SHA-256; here everything inside is checked too.

    Raises:
        WireError: UNSUPPORTED for another format version, CORRUPT_DATA for anything else that is wrong.
    """
    metadata = _read_metadata(data)
    if metadata.get("format") != FORMAT_VERSION:
        version = str(metadata.get("format"))[:20]
        raise WireError(
            ErrorCode.UNSUPPORTED, f"head of format {version}; this worker reads {FORMAT_VERSION}. Upgrade the worker"
        )
    try:
        shell = _shell(metadata)
    except WireError as error:
        raise _corrupt(error.message) from error
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise _corrupt("its tensors cannot be read") from error
    _check_tensors(shell.head, tensors)
    # assign: the shell was built without memory, so the sizes that the metadata claims were never allocated.
    shell.head.load_state_dict(tensors, assign=True)
    shell.head.eval().requires_grad_(False)
    return shell


def _read_metadata(data: bytes) -> dict[str, Any]:
    """Read the JSON text out of the safetensors header: the library hands it out for files only."""
    size = int.from_bytes(data[:8], "little") if len(data) >= 8 else -1
    if not 2 <= size <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise _corrupt("its header has a wrong length")
    try:
        header = json.loads(data[8 : 8 + size])
        metadata = json.loads(header["__metadata__"][_METADATA_KEY])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _corrupt("its description cannot be read") from error
    if not isinstance(metadata, dict):
        raise _corrupt("its description is not an object")
    return metadata


def _shell(metadata: dict[str, Any]) -> TrainedHead:
    """Build the head without memory for its tensors."""
    if set(metadata) != _FIELDS:
        raise _corrupt("its description lacks fields or has unknown ones")
    if not isinstance(metadata["kind"], str) or not isinstance(metadata["task"], str):
        raise _corrupt("its kind or task is not a text")
    if type(metadata["dropout"]) not in (int, float):
        raise _corrupt("its dropout is not a number")
    hidden, widths = _integers(metadata["hidden"]), _integers(metadata["slice_widths"])
    names = _texts(metadata["class_names"]), _texts(metadata["slices"])
    (num_outputs,) = _integers([metadata["num_outputs"]])
    if num_outputs < 1 or not widths or min(widths) < 1:
        raise _corrupt("a width is below 1")
    config = HeadConfig(metadata["kind"], hidden, float(metadata["dropout"]))
    head = Head(config, sum(widths), num_outputs, device="meta")
    return TrainedHead(head, metadata["task"], names[0], names[1], widths)


def _check_tensors(head: Head, tensors: dict[str, torch.Tensor]) -> None:
    expected = {name: tuple(one.shape) for name, one in head.state_dict().items()}
    got = {name: tuple(one.shape) for name, one in tensors.items()}
    if got != expected:
        raise _corrupt("its tensors do not fit its description")
    for name, one in tensors.items():
        if one.dtype != torch.float32:
            raise _corrupt(f"tensor {name} is {one.dtype}, not float32")
        if not bool(torch.isfinite(one).all()):
            raise _corrupt(f"tensor {name} holds NaN or infinity")
    if not bool((tensors["scale"] > 0).all()):
        raise _corrupt("a column's scale is not above 0")


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(one) is int and abs(one) < 2**40 for one in values):
        raise _corrupt("a list of whole numbers was expected")
    return tuple(values)


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise _corrupt("a list of texts was expected")
    return tuple(values)


def _corrupt(what: str) -> WireError:
    return WireError(ErrorCode.CORRUPT_DATA, f"this head is damaged: {what}. Train the model again, or restore it")
