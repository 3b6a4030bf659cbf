"""What an ONNX file must be before the worker runs it or hands it to anyone, see ``trunkline_wire.onnx_check``."""

from __future__ import annotations

import onnx
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_STEM_BYTES
from trunkline_wire.onnx_check import check_onnx_file


def check_onnx(data: bytes, max_bytes: int = MAX_STEM_BYTES) -> onnx.ModelProto:
    """Check a file before it is given to a runtime, as clients do when it reaches them.

    Returns:
        The parsed file.

    Raises:
        WireError: PAYLOAD_TOO_LARGE, CORRUPT_DATA, or UNSUPPORTED for what is refused.
    """
    check_onnx_file(data, max_bytes)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # the parser's own error type belongs to protobuf
        raise WireError(ErrorCode.CORRUPT_DATA, "not an ONNX file") from error
    return model
