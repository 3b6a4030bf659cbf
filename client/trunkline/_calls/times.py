"""Timestamps of messages."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any


def from_timestamp(message: Any, name: str) -> datetime | None:
    """Return a timestamp field as a moment in UTC, or None where it is not set."""
    if not message.HasField(name):
        return None
    moment: datetime = getattr(message, name).ToDatetime(tzinfo=UTC)
    return moment
