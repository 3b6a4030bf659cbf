"""Every exception that this package raises on purpose.

All of them are ``TrunklineError``. Each names what was got and what was expected; ``hint`` says what to do next.
"""

from __future__ import annotations

from typing import Any

from trunkline_wire.errors import ErrorCode, WireError


class TrunklineError(Exception):
    """The base of every error of this package.

    Attributes:
        message: What happened, in one or two sentences.
        code: The kind of failure, as it crosses the wire. None where the failure never concerned the cluster.
        hint: What to do next. May be empty.
        request_id: Names the call in the cluster's log. Empty if no call was made.
        retry_delay_s: How long the cluster asks to wait before another try, in seconds. 0 if it does not say.
    """

    default_code: ErrorCode | None = None
    default_hint: str = ""

    def __init__(
        self,
        message: str,
        *,
        code: ErrorCode | None = None,
        hint: str = "",
        request_id: str = "",
        retry_delay_s: float = 0.0,
    ) -> None:
        """Keep the parts. ``code`` and ``hint`` default to those of the class."""
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint or self.default_hint
        self.request_id = request_id
        self.retry_delay_s = retry_delay_s

    def __str__(self) -> str:
        """Return message, hint and request id as one text."""
        text = self.message
        if self.hint:
            text = f"{text.rstrip('.')}. {self.hint}"
        return f"{text} (request {self.request_id})" if self.request_id else text

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive a trip between processes, keyword arguments included."""
        return (_rebuild, (type(self), self.message, self._keywords()))

    def _keywords(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "hint": self.hint,
            "request_id": self.request_id,
            "retry_delay_s": self.retry_delay_s,
        }


def _rebuild(kind: type[TrunklineError], message: str, keywords: dict[str, Any]) -> TrunklineError:
    return kind(message, **keywords)


class InvalidArgumentError(TrunklineError, ValueError):
    """An argument cannot be right, whatever the state of the cluster."""

    default_code = ErrorCode.INVALID_ARGUMENT


class ShapeMismatchError(InvalidArgumentError):
    """An array or picture has another shape than is needed."""

    default_code = ErrorCode.SHAPE_MISMATCH


class DtypeMismatchError(InvalidArgumentError):
    """An array has another type than is needed."""

    default_code = ErrorCode.DTYPE_MISMATCH


class NotFiniteError(InvalidArgumentError):
    """Features hold NaN or infinity."""

    default_code = ErrorCode.NOT_FINITE


class EmptyBatchError(InvalidArgumentError):
    """There are no rows."""

    default_code = ErrorCode.EMPTY_BATCH


class PayloadTooLargeError(InvalidArgumentError):
    """A row, a batch or a file is over its limit."""

    default_code = ErrorCode.PAYLOAD_TOO_LARGE


class CorruptImageError(InvalidArgumentError):
    """A picture cannot be decoded."""

    default_code = ErrorCode.CORRUPT_IMAGE


class BadLabelsError(InvalidArgumentError):
    """Labels are missing, of another number than the rows, or of one class only."""

    default_code = ErrorCode.BAD_LABELS


class ConfigError(TrunklineError, ValueError):
    """Settings contradict each other, or would do something unsafe."""


class MissingExtraError(TrunklineError, ImportError):
    """Something optional is needed and not installed."""


class TrackingError(TrunklineError):
    """A tracker of the user's own cannot be reached, or refuses. Nothing was submitted."""

    default_hint = "See to it, or leave track= out"


class NotFoundError(TrunklineError, LookupError):
    """A backbone, cut, slice, dataset, job or model is not there, or not yours."""

    default_code = ErrorCode.NOT_FOUND


class AlreadyExistsError(TrunklineError):
    """Something of that name is there and differs."""

    default_code = ErrorCode.ALREADY_EXISTS


class IncompatibleModelError(TrunklineError):
    """Features, model or versions do not fit each other."""

    default_code = ErrorCode.INCOMPATIBLE


class JobStateError(TrunklineError):
    """The job is in a state that does not allow this."""

    default_code = ErrorCode.JOB_STATE


class OverloadedError(TrunklineError):
    """The cluster's queues are full. Trying again later may succeed."""

    default_code = ErrorCode.OVERLOADED
    default_hint = "Try again later, or send fewer rows at a time"


class WorkerOutOfMemoryError(TrunklineError):
    """A worker ran out of memory on this batch."""

    default_code = ErrorCode.WORKER_OOM
    default_hint = "Use a smaller batch_size"


class StorageFullError(TrunklineError):
    """The cluster's storage is full."""

    default_code = ErrorCode.STORAGE_FULL
    default_hint = "Make room in the cluster's storage and run the same command again: what was stored is kept"


class ServiceUnavailableError(TrunklineError, ConnectionError):
    """The cluster cannot be reached."""

    default_code = ErrorCode.UNAVAILABLE
    default_hint = "Start a local cluster with `trunkline up`, or find out more with `trunkline doctor`"


class TlsError(ServiceUnavailableError):
    """The secure connection failed: an expired certificate, one that is not trusted, or no TLS on the other side."""

    default_hint = "See `trunkline doctor`; the certificate to trust is `ca_file=` or TRUNKLINE_CA_FILE"


class DeadlineExceededError(TrunklineError, TimeoutError):
    """The time allowed has passed."""

    default_code = ErrorCode.DEADLINE_EXCEEDED
    default_hint = "Allow more with timeout_s="


class CallCancelledError(TrunklineError):
    """The call was cancelled before it was answered."""

    default_code = ErrorCode.CANCELLED


class CorruptDataError(TrunklineError):
    """Data does not have the checksum it should have."""

    default_code = ErrorCode.CORRUPT_DATA


class AuthenticationError(TrunklineError):
    """There is no token, or the cluster does not know it."""

    default_code = ErrorCode.UNAUTHENTICATED
    default_hint = "Set TRUNKLINE_TOKEN or TRUNKLINE_TOKEN_FILE; `trunkline doctor` shows which token is used"


class PermissionDeniedError(TrunklineError, PermissionError):
    """The token does not allow this."""

    default_code = ErrorCode.PERMISSION_DENIED


class UnsupportedError(TrunklineError, NotImplementedError):
    """The cluster, or this kind of model, cannot do that."""

    default_code = ErrorCode.UNSUPPORTED


class InternalError(TrunklineError):
    """Something went wrong inside the cluster. Its log has more under the request id."""

    default_code = ErrorCode.INTERNAL


class JobFailedError(TrunklineError):
    """A training job ended without a model.

    Attributes:
        job_id: The job.
    """

    def __init__(self, message: str, *, job_id: str = "", **keywords: Any) -> None:
        """Keep the job's id beside what every error has."""
        super().__init__(message, **keywords)
        self.job_id = job_id

    def _keywords(self) -> dict[str, Any]:
        return {**super()._keywords(), "job_id": self.job_id}


class JobCancelledError(JobFailedError):
    """A training job was cancelled."""

    default_code = ErrorCode.CANCELLED


EXCEPTION_BY_CODE: dict[ErrorCode, type[TrunklineError]] = {
    ErrorCode.INVALID_ARGUMENT: InvalidArgumentError,
    ErrorCode.SHAPE_MISMATCH: ShapeMismatchError,
    ErrorCode.DTYPE_MISMATCH: DtypeMismatchError,
    ErrorCode.NOT_FINITE: NotFiniteError,
    ErrorCode.EMPTY_BATCH: EmptyBatchError,
    ErrorCode.PAYLOAD_TOO_LARGE: PayloadTooLargeError,
    ErrorCode.CORRUPT_IMAGE: CorruptImageError,
    ErrorCode.CORRUPT_DATA: CorruptDataError,
    ErrorCode.BAD_LABELS: BadLabelsError,
    ErrorCode.NOT_FOUND: NotFoundError,
    ErrorCode.ALREADY_EXISTS: AlreadyExistsError,
    ErrorCode.INCOMPATIBLE: IncompatibleModelError,
    ErrorCode.JOB_STATE: JobStateError,
    ErrorCode.OVERLOADED: OverloadedError,
    ErrorCode.WORKER_OOM: WorkerOutOfMemoryError,
    ErrorCode.UNAVAILABLE: ServiceUnavailableError,
    ErrorCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    ErrorCode.CANCELLED: CallCancelledError,
    ErrorCode.UNAUTHENTICATED: AuthenticationError,
    ErrorCode.PERMISSION_DENIED: PermissionDeniedError,
    ErrorCode.UNSUPPORTED: UnsupportedError,
    ErrorCode.STORAGE_FULL: StorageFullError,
    ErrorCode.INTERNAL: InternalError,
}
"""Error code to exception. Total: a test compares its keys with ``ErrorCode``."""


def from_wire(error: WireError, *, prefix: str = "", hint: str = "", request_id: str = "") -> TrunklineError:
    """Return the exception of an error of the wire package, or of one that crossed the wire.

    Args:
        error: The error.
        prefix: Put before the message, to say where: ``row 3 (cat.png): ``.
        hint: What to do next. Default: the class's own.
        request_id: Names the call.
    """
    kind = EXCEPTION_BY_CODE[error.code]
    return kind(prefix + error.message, hint=hint, request_id=request_id, retry_delay_s=error.retry_delay_s)
