"""From the status of a failed call to the exception a caller sees. One total table, no gRPC types."""

from __future__ import annotations

from trunkline_wire.errors import RETRYABLE_CODES, WireError, parse_details

from trunkline.errors import (
    AlreadyExistsError,
    AuthenticationError,
    CallCancelledError,
    CorruptDataError,
    DeadlineExceededError,
    IncompatibleModelError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    PermissionDeniedError,
    ServiceUnavailableError,
    TlsError,
    TrunklineError,
    UnsupportedError,
    from_wire,
)

EXCEPTION_BY_STATUS: dict[str, type[TrunklineError]] = {
    "CANCELLED": CallCancelledError,
    "UNKNOWN": InternalError,
    "INVALID_ARGUMENT": InvalidArgumentError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "NOT_FOUND": NotFoundError,
    "ALREADY_EXISTS": AlreadyExistsError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "RESOURCE_EXHAUSTED": OverloadedError,
    "FAILED_PRECONDITION": IncompatibleModelError,
    "ABORTED": ServiceUnavailableError,
    "OUT_OF_RANGE": InvalidArgumentError,
    "UNIMPLEMENTED": UnsupportedError,
    "INTERNAL": InternalError,
    "UNAVAILABLE": ServiceUnavailableError,
    "DATA_LOSS": CorruptDataError,
    "UNAUTHENTICATED": AuthenticationError,
}
"""Status to exception, for failures that no ``[CODE]`` of ours explains: those of gRPC itself and of proxies between.

Total: a test compares its keys with ``grpc.StatusCode``, OK left out.
"""

_TLS_SIGNS = ("CERTIFICATE", "SSL_ERROR", "handshake", "Handshake", "TSI_")


def exception_for(
    status: str, details: str, *, address: str = "", request_id: str = "", retry_delay_s: float = 0.0
) -> TrunklineError:
    """Return the exception for a failed call.

    Args:
        status: Name of the gRPC status.
        details: Its text; ``[CODE] message (request id)`` if it comes from a Trunkline cluster.
        address: Where the call went, for the message.
        request_id: Id that the client gave to the call.
        retry_delay_s: Delay that the cluster asked for, from the trailing metadata.
    """
    parsed = parse_details(details)
    if parsed.code is not None:
        wire_error = WireError(parsed.code, parsed.message, retry_delay_s=retry_delay_s)
        return from_wire(wire_error, request_id=parsed.request_id or request_id)
    kind = EXCEPTION_BY_STATUS.get(status, InternalError)
    where = f"the cluster at {address}" if address else "the cluster"
    if kind is ServiceUnavailableError and any(sign in details for sign in _TLS_SIGNS):
        return TlsError(f"no secure connection to {where}: {_tls_reason(details)}", request_id=request_id)
    if kind is OverloadedError and "larger than max" in details:
        return PayloadTooLargeError(
            f"the message is larger than allowed: {details}", hint="Use a smaller batch_size", request_id=request_id
        )
    message, hint = _untagged_text(kind, status, details, where)
    return kind(message, hint=hint, request_id=request_id, retry_delay_s=retry_delay_s)


def _untagged_text(kind: type[TrunklineError], status: str, details: str, where: str) -> tuple[str, str]:
    if kind is ServiceUnavailableError:
        return f"no answer from {where}: {_last_reason(details)}", ""
    if kind is DeadlineExceededError:
        return f"no answer from {where} in the time allowed", ""
    if kind is CallCancelledError:
        return "the call was cancelled before it was answered", ""
    if kind is UnsupportedError:
        return f"{where} does not know this call: {details}", "Client and cluster may be of different versions"
    return f"{where} answered {status}: {details or 'no reason given'}", ""


def _last_reason(details: str) -> str:
    """Keep the part of gRPC's text that says why."""
    return details.rsplit("last error: ", 1)[-1].removeprefix("UNKNOWN: ") or "connection lost"


def _tls_reason(details: str) -> str:
    text = _last_reason(details)
    if "certificate has expired" in text:
        return "its certificate has expired"
    if "WRONG_VERSION_NUMBER" in text:
        return "it does not speak TLS"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"its certificate is not trusted ({text.rsplit('CERTIFICATE_VERIFY_FAILED', 1)[-1].strip(': ')})"
    return text


def is_retryable(error: TrunklineError) -> bool:
    """Whether the same call may succeed without a change by the caller."""
    return error.code in RETRYABLE_CODES and not isinstance(error, TlsError)
