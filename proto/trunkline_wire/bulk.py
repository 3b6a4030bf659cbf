"""Messages whose large tensor stays outside of protobuf, which would copy it twice on either side.

On the wire nothing is different. Who writes appends the tensor's bytes behind the rest of the message: protobuf merges
the parts of a submessage, so every reader understands it. Who reads finds the bytes where they lie and has protobuf
parse the rest; whatever looks odd is left to protobuf as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from trunkline_wire.v1 import inference_pb2

M = TypeVar("M", bound=Message)

LEAST_BYTES = 32 * 1024
"""Messages below this size are parsed as they are: copying so little costs less than looking."""

_MOST_FIELDS = 256
"""Fields that are looked at before protobuf takes over: it reads a crafted message of millions much faster."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Apart(Generic[M]):
    """A message, and the data of its large tensor beside it.

    Attributes:
        message: Everything else.
        data: What belongs into the tensor's ``data``. None: it is in the message.
    """

    message: M
    data: memoryview | None = None

    def ByteSize(self) -> int:  # noqa: N802  # as messages call it
        """Return the bytes of the message and of what belongs into it, about."""
        return self.message.ByteSize() + (0 if self.data is None else self.data.nbytes)

    def WhichOneof(self, oneof_group: str) -> str | None:  # noqa: N802  # as messages call it
        """Return which field of a group is set."""
        which: str | None = self.message.WhichOneof(oneof_group)
        return which

    @property
    def seq(self) -> int:
        """The number of a message of a stream."""
        number: int = self.message.seq  # type: ignore[attr-defined]
        return number

    @property
    def end(self) -> Any:
        """The end message of a stream."""
        return self.message.end  # type: ignore[attr-defined]

    @property
    def error(self) -> Any:
        """The error in a message of a stream."""
        return self.message.error  # type: ignore[attr-defined]

    def part(self, name: str) -> Apart[Any]:
        """Return the submessage that has the large tensor."""
        return Apart(getattr(self.message, name), self.data)


_PATHS: dict[type[Message], tuple[str, ...]] = {
    inference_pb2.PredictRequest: ("features", "data"),
    inference_pb2.StreamPredictRequest: ("predict", "features", "data"),
    inference_pb2.ExtractRequest: ("features", "data"),
    inference_pb2.StreamExtractRequest: ("extract", "features", "data"),
    inference_pb2.ExtractResponse: ("embedding", "data"),
    inference_pb2.StreamExtractResponse: ("result", "embedding", "data"),
}
"""Where the large tensor's bytes lie."""


def has_large_tensor(kind: type[Message]) -> bool:
    """Whether there is a writer and a reader for messages of a type."""
    return kind in _PATHS


def writer(kind: type[M]) -> Callable[[Apart[M] | M], bytes]:
    """Return the serializer of a message, which takes it whole or apart.

    Raises:
        ValueError: The message has no large tensor.
    """
    numbers = _numbers(kind)

    def write(given: Apart[M] | M) -> bytes:
        if not isinstance(given, Apart):
            return given.SerializeToString()
        head = given.message.SerializeToString()
        if given.data is None:
            return head
        parts: list[bytes | memoryview] = [given.data]
        size = given.data.nbytes
        for number in reversed(numbers):
            start = _tag(number) + _to_varint(size)
            parts.insert(0, start)
            size += len(start)
        return b"".join([head, *parts])

    return write


def reader(kind: type[M]) -> Callable[[bytes], Apart[M]]:
    """Return the deserializer of a message.

    Raises:
        ValueError: The message has no large tensor.
    """
    tags = tuple(number << 3 | _LENGTH for number in _numbers(kind))

    def read(data: bytes) -> Apart[M]:
        if len(data) >= LEAST_BYTES:
            try:
                rest, found = _Scan(data).split(0, len(data), tags)
            except _OddError:
                found = None
            if found is not None:
                return Apart(kind.FromString(b"".join(rest)), memoryview(data)[found[0] : found[1]])
        return Apart(kind.FromString(data))

    return read


def _numbers(kind: type[Message]) -> tuple[int, ...]:
    if not has_large_tensor(kind):
        raise ValueError(f"{kind.__name__} has no large tensor")
    numbers, descriptor = [], kind.DESCRIPTOR
    for name in _PATHS[kind]:
        field: Any = descriptor.fields_by_name[name]
        numbers.append(field.number)
        descriptor = field.message_type
    return tuple(numbers)


class _OddError(Exception):
    """The message is not worth taking apart, or damaged: protobuf says which."""


class _Scan:
    """Finds one field of bytes in a serialized message."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._fields_left = _MOST_FIELDS

    def split(self, start: int, stop: int, tags: Sequence[int]) -> tuple[list[bytes], tuple[int, int] | None]:
        """Return everything but the field at the end of a path of tags, and where that field's bytes lie."""
        data, rest = self._data, []
        found: tuple[int, int] | None = None
        position = kept = start
        while position < stop:
            self._fields_left -= 1
            if self._fields_left < 0:
                raise _OddError
            tag, body = self._varint(position, stop)
            end = self._end(tag, body, stop)
            if tag == tags[0]:
                _, body = self._varint(body, stop)
                inner, here = ([], (body, end)) if len(tags) == 1 else self.split(body, end, tags[1:])
                if here is not None:
                    if found is not None:  # protobuf takes the last one
                        raise _OddError
                    found = here
                    rest.append(data[kept:position])
                    if len(tags) > 1:
                        content = b"".join(inner)
                        rest += [_to_varint(tag), _to_varint(len(content)), content]
                    kept = end
            position = end
        rest.append(data[kept:stop])
        return rest, found

    def _end(self, tag: int, body: int, stop: int) -> int:
        """Return where a field ends whose content begins at ``body``."""
        wire = tag & 7
        if wire == _VARINT:
            _, end = self._varint(body, stop)
        elif wire == _LENGTH:
            length, after = self._varint(body, stop)
            end = after + length
        elif wire in (_FIXED64, _FIXED32):
            end = body + (8 if wire == _FIXED64 else 4)
        else:
            raise _OddError
        if end > stop:
            raise _OddError
        return end

    def _varint(self, position: int, stop: int) -> tuple[int, int]:
        value = shift = 0
        while position < stop and shift < 64:
            byte = self._data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
        raise _OddError


def _tag(number: int) -> bytes:
    return _to_varint(number << 3 | _LENGTH)


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
