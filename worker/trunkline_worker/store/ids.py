"""New ids, passed in wherever one is made, so that a test can replay them."""

from __future__ import annotations

import uuid
from collections.abc import Callable

NewId = Callable[[], str]
"""Returns an id that was never returned before: lower-case letters and digits."""


def random_id() -> str:
    """Return 32 random hexadecimal digits."""
    return uuid.uuid4().hex
