"""The two messages of the Open Inference Protocol v2 that a call needs, built here: no code is generated for it.

Only the fields that are used are declared; protobuf passes over the others. Numbers as in the protocol's
``open_inference_grpc.proto``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

METHOD = "/inference.GRPCInferenceService/ModelInfer"

_TEXT, _INT64, _BYTES, _FLOAT, _MESSAGE = 9, 3, 12, 2, 11
_ONE, _MANY = 1, 3
_FIELDS: dict[str, list[tuple[str, int, int, int, str]]] = {
    "Contents": [("fp32_contents", 6, _MANY, _FLOAT, "")],
    "Tensor": [
        ("name", 1, _ONE, _TEXT, ""),
        ("datatype", 2, _ONE, _TEXT, ""),
        ("shape", 3, _MANY, _INT64, ""),
        ("contents", 5, _ONE, _MESSAGE, "Contents"),
    ],
    "Request": [
        ("model_name", 1, _ONE, _TEXT, ""),
        ("inputs", 5, _MANY, _MESSAGE, "Tensor"),
        ("raw_input_contents", 7, _MANY, _BYTES, ""),
    ],
    "Response": [("outputs", 5, _MANY, _MESSAGE, "Tensor"), ("raw_output_contents", 6, _MANY, _BYTES, "")],
}


def _messages() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="peers_oip.proto", package="peers_oip", syntax="proto3")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, label, kind, type_name in fields:
            added = message.field.add(name=field, number=number, label=label, type=kind)
            if type_name:
                added.type_name = f".peers_oip.{type_name}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"peers_oip.{name}")) for name in _FIELDS}


_MESSAGES = _messages()


def request(model: str, images_BHWC: npt.NDArray[np.uint8]) -> bytes:
    """Return a ``ModelInferRequest`` with each row as one element of type BYTES in ``raw_input_contents``."""
    message = _MESSAGES["Request"](model_name=model)
    message.inputs.add(name="images", datatype="BYTES", shape=[len(images_BHWC), 1])
    rows = [one.tobytes() for one in images_BHWC]
    message.raw_input_contents.append(b"".join(len(row).to_bytes(4, "little") + row for row in rows))
    data: bytes = message.SerializeToString()
    return data


def outputs(response: bytes) -> npt.NDArray[np.float32]:
    """Return the first output of a ``ModelInferResponse`` of type FP32."""
    message = _MESSAGES["Response"].FromString(response)
    first = message.outputs[0]
    raw = message.raw_output_contents
    values = np.frombuffer(raw[0], dtype="<f4") if raw else np.array(first.contents.fp32_contents, dtype=np.float32)
    return values.reshape(tuple(first.shape)).astype(np.float32)
