"""Errors: the tree, the tables, and trips between processes."""

import pickle  # noqa: TID251 - what these tests made themselves

import grpc
import pytest
from trunkline import errors
from trunkline._status import EXCEPTION_BY_STATUS, exception_for, is_retryable
from trunkline_wire.errors import STATUS_BY_CODE, ErrorCode, WireError, format_details

KINDS = sorted(
    (one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.TrunklineError)),
    key=lambda kind: kind.__name__,
)


def test_tables_are_total():
    assert set(errors.EXCEPTION_BY_CODE) == set(ErrorCode)
    assert set(EXCEPTION_BY_STATUS) == {one.name for one in grpc.StatusCode} - {"OK"}
    assert set(EXCEPTION_BY_STATUS) >= set(STATUS_BY_CODE.values())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_exception_survives_a_trip(kind):
    keywords = {"code": ErrorCode.STORAGE_FULL, "hint": "do that", "request_id": "abc", "retry_delay_s": 1.5}
    if issubclass(kind, errors.JobFailedError):
        keywords["job_id"] = "42"
    for error in (kind("what happened", **keywords), kind("short")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind and str(again) == str(error) and vars(again) == vars(error)
    assert str(kind("what happened.", **keywords)) == "what happened. do that (request abc)"


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ShapeMismatchError, ValueError),
        (errors.DtypeMismatchError, ValueError),
        (errors.NotFoundError, LookupError),
        (errors.ServiceUnavailableError, ConnectionError),
        (errors.DeadlineExceededError, TimeoutError),
        (errors.PermissionDeniedError, PermissionError),
        (errors.MissingExtraError, ImportError),
        (errors.UnsupportedError, NotImplementedError),
        (errors.ConfigError, ValueError),
    ],
)
def test_builtin_bases(kind, builtin):
    assert issubclass(kind, builtin) and issubclass(kind, errors.TrunklineError)


@pytest.mark.parametrize("code", ErrorCode)
def test_every_code_comes_back_as_its_exception(code):
    details = format_details(WireError(code, "the reason"), "id-7")
    error = exception_for(STATUS_BY_CODE[code], details, request_id="mine", retry_delay_s=0.5)
    assert type(error) is errors.EXCEPTION_BY_CODE[code]
    assert (error.code, error.message, error.request_id, error.retry_delay_s) == (code, "the reason", "id-7", 0.5)


@pytest.mark.parametrize("status", [one.name for one in grpc.StatusCode if one is not grpc.StatusCode.OK])
def test_every_status_without_a_code_of_ours(status):
    error = exception_for(status, "something", address="host:1", request_id="mine")
    assert type(error) is EXCEPTION_BY_STATUS[status]
    assert error.request_id == "mine" and error.message


def test_unknown_status_is_internal():
    assert type(exception_for("BRAND_NEW", "")) is errors.InternalError


@pytest.mark.parametrize(
    ("status", "details", "kind", "said"),
    [
        ("RESOURCE_EXHAUSTED", "Received message larger than max (9 vs. 8)", errors.PayloadTooLargeError, "batch_size"),
        ("RESOURCE_EXHAUSTED", "too busy", errors.OverloadedError, "Try again later"),
        ("UNAVAILABLE", "failed; last error: UNKNOWN: Connection refused", errors.ServiceUnavailableError, "refused"),
        ("UNAVAILABLE", "CERTIFICATE_VERIFY_FAILED: certificate has expired", errors.TlsError, "has expired"),
        ("UNAVAILABLE", "Ssl handshake failed: SSL_ERROR_SSL: WRONG_VERSION_NUMBER", errors.TlsError, "not speak TLS"),
        ("UNAVAILABLE", "CERTIFICATE_VERIFY_FAILED: self signed", errors.TlsError, "not trusted (self signed)"),
        ("UNIMPLEMENTED", "Method not found!", errors.UnsupportedError, "different versions"),
    ],
)
def test_what_grpc_itself_says(status, details, kind, said):
    error = exception_for(status, details, address="host:1")
    assert type(error) is kind and said in str(error)


def test_what_may_be_tried_again():
    assert is_retryable(errors.OverloadedError("x")) and is_retryable(errors.ServiceUnavailableError("x"))
    assert not is_retryable(errors.TlsError("x")) and not is_retryable(errors.WorkerOutOfMemoryError("x"))
    assert not is_retryable(errors.StorageFullError("x")) and not is_retryable(errors.DeadlineExceededError("x"))
