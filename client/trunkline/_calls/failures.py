"""From a failed call to an exception, and to what becomes of the replica that failed it."""

from __future__ import annotations

import os
from typing import Any

import grpc
from trunkline_wire.errors import RETRY_DELAY_METADATA, ErrorCode
from trunkline_wire.messages import error_from_proto

from trunkline._direct import Pool, Replica
from trunkline._status import exception_for
from trunkline.errors import TrunklineError, from_wire

_SENT_AWAY = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.UNSUPPORTED, ErrorCode.CANCELLED})
"""Codes by which a replica says that it cannot answer this, where another one or the gateway may."""

_FOR_ALL = frozenset({grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED})
"""Statuses of gRPC itself that another replica, or the gateway, would end with as well."""


def new_request_id() -> str:
    """Return an id for one call."""
    return os.urandom(8).hex()


def error_from_call(error: grpc.RpcError, address: str, request_id: str) -> TrunklineError:
    """Return the exception for a failed call to ``address``."""
    status, details, delay_s = error.code().name, error.details() or "", _asked_delay(error)
    return exception_for(status, details, address=address, request_id=request_id, retry_delay_s=delay_s)


def error_from_message(message: Any, request_id: str = "") -> TrunklineError:
    """Return the exception of an ``Error`` message."""
    return from_wire(error_from_proto(message), request_id=message.request_id or request_id)


def note_failure(pool: Pool, replica: Replica, ticket: bytes, rpc_error: grpc.RpcError, error: TrunklineError) -> bool:
    """Return whether a call that a replica failed may succeed elsewhere. If so, the replica is left alone for a while.

    Args:
        pool: Of the replica.
        replica: Which failed it.
        ticket: What it was shown.
        rpc_error: How it failed.
        error: The exception for that.
    """
    if rpc_error.code() is grpc.StatusCode.UNAUTHENTICATED:
        pool.refused(replica, ticket)
        return True
    is_tagged = (rpc_error.details() or "").startswith("[")
    elsewhere = error.code in _SENT_AWAY if is_tagged else rpc_error.code() not in _FOR_ALL
    if elsewhere:
        pool.lost(replica)
    return elsewhere


def _asked_delay(error: grpc.RpcError) -> float:
    """Return the delay that the trailing metadata asks for, in seconds."""
    for key, value in error.trailing_metadata() or ():
        if key == RETRY_DELAY_METADATA:
            try:
                return max(0.0, int(value) / 1000.0)
            except ValueError:
                return 0.0
    return 0.0
