"""Names and versions that a user gives."""

from __future__ import annotations

from typing import Any

from trunkline_wire.errors import WireError
from trunkline_wire.names import check_name

from trunkline.errors import InvalidArgumentError, from_wire


def check_user_name(name: str, what: str) -> str:
    """Return a name if the wire allows it.

    Raises:
        InvalidArgumentError: It does not.
    """
    try:
        return check_name(name, what)
    except WireError as error:
        raise from_wire(error) from None


def check_version(version: Any) -> str:
    """Return what identifies a local model, together with its name.

    Raises:
        InvalidArgumentError: It is no text, or an empty one.
    """
    if not isinstance(version, str) or not version:
        raise InvalidArgumentError(f"version is {version!r}; expected a text such as '1'")
    return version
