import hashlib
import json
import subprocess
import sys
from dataclasses import fields

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import HeadConfig
from trunkline_worker.heads.artefact import head_from_bytes, head_path, head_to_bytes
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head, TrainedHead


def make_head(kind: str = "linear", task: str = "classification") -> TrainedHead:
    hidden = (4,) if kind == "mlp" else ()
    inputs = (HeadInput(("blocks.4/grid", "pooled"), (4, 1)),)
    head = Head(HeadConfig(kind, hidden, dropout=0.25 if hidden else 0.0, batch_norm=bool(hidden)), inputs, 2)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    head.scale = torch.full((5,), 2.0)
    names = ("größer", "0") if task == "classification" else ()
    return TrainedHead(head.eval(), task, names)


def rewritten(**changes: object) -> bytes:
    """Return a head's bytes with parts of the description replaced; ``drop`` removes one."""
    data = head_to_bytes(make_head())
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["trunkline_head"])
    metadata.pop(changes.pop("drop", ""), None)
    metadata["config"].update(changes.pop("config", {}))  # type: ignore[call-overload]
    metadata.update(changes)
    return safetensors.torch.save(safetensors.torch.load(data), metadata={"trunkline_head": json.dumps(metadata)})


def assert_loads_or_raises_a_typed_error(data: bytes) -> None:
    try:
        head = head_from_bytes(data)
    except WireError as error:
        assert error.code in (ErrorCode.CORRUPT_DATA, ErrorCode.UNSUPPORTED)
    else:
        assert head.num_features == 5


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_head_survives_the_round_trip(kind: str, task: str) -> None:
    head = make_head(kind, task)
    back = head_from_bytes(head_to_bytes(head))
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back.predict(x), head.predict(x))
    assert (back.config, back.task, back.class_names) == (head.config, head.task, head.class_names)
    assert (back.inputs, back.num_outputs) == (head.inputs, 2)
    assert head_to_bytes(back) == head_to_bytes(head)
    assert not any(one.requires_grad for one in back.head.parameters())


def test_equal_heads_give_equal_bytes_in_another_process() -> None:
    code = (
        "import torch, hashlib\n"
        "from trunkline_worker.heads.artefact import head_to_bytes\n"
        "from trunkline_wire.heads import HeadConfig\n"
        "from trunkline_worker.heads.inputs import HeadInput\n"
        "from trunkline_worker.heads.model import Head, TrainedHead\n"
        "head = TrainedHead(Head(HeadConfig(), [HeadInput(('x', 'y'), (1, 2))], 2), 'classification', ('a', 'b'))\n"
        "print(hashlib.sha256(head_to_bytes(head)).hexdigest())"
    )
    here = TrainedHead(Head(HeadConfig(), [HeadInput(("x", "y"), (1, 2))], 2), "classification", ("a", "b"))
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == hashlib.sha256(head_to_bytes(here)).hexdigest()


def test_a_newer_format_is_unsupported_not_corrupt() -> None:
    with pytest.raises(WireError, match="format 3") as caught:
        head_from_bytes(rewritten(format=3))
    assert caught.value.code is ErrorCode.UNSUPPORTED


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"kind": "forest"}},
        {"config": {"kind": ["linear"]}},
        {"config": {"hidden": [4]}},
        {"config": {"hidden": "4"}},
        {"config": {"dropout": "0"}},
        {"config": {"dropout": True}},
        {"config": {"dropout": 10**400}},
        {"config": {"batch_norm": 1}},
        {"config": {"activation": None}},
        {"config": {"fuse": "add", "fuse_width": 1.5}},
        {"config": {"extra": 1}},
        {"task": "ranking"},
        {"task": 3},
        {"class_names": ["one"]},
        {"class_names": ["one", 2]},
        {"class_names": ["one", "one"]},
        {"inputs": []},
        {"inputs": {}},
        {"inputs": [3]},
        {"inputs": [{"slices": ["a"], "widths": [5]}]},
        {"inputs": [{"slices": ["a"], "widths": [4, 2], "map_shape": []}]},
        {"inputs": [{"slices": ["a", "b"], "widths": [4.0, 1.0], "map_shape": []}]},
        {"inputs": [{"slices": ["a", "b"], "widths": [-1, 6], "map_shape": []}]},
        {"inputs": [{"slices": ["a", "b"], "widths": [2**60, 1], "map_shape": []}]},
        {"inputs": [{"slices": ["a", "b"], "widths": [2**39, 1], "map_shape": []}]},
        {"inputs": [{"slices": ["a"], "widths": [5], "map_shape": [5, 1, 1]}]},
        {"inputs": [{"slices": ["a"], "widths": [5], "map_shape": [5, -1, -1]}]},
        {"inputs": [{"slices": ["a"], "widths": [2**39], "map_shape": []}], "num_outputs": 2**39},
        {"format": 2.0},
        {"format": True},
        {"drop": "format"},
        {"num_outputs": 3},
        {"num_outputs": 0},
        {"drop": "task"},
        {"extra": 1},
    ],
)
def test_a_description_that_does_not_fit_is_corrupt(changes: dict) -> None:
    with pytest.raises(WireError) as caught:
        head_from_bytes(rewritten(**changes))
    assert caught.value.code is ErrorCode.CORRUPT_DATA
    assert caught.value.message.count("this head is damaged") == 1


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["format", "inputs", "task", "class_names", "num_outputs"]), ANY_JSON)
def test_any_value_in_the_description_loads_or_raises_a_typed_error(name: str, value: object) -> None:
    assert_loads_or_raises_a_typed_error(rewritten(**{name: value}))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([one.name for one in fields(HeadConfig)]), ANY_JSON)
def test_any_value_in_the_config_loads_or_raises_a_typed_error(name: str, value: object) -> None:
    assert_loads_or_raises_a_typed_error(rewritten(config={name: value}))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers.0.weight", lambda one: one * float("nan")),
        ("layers.0.bias", lambda one: one + float("inf")),
        ("layers.0.weight", lambda one: one.half()),
        ("layers.0.weight", lambda one: one.T.contiguous()),
        ("scale", torch.zeros_like),
        ("scale", lambda one: None),
    ],
)
def test_tensors_that_do_not_fit_are_corrupt(name: str, change: object) -> None:
    data = head_to_bytes(make_head())
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    tensors = safetensors.torch.load(data)
    changed = change(tensors.pop(name))  # type: ignore[operator]
    if changed is not None:
        tensors[name] = changed
    with pytest.raises(WireError) as caught:
        head_from_bytes(safetensors.torch.save(tensors, metadata=metadata))
    assert caught.value.code is ErrorCode.CORRUPT_DATA


def test_a_variance_below_zero_is_corrupt() -> None:
    data = head_to_bytes(make_head("mlp"))
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    tensors = safetensors.torch.load(data)
    tensors["norms.0.running_var"] = -tensors["norms.0.running_var"]
    with pytest.raises(WireError, match="variance") as caught:
        head_from_bytes(safetensors.torch.save(tensors, metadata=metadata))
    assert caught.value.code is ErrorCode.CORRUPT_DATA


def test_a_head_of_the_first_format_is_read() -> None:
    """As it was written before heads had several inputs."""
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "layers.0.bias": (4,),
        "layers.0.weight": (4, 5),
        "layers.1.bias": (2,),
        "layers.1.weight": (2, 4),
        "mean": (5,),
        "scale": (5,),
    }
    tensors = {name: torch.rand(shape, generator=draw) + 0.5 for name, shape in shapes.items()}
    described = {
        "class_names": ["a", "b"],
        "dropout": 0.25,
        "format": 1,
        "hidden": [4],
        "kind": "mlp",
        "num_outputs": 2,
        "slice_widths": [4, 1],
        "slices": ["blocks.4.grid", "pooled"],
        "task": "classification",
    }
    head = head_from_bytes(safetensors.torch.save(tensors, metadata={"trunkline_head": json.dumps(described)}))
    x = torch.randn(3, 5, generator=draw)
    hidden = torch.relu(
        (x - tensors["mean"]) / tensors["scale"] @ tensors["layers.0.weight"].T + tensors["layers.0.bias"]
    )
    expected = (hidden @ tensors["layers.1.weight"].T + tensors["layers.1.bias"]).softmax(dim=1)
    torch.testing.assert_close(head.predict(x), expected)
    assert head.config == HeadConfig("mlp", (4,), dropout=0.25)
    described["fuse"] = "add"
    with pytest.raises(WireError) as caught:
        head_from_bytes(safetensors.torch.save(tensors, metadata={"trunkline_head": json.dumps(described)}))
    assert caught.value.code is ErrorCode.CORRUPT_DATA


def test_no_truncation_gets_through() -> None:
    data = head_to_bytes(make_head())
    for length in range(0, len(data), 7):
        with pytest.raises(WireError) as caught:
            head_from_bytes(data[:length])
        assert caught.value.code is ErrorCode.CORRUPT_DATA


@settings(max_examples=200, deadline=None)
@given(st.integers(min_value=0, max_value=10_000), st.integers(min_value=1, max_value=255))
def test_a_flipped_byte_raises_a_typed_error_or_changes_numbers_only(position: int, flip: int) -> None:
    data = bytearray(head_to_bytes(make_head("mlp")))
    data[position % len(data)] ^= flip
    assert_loads_or_raises_a_typed_error(bytes(data))


def test_paths_are_made_of_hashes_only() -> None:
    sha256 = hashlib.sha256(b"x").hexdigest()
    assert head_path(sha256) == f"heads/{sha256[:2]}/{sha256}.safetensors"
    for bad in ("../../etc", sha256.upper(), sha256[:-1], sha256 + "\n"):
        with pytest.raises(WireError):
            head_path(bad)
