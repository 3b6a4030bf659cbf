"""A trained head as bytes and back: safetensors with one JSON text beside the tensors. Never pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import TAIL, HeadConfig, invalid

from trunkline_worker.heads.inputs import HeadInput, TailModule
from trunkline_worker.heads.model import Head, TrainedHead

MakeTail = Callable[[HeadConfig], nn.Module]
"""Makes the blocks that a tail is trained from, as ``Backbone.tail`` does."""

FORMAT_VERSION = 2
"""Raised when an older worker could not read, or would misread, what this one writes. Version 1, whose heads have one
input, is read as well."""

MAX_HEADER_BYTES = 64 * 2**20
"""Largest header that is parsed: room for the most class names a dataset may have."""

# All in one entry: safetensors writes several in an order that differs from process to process.
_METADATA_KEY = "trunkline_head"
_FIELDS = {"format", "config", "inputs", "task", "class_names", "num_outputs"}
_FIELDS_1 = {"format", "kind", "hidden", "dropout", "task", "class_names", "slices", "slice_widths", "num_outputs"}
_OF_TAILS = frozenset({"slices", "lora_rank"})
_TAIL = "tail."
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
        "config": _described(head.config),
        "inputs": [asdict(one) for one in head.inputs],
        "task": head.task,
        "class_names": list(head.class_names),
        "num_outputs": head.head.output.out_features,
    }
    tensors = {name: one.detach().to("cpu", torch.float32).contiguous() for name, one in own_state(head.head).items()}
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return safetensors.torch.save(tensors, metadata={_METADATA_KEY: text})


def own_state(head: Head) -> dict[str, Tensor]:
    """Return the tensors that a head is kept by: of a tail only those that tell it from the backbone."""
    own = None if head.tail is None else cast(TailModule, head.tail).own_names
    return {
        name: one
        for name, one in head.state_dict().items()
        if own is None or not name.startswith(_TAIL) or name.removeprefix(_TAIL) in own
    }


def load_own_state(head: Head, tensors: Mapping[str, Tensor], otherwise: WireError) -> None:
    """Copy tensors, named as ``own_state`` names them, into a head.

    Raises:
        WireError: ``otherwise``, where they are not those of such a head.
    """
    own = own_state(head)
    if set(own) != set(tensors):
        raise otherwise
    with torch.no_grad():
        for name, one in own.items():
            one.copy_(tensors[name])


def head_from_bytes(data: bytes, *, make_tail: MakeTail | None = None) -> TrainedHead:
    """Return the head that ``head_to_bytes`` wrote, on the CPU, ready to predict.

    The caller has checked the bytes against their SHA-256; here everything inside is checked too.

    Args:
        data: The bytes.
        make_tail: Makes the blocks of a tail as they are in the backbone. None: heads of that kind cannot be read.

    Raises:
        WireError: UNSUPPORTED for another format version, or a tail where there is no backbone; CORRUPT_DATA for
            anything else that is wrong.
    """
    metadata = _read_metadata(data)
    version = metadata.get("format")
    if type(version) is not int:
        raise _corrupt("its format is not a whole number")
    if version == 1:
        metadata = _from_1(metadata)
    elif version != FORMAT_VERSION:
        raise WireError(
            ErrorCode.UNSUPPORTED,
            f"head of format {str(version)[:20]}; this worker reads up to {FORMAT_VERSION}. Upgrade the worker",
        )
    try:
        shell = _shell(metadata, make_tail)
    except WireError as error:
        if error.code is ErrorCode.UNSUPPORTED:
            raise
        raise _corrupt(error.message) from error
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise _corrupt("its tensors cannot be read") from error
    _check_tensors(shell.head, tensors)
    state = shell.head.state_dict()
    state.update(tensors)
    # assign: the shell was built without memory, so the sizes that the metadata claims were never allocated.
    shell.head.load_state_dict(state, assign=True)
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


def _from_1(old: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a head of version 1 as version 2 writes it."""
    if set(old) != _FIELDS_1:
        raise _corrupt("its description lacks fields or has unknown ones")
    config = {**_described(HeadConfig()), "channels": [], **{name: old[name] for name in ("kind", "hidden", "dropout")}}
    only_input = {"slices": old["slices"], "widths": old["slice_widths"], "map_shape": []}
    kept = {name: old[name] for name in ("task", "class_names", "num_outputs")}
    return {"format": FORMAT_VERSION, "config": config, "inputs": [only_input], **kept}


def _shell(metadata: dict[str, Any], make_tail: MakeTail | None) -> TrainedHead:
    """Build the head without memory for its tensors; the blocks of a tail are those of the backbone."""
    _check_fields(metadata, _FIELDS)
    (num_outputs,) = _integers([metadata["num_outputs"]])
    if num_outputs < 1 or not isinstance(metadata["inputs"], list):
        raise invalid("it has no outputs or no inputs")
    if not isinstance(metadata["task"], str):
        raise invalid("its task is not a text")
    inputs = [_input(one) for one in metadata["inputs"]]
    config = _config(metadata["config"])
    tail = None
    if config.kind == TAIL:
        if make_tail is None:
            raise WireError(ErrorCode.UNSUPPORTED, "a fine-tuned model runs on its own backbone, which is not here")
        tail = make_tail(config)
    try:
        head = Head(config, inputs, num_outputs, device="meta", tail=tail)
    except RuntimeError as error:  # torch, on a tensor whose bytes it cannot count
        raise invalid("it claims sizes that no tensor has") from error
    return TrainedHead(head, metadata["task"], _texts(metadata["class_names"]))


def _described(config: HeadConfig) -> dict[str, Any]:
    """Return what a file says of a head. What came with tails is said of tails alone: others keep their bytes."""
    values = asdict(config)
    return values if config.kind == TAIL else {name: one for name, one in values.items() if name not in _OF_TAILS}


def _config(values: Any) -> HeadConfig:
    if isinstance(values, dict) and values.get("kind") != TAIL:
        values = {"slices": [], "lora_rank": 0, **values}
    _check_fields(values, {one.name for one in fields(HeadConfig)})
    if type(values["dropout"]) not in (int, float) or type(values["batch_norm"]) is not bool:
        raise invalid("its dropout or batch normalisation is of a wrong type")
    if not all(isinstance(values[name], str) for name in ("kind", "activation", "tap", "fuse")):
        raise invalid("a text was expected")
    fuse_width, lora_rank = _integers([values["fuse_width"], values["lora_rank"]])
    return HeadConfig(
        kind=values["kind"],
        hidden=_integers(values["hidden"]),
        activation=values["activation"],
        batch_norm=values["batch_norm"],
        dropout=values["dropout"],
        channels=_integers(values["channels"]),
        tap=values["tap"],
        fuse=values["fuse"],
        fuse_width=fuse_width,
        slices=_texts(values["slices"]),
        lora_rank=lora_rank,
    )


def _input(values: Any) -> HeadInput:
    _check_fields(values, {one.name for one in fields(HeadInput)})
    shape = _integers(values["map_shape"])
    if shape and min(shape) < 1:
        raise invalid("a map without places")
    return HeadInput(_texts(values["slices"]), _integers(values["widths"]), shape)


def _check_fields(values: Any, expected: set[str]) -> None:
    if not isinstance(values, dict) or set(values) != expected:
        raise invalid("its description lacks fields or has unknown ones")


def _check_tensors(head: Head, tensors: dict[str, torch.Tensor]) -> None:
    expected = {name: tuple(one.shape) for name, one in own_state(head).items()}
    got = {name: tuple(one.shape) for name, one in tensors.items()}
    if got != expected:
        raise _corrupt("its tensors do not fit its description")
    for name, one in tensors.items():
        if one.dtype != torch.float32:
            raise _corrupt(f"tensor {name} is {one.dtype}, not float32")
        if not bool(torch.isfinite(one).all()):
            raise _corrupt(f"tensor {name} holds NaN or infinity")
        if name.endswith("running_var") and not bool((one >= 0).all()):
            raise _corrupt(f"tensor {name} holds a variance below 0")
    if not bool((tensors["scale"] > 0).all()):
        raise _corrupt("a column's scale is not above 0")


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(one) is int and abs(one) < 2**40 for one in values):
        raise invalid("a list of whole numbers was expected")
    return tuple(values)


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise invalid("a list of texts was expected")
    return tuple(values)


def _corrupt(what: str) -> WireError:
    return WireError(ErrorCode.CORRUPT_DATA, f"this head is damaged: {what}. Train the model again, or restore it")
