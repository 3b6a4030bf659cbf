"""The protos themselves: naming, conversions, and the runtime that reads them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.internal import api_implementation
from trunkline_wire import messages
from trunkline_wire.errors import ErrorCode
from trunkline_wire.limits import MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES
from trunkline_wire.specs import BackboneSpec, CutSpec, FeatureSpace, Preprocessing, SliceSpec, Timings
from trunkline_wire.v1 import (
    catalog_pb2,
    dataset_pb2,
    error_pb2,
    inference_pb2,
    registry_pb2,
    tensor_pb2,
    training_pb2,
    trunk_pb2,
)

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = [
    m.DESCRIPTOR
    for m in (catalog_pb2, dataset_pb2, error_pb2, inference_pb2, registry_pb2, tensor_pb2, training_pb2, trunk_pb2)
]
METHODS = [method for file in FILES for service in file.services_by_name.values() for method in service.methods]


def test_the_fast_and_bounded_parser_is_in_use() -> None:
    assert api_implementation.Type() == "upb"


def test_every_proto_is_listed_here() -> None:
    assert {Path(file.name).name for file in FILES} == {path.name for path in (ROOT / "proto").rglob("*.proto")}
    assert len(METHODS) >= 20


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_every_rpc_has_messages_of_its_own(method) -> None:
    assert method.containing_service.name.endswith("Service")
    assert method.input_type.name == f"{method.name}Request"
    assert method.output_type.name == f"{method.name}Response"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_streams_count_their_messages_and_end_explicitly(method) -> None:
    for message, streams in (
        (method.input_type, method.client_streaming),
        (method.output_type, method.server_streaming),
    ):
        if streams:
            assert message.fields_by_name["seq"].number == 1
            assert message.fields_by_name["end"].message_type.name == "EndOfStream"
            assert message.fields_by_name["end"].containing_oneof.name == "kind"
    if method.client_streaming and method.server_streaming:
        assert method.output_type.fields_by_name["error"].message_type.name == "Error"


def test_mutations_carry_an_idempotency_key() -> None:
    for request in (dataset_pb2.CommitDatasetRequest, training_pb2.SubmitJobRequest):
        assert "idempotency_key" in request.DESCRIPTOR.fields_by_name


def test_buf_finds_nothing_and_would_find_a_wrong_name(tmp_path: Path) -> None:
    buf = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
    assert buf, "buf-bin is part of the extra `dev`"
    assert subprocess.run([buf, "lint"], cwd=ROOT, check=False).returncode == 0
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(ROOT / "proto", tmp_path / "proto", ignore=shutil.ignore_patterns("*.py", "*.pyi"))
    path = tmp_path / "proto/trunkline_wire/v1/registry.proto"
    path.write_text(path.read_text().replace("ListModelsRequest", "ModelsQuery"))
    found = subprocess.run([buf, "lint"], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert found.returncode != 0
    assert "RPC_REQUEST_STANDARD_NAME" in found.stdout + found.stderr or "ListModelsRequest" in found.stdout


SPEC = BackboneSpec(
    name="net",
    pretrained=True,
    weights="from somewhere",
    weights_sha256="a" * 64,
    num_parameters=2**40,
    preprocessing=Preprocessing(96, 0.875, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    resizable=True,
    cuts=(CutSpec("input", (3, 96, 96), "b" * 64, ("s",)), CutSpec("late", (7,), "c" * 64, ())),
    slices=(SliceSpec("s", 0, 4), SliceSpec("t", 4, 9)),
    embedding_fingerprint="d" * 64,
    runtime="onnxruntime",
    device="cpu",
    runtime_error=1e-3,
)


def test_descriptions_survive_the_wire() -> None:
    message = catalog_pb2.Backbone.FromString(messages.backbone_to_proto(SPEC).SerializeToString())
    assert messages.backbone_from_proto(message) == SPEC
    space = FeatureSpace("net", "late", 96, "c" * 64)
    assert SPEC.space(SPEC.cuts[1]) == space
    assert messages.space_from_proto(messages.space_to_proto(space)) == space
    timings = Timings(0.1, 0.2, 0.3, 0.4, 1.0)
    assert messages.timings_from_proto(messages.timings_to_proto(timings)) == timings
    assert SPEC.cut("late") == SPEC.cuts[1]
    assert SPEC.cut("nowhere") is None
    assert SPEC.slices[1].width == 5


def test_room_is_left_in_a_message_for_what_is_not_the_tensor() -> None:
    # A dataset's worst row: the space, an id and a checksum beside each tensor.
    assert MAX_PAYLOAD_BYTES + 4096 * (32 + 4) + 4096 < MAX_MESSAGE_BYTES


def test_every_code_has_a_number_on_the_wire() -> None:
    assert {code.value for code in ErrorCode} == {number for number in error_pb2.ErrorCode.values() if number}
