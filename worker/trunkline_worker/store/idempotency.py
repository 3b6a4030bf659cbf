"""Idempotency keys: a retry after a lost reply has no second effect and gets the same answer."""

from __future__ import annotations

import hashlib

import sqlalchemy as sa
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.store import schema

_MAX_KEY_LENGTH = 128
_table = schema.idempotency


def content_sha256(*parts: str) -> str:
    """Return a hash over what a call asks for: another call under the same key is told apart by it."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def recall(connection: sa.Connection, tenant: str, method: str, key: str, content: str) -> str | None:
    """Return the result of the first call under ``key``, or None if this is the first.

    Args:
        connection: The mutation's own write transaction.
        tenant: Whose key it is.
        method: What is called. The same key under another method is another key.
        key: Made by the client, once per call that it means.
        content: ``content_sha256`` of what the call asks for.

    Raises:
        WireError: INVALID_ARGUMENT for the key, ALREADY_EXISTS where the first call asked for something else.
    """
    if not key or len(key) > _MAX_KEY_LENGTH or not key.isprintable():
        raise WireError(
            ErrorCode.INVALID_ARGUMENT,
            f"an idempotency key of 1 to {_MAX_KEY_LENGTH} printable characters is needed; got {key[:40]!r}. "
            "Make a random one per call and keep it for retries",
        )
    first = connection.execute(
        sa.select(_table.c.content_sha256, _table.c.result).where(
            _table.c.tenant == tenant, _table.c.method == method, _table.c.key == key
        )
    ).one_or_none()
    if first is None:
        return None
    if first.content_sha256 != content:
        raise WireError(
            ErrorCode.ALREADY_EXISTS,
            f"idempotency key {key!r} was used for another {method} with different content; "
            "use a new key for a new call",
        )
    return str(first.result)


def remember(
    connection: sa.Connection, tenant: str, method: str, key: str, content: str, *, result: str, now: float
) -> None:
    """Write down the result of the first call under ``key``, in the mutation's own transaction."""
    connection.execute(
        _table.insert().values(
            tenant=tenant, method=method, key=key, content_sha256=content, result=result, create_time=now
        )
    )
