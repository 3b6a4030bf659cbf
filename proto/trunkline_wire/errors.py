"""Every way a call can fail, and the one table from error code to gRPC status.

The text of an error that leaves the cluster is always ``[CODE] public message (request id)``.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass


class ErrorCode(enum.Enum):
    """What went wrong. Values are those of ``trunkline_wire.v1.ErrorCode``."""

    INVALID_ARGUMENT = 1
    SHAPE_MISMATCH = 2
    DTYPE_MISMATCH = 3
    NOT_FINITE = 4
    EMPTY_BATCH = 5
    PAYLOAD_TOO_LARGE = 6
    CORRUPT_IMAGE = 7
    CORRUPT_DATA = 8
    BAD_LABELS = 9
    NOT_FOUND = 10
    ALREADY_EXISTS = 11
    INCOMPATIBLE = 12
    JOB_STATE = 13
    OVERLOADED = 14
    WORKER_OOM = 15
    UNAVAILABLE = 16
    DEADLINE_EXCEEDED = 17
    CANCELLED = 18
    UNAUTHENTICATED = 19
    PERMISSION_DENIED = 20
    UNSUPPORTED = 21
    STORAGE_FULL = 22
    INTERNAL = 23


STATUS_BY_CODE: dict[ErrorCode, str] = {
    ErrorCode.INVALID_ARGUMENT: "INVALID_ARGUMENT",
    ErrorCode.SHAPE_MISMATCH: "INVALID_ARGUMENT",
    ErrorCode.DTYPE_MISMATCH: "INVALID_ARGUMENT",
    ErrorCode.NOT_FINITE: "INVALID_ARGUMENT",
    ErrorCode.EMPTY_BATCH: "INVALID_ARGUMENT",
    ErrorCode.PAYLOAD_TOO_LARGE: "INVALID_ARGUMENT",
    ErrorCode.CORRUPT_IMAGE: "INVALID_ARGUMENT",
    ErrorCode.CORRUPT_DATA: "DATA_LOSS",
    ErrorCode.BAD_LABELS: "INVALID_ARGUMENT",
    ErrorCode.NOT_FOUND: "NOT_FOUND",
    ErrorCode.ALREADY_EXISTS: "ALREADY_EXISTS",
    ErrorCode.INCOMPATIBLE: "FAILED_PRECONDITION",
    ErrorCode.JOB_STATE: "FAILED_PRECONDITION",
    ErrorCode.OVERLOADED: "RESOURCE_EXHAUSTED",
    ErrorCode.WORKER_OOM: "RESOURCE_EXHAUSTED",
    ErrorCode.UNAVAILABLE: "UNAVAILABLE",
    ErrorCode.DEADLINE_EXCEEDED: "DEADLINE_EXCEEDED",
    ErrorCode.CANCELLED: "CANCELLED",
    ErrorCode.UNAUTHENTICATED: "UNAUTHENTICATED",
    ErrorCode.PERMISSION_DENIED: "PERMISSION_DENIED",
    ErrorCode.UNSUPPORTED: "UNIMPLEMENTED",
    ErrorCode.STORAGE_FULL: "RESOURCE_EXHAUSTED",
    ErrorCode.INTERNAL: "INTERNAL",
}
"""Error code to the name of its gRPC status. Total: a test compares its keys with ``ErrorCode``."""

RETRYABLE_CODES = frozenset({ErrorCode.OVERLOADED, ErrorCode.UNAVAILABLE})
"""Codes after which the same call may succeed without a change by the caller."""

RETRY_DELAY_METADATA = "grpc-retry-pushback-ms"
"""Trailing metadata that carries the delay, in milliseconds: gRPC's own name, so its retry policy honours it."""

REQUEST_ID_METADATA = "trunkline-request-id"
"""Metadata that carries the request id, sent by the client and repeated in errors."""


class WireError(Exception):
    """An error whose message may be shown to the caller.

    Raised anywhere in the worker and in this package; the boundary turns it into a gRPC status.
    """

    def __init__(self, code: ErrorCode, message: str, *, retry_delay_s: float = 0.0) -> None:
        """Keep the code, the public message and how long to wait before another try, in seconds."""
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.retry_delay_s = retry_delay_s

    def __str__(self) -> str:
        """Return ``[CODE] message``."""
        return f"[{self.code.name}] {self.message}"

    def __reduce__(self) -> tuple[object, ...]:
        """Survive a trip between processes with the keyword argument."""
        return (_rebuild, (self.code, self.message, self.retry_delay_s))


def _rebuild(code: ErrorCode, message: str, retry_delay_s: float) -> WireError:
    return WireError(code, message, retry_delay_s=retry_delay_s)


@dataclass(frozen=True)
class ParsedDetails:
    """The parts of an error text that crossed the wire."""

    code: ErrorCode | None
    message: str
    request_id: str


_DETAILS = re.compile(r"^\[(?P<code>[A-Z_]+)\] (?P<message>.*?)(?: \(request (?P<request_id>[\w-]+)\))?\Z", re.DOTALL)


def format_details(error: WireError, request_id: str) -> str:
    """Return the text that goes into the status details."""
    return f"[{error.code.name}] {error.message} (request {request_id})"


def parse_details(details: str) -> ParsedDetails:
    """Take an error text apart. ``code`` is None where the text is not one of ours."""
    match = _DETAILS.match(details or "")
    if match is None or match["code"] not in ErrorCode.__members__:
        return ParsedDetails(None, details or "", "")
    return ParsedDetails(ErrorCode[match["code"]], match["message"], match["request_id"] or "")
