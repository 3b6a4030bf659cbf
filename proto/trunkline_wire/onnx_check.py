"""What an ONNX file must be before it is run or handed to anyone: self-contained, standard operators, bounded.

Reads protobuf's wire format itself: neither protobuf nor the ``onnx`` package is needed, nothing is built in memory,
and how deep a file goes, and into how many parts, is bounded before a parser sees it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from trunkline_wire.errors import ErrorCode, WireError

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
"""Operators of other domains need libraries that the reader would have to load."""

MAX_DEPTH = 60
"""Messages within messages: a graph inside an operator of another takes three. Parsers allow 100."""

MAX_FIELDS = 1_000_000
"""Fields of all messages together. A network of thousands of operators has a tenth of it."""


def check_onnx_file(data: bytes, max_bytes: int) -> None:
    """Check a file before it is given to a runtime or to a parser.

    Refused are files over the size, files that name other files, operators of other domains, functions and training
    graphs of the file's own, and what is not a well-formed message of the ONNX schema.

    Raises:
        WireError: PAYLOAD_TOO_LARGE, CORRUPT_DATA, or UNSUPPORTED for what is refused.
    """
    if len(data) > max_bytes:
        raise WireError(ErrorCode.PAYLOAD_TOO_LARGE, f"ONNX file of {len(data)} bytes; at most {max_bytes}")
    try:
        found = _Walk(data)
        found.message("Model", [(0, len(data))])
    except _MalformedError as error:
        raise WireError(ErrorCode.CORRUPT_DATA, f"not an ONNX file: {error}") from None
    if not found.has_nodes:
        raise WireError(ErrorCode.CORRUPT_DATA, "not an ONNX file, or one without operators")
    strange = sorted(one.decode(errors="replace") for one in found.domains - _STANDARD)
    if strange:
        raise WireError(
            ErrorCode.UNSUPPORTED, f"ONNX file with operators of other domains: {', '.join(strange)[:200]!r}"
        )
    if found.has_code:
        raise WireError(ErrorCode.UNSUPPORTED, "ONNX file with functions or a training graph of its own")
    if found.is_external:
        raise WireError(ErrorCode.UNSUPPORTED, "ONNX file whose weights lie in other files")


class _MalformedError(Exception):
    pass


# A message that arrives in several pieces is their concatenation: so protobuf merges fields that may occur only once.
_Spans = list[tuple[int, int]]


class _Inner(NamedTuple):
    """A field that holds a message, of a type by its name in the schema."""

    kind: str
    repeated: bool = False


class _Packed(NamedTuple):
    """A field of numbers that may lie one after another: varints, or numbers of so many bytes."""

    width: int


_VARINTS = _Packed(0)
_ENTRY = _Inner("StringStringEntry", True)

# Fields of messages that hold other messages or many numbers, by number, as in onnx.proto. The others are text, bytes
# or single numbers.
_SCHEMA: dict[str, dict[int, _Inner | _Packed]] = {
    "Model": {
        7: _Inner("Graph"),
        8: _Inner("OperatorSetId", True),
        14: _ENTRY,
        20: _Inner("TrainingInfo", True),
        25: _Inner("Function", True),
        26: _Inner("DeviceConfiguration", True),
    },
    "Graph": {
        1: _Inner("Node", True),
        5: _Inner("Tensor", True),
        11: _Inner("ValueInfo", True),
        12: _Inner("ValueInfo", True),
        13: _Inner("ValueInfo", True),
        14: _Inner("TensorAnnotation", True),
        15: _Inner("SparseTensor", True),
        16: _ENTRY,
    },
    "Node": {5: _Inner("Attribute", True), 9: _ENTRY, 10: _Inner("NodeDeviceConfiguration", True)},
    "Attribute": {
        5: _Inner("Tensor"),
        6: _Inner("Graph"),
        7: _Packed(4),
        8: _VARINTS,
        10: _Inner("Tensor", True),
        11: _Inner("Graph", True),
        14: _Inner("Type"),
        15: _Inner("Type", True),
        22: _Inner("SparseTensor"),
        23: _Inner("SparseTensor", True),
    },
    "Tensor": {
        1: _VARINTS,
        3: _Inner("Segment"),
        4: _Packed(4),
        5: _VARINTS,
        7: _VARINTS,
        10: _Packed(8),
        11: _VARINTS,
        13: _ENTRY,
        16: _ENTRY,
    },
    "SparseTensor": {1: _Inner("Tensor"), 2: _Inner("Tensor"), 3: _VARINTS},
    "ValueInfo": {2: _Inner("Type"), 4: _ENTRY},
    "Type": {
        1: _Inner("TypeTensor"),
        4: _Inner("TypeSequence"),
        5: _Inner("TypeMap"),
        7: _Inner("Leaf"),
        8: _Inner("TypeTensor"),
        9: _Inner("TypeSequence"),
    },
    "TypeTensor": {2: _Inner("TensorShape")},
    "TypeSequence": {1: _Inner("Type")},
    "TypeMap": {2: _Inner("Type")},
    "TensorShape": {1: _Inner("Leaf", True)},
    "TensorAnnotation": {2: _ENTRY},
    "TrainingInfo": {1: _Inner("Graph"), 2: _Inner("Graph"), 3: _ENTRY, 4: _ENTRY},
    "Function": {
        7: _Inner("Node", True),
        9: _Inner("OperatorSetId", True),
        11: _Inner("Attribute", True),
        12: _Inner("ValueInfo", True),
        14: _ENTRY,
    },
    "NodeDeviceConfiguration": {2: _Inner("ShardingSpec", True)},
    "ShardingSpec": {2: _VARINTS, 3: _Inner("IntIntListEntry", True), 4: _Inner("ShardedDim", True)},
    "ShardedDim": {2: _Inner("Leaf", True)},
    "IntIntListEntry": {2: _VARINTS},
}

_DOMAIN = {"Node": 7, "OperatorSetId": 1}
_CODE = ("TrainingInfo", "Function")
_NODE = 1
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_HERE, _EXTERNAL = 0, 1
_STANDARD = frozenset(one.encode() for one in STANDARD_DOMAINS)
_TOO_LONG = re.compile(rb"[\x80-\xff]{10}")

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_WIDTH = {_FIXED64: 8, _FIXED32: 4}


@dataclass
class _Walk:
    """Goes through every message of a file, and keeps what was found."""

    data: bytes
    num_fields: int = 0
    domains: set[bytes] = field(default_factory=set)
    has_nodes: bool = False
    has_code: bool = False
    is_external: bool = False

    def message(self, kind: str, spans: _Spans, depth: int = 1) -> None:
        if depth > MAX_DEPTH:
            raise WireError(ErrorCode.UNSUPPORTED, f"ONNX file with more than {MAX_DEPTH} messages within messages")
        schema = _SCHEMA.get(kind, {})
        once: dict[tuple[int, str], _Spans] = {}
        domain = b""
        location = _HERE
        for number, wire, start, end in _fields(self.data, spans):
            self.num_fields += 1
            if self.num_fields > MAX_FIELDS:
                raise WireError(ErrorCode.UNSUPPORTED, f"ONNX file of more than {MAX_FIELDS} parts")
            if wire == _BYTES:
                inner = schema.get(number)
                if isinstance(inner, _Packed):
                    _check_packed_numbers(self.data, start, end, inner.width)
                elif inner is not None and inner.repeated:
                    self.message(inner.kind, [(start, end)], depth + 1)
                elif inner is not None:
                    once.setdefault((number, inner.kind), []).append((start, end))
                if number == _DOMAIN.get(kind):
                    domain = self.data[start:end]  # of several the last one counts
                self.has_nodes |= kind == "Graph" and number == _NODE and depth == 2
                self.is_external |= kind == "Tensor" and number == _EXTERNAL_DATA
            elif wire == _VARINT and kind == "Tensor" and number == _DATA_LOCATION:
                value = _varint(self.data, start, end)[0] & 0xFFFFFFFF
                location = value if value in (_HERE, _EXTERNAL) else location  # a parser ignores what is not listed
        for (_, inner_kind), pieces in once.items():
            self.message(inner_kind, pieces, depth + 1)
        if kind in _DOMAIN:
            self.domains.add(domain)
        self.has_code |= kind in _CODE
        self.is_external |= location == _EXTERNAL


def _fields(data: bytes, spans: _Spans) -> Iterator[tuple[int, int, int, int]]:
    """Yield number, wire type, start and end of every field of a message."""
    for start, stop in spans:
        position = start
        while position < stop:
            tag, position = _varint(data, position, min(stop, position + 5))
            number, wire = tag >> 3, tag & 7
            if not 0 < number < 2**29:
                raise _MalformedError(f"field number {number}")
            begin = position
            if wire == _BYTES:
                length, begin = _varint(data, position, min(stop, position + 5))
                position = begin + length
            elif wire == _VARINT:
                _, position = _varint(data, position, min(stop, position + 10))
            elif wire in _FIXED_WIDTH:
                position += _FIXED_WIDTH[wire]
            else:  # groups among them: ONNX has none
                raise _MalformedError(f"wire type {wire}")
            if position > stop:
                raise _MalformedError("it ends early")
            yield number, wire, begin, position


def _varint(data: bytes, position: int, stop: int) -> tuple[int, int]:
    """Return a number of 7 bits a byte, the lowest first, and the position behind it."""
    value = 0
    for shift, byte in enumerate(data[position:stop]):
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value, position + shift + 1
    raise _MalformedError("it ends early, or a number is too long")


def _check_packed_numbers(data: bytes, start: int, end: int, width: int) -> None:
    if width:
        whole = (end - start) % width == 0
    else:
        whole = start == end or (data[end - 1] < 0x80 and _TOO_LONG.search(data, start, end) is None)
    if not whole:
        raise _MalformedError("a list of numbers ends early")
