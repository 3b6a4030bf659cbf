"""The error table is total, and an error survives every trip it may make."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 - proves that errors survive Ray, which pickles them

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trunkline_wire.errors import (
    REQUEST_ID_METADATA,
    RETRY_DELAY_METADATA,
    RETRYABLE_CODES,
    STATUS_BY_CODE,
    ErrorCode,
    WireError,
    format_details,
    parse_details,
)
from trunkline_wire.messages import error_from_proto, error_to_proto
from trunkline_wire.v1 import error_pb2


def test_the_enums_of_wire_and_code_are_equal() -> None:
    prefix = "ERROR_CODE_"
    on_the_wire = {name.removeprefix(prefix): number for name, number in error_pb2.ErrorCode.items() if number}
    assert on_the_wire == {code.name: code.value for code in ErrorCode}
    assert error_pb2.ErrorCode.Value("ERROR_CODE_UNSPECIFIED") == 0


def test_every_code_has_a_status_that_grpc_knows() -> None:
    assert set(STATUS_BY_CODE) == set(ErrorCode)
    assert set(STATUS_BY_CODE.values()) <= set(grpc.StatusCode.__members__)
    assert "OK" not in STATUS_BY_CODE.values()
    # Callers tell these two apart from everything else by the status alone.
    assert "UNKNOWN" not in STATUS_BY_CODE.values()


def test_what_may_be_tried_again_is_a_code_whose_status_says_so() -> None:
    assert {STATUS_BY_CODE[code] for code in RETRYABLE_CODES} == {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}


@pytest.mark.parametrize("code", ErrorCode)
def test_every_error_survives_processes_copies_and_the_wire(code: ErrorCode) -> None:
    error = WireError(code, "what was got, what was expected", retry_delay_s=1.5)
    message = error_pb2.Error.FromString(error_to_proto(error, "r-1").SerializeToString())
    assert message.request_id == "r-1"
    for back in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error), error_from_proto(message)):
        assert type(back) is WireError
        assert (back.code, back.message, back.retry_delay_s) == (code, error.message, 1.5)
        assert str(back) == f"[{code.name}] what was got, what was expected"


def test_a_code_of_a_newer_wire_is_internal() -> None:
    assert error_from_proto(error_pb2.Error(code=99, message="new")).code is ErrorCode.INTERNAL  # type: ignore[arg-type]
    assert error_from_proto(error_pb2.Error(message="none")).code is ErrorCode.INTERNAL


@given(
    st.sampled_from(ErrorCode),
    st.text(alphabet=st.characters(codec="utf-8")),
    st.from_regex(r"\A[\w-]{1,40}\Z"),
)
def test_details_come_apart_as_they_were_put_together(code: ErrorCode, message: str, request_id: str) -> None:
    parsed = parse_details(format_details(WireError(code, message), request_id))
    assert (parsed.code, parsed.message, parsed.request_id) == (code, message, request_id)


def test_a_message_that_looks_like_details_stays_a_message() -> None:
    error = WireError(ErrorCode.NOT_FOUND, "[INTERNAL] odd (request a) name")
    parsed = parse_details(format_details(error, "b"))
    assert (parsed.code, parsed.message, parsed.request_id) == (error.code, error.message, "b")


@pytest.mark.parametrize(
    "details",
    ["", "failed to connect to all addresses", "[NO_SUCH_CODE] text", "[] text", "[internal] text", "[INTERNAL]"],
)
def test_texts_that_are_not_ours_have_no_code(details: str) -> None:
    parsed = parse_details(details)
    assert parsed.code is None
    assert parsed.message == details
    assert parsed.request_id == ""


def test_details_without_a_request_id_keep_the_whole_message() -> None:
    assert parse_details("[NOT_FOUND] gone\n").message == "gone\n"
    assert parse_details(None).code is None  # type: ignore[arg-type]  # grpc gives None where there are no details


def test_metadata_names_are_part_of_the_wire() -> None:
    # gRPC's retry policy honours its own name for the delay, and no other.
    assert RETRY_DELAY_METADATA == "grpc-retry-pushback-ms"
    assert REQUEST_ID_METADATA == "trunkline-request-id"
