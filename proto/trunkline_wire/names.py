"""The one allow-list for names that users give, and references to a version of a name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_NAME_LENGTH

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME_LENGTH - 1}}}")
_BACKBONE = re.compile(rf"(?:{_NAME.pattern}/)?{_NAME.pattern}")
_REFERENCE = re.compile(rf"(?P<name>{_NAME.pattern})(?:@(?P<version>[1-9][0-9]{{0,8}}))?")


@dataclass(frozen=True)
class Reference:
    """A name and, where given, a version. No version means the newest."""

    name: str
    version: int | None

    def __str__(self) -> str:
        """Return ``name`` or ``name@version``."""
        return self.name if self.version is None else f"{self.name}@{self.version}"


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it is allowed.

    Args:
        name: What the user gave.
        what: What it names, for the message: ``model``, ``dataset`` ...

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    if not _NAME.fullmatch(name):
        raise WireError(
            ErrorCode.INVALID_ARGUMENT,
            f"{name[:80]!r} is not a {what} name: letters, digits, '.', '_' and '-', starting with a letter or digit, "
            f"{MAX_NAME_LENGTH} characters at most",
        )
    return name


def check_backbone_name(name: str) -> str:
    """Return ``name`` if it is allowed for a backbone: a name, or a library's name and a name, as in ``timm/resnet50``.

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    if not _BACKBONE.fullmatch(name):
        raise WireError(
            ErrorCode.INVALID_ARGUMENT,
            f"{name[:80]!r} is not a backbone name: 'name' or 'library/name', each of letters, digits, '.', '_' and "
            f"'-', starting with a letter or digit, {MAX_NAME_LENGTH} characters at most",
        )
    return name


def parse_reference(text: str, what: str) -> Reference:
    """Take ``name`` or ``name@version`` apart.

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise WireError(ErrorCode.INVALID_ARGUMENT, f"{text[:80]!r} is not a {what}: expected 'name' or 'name@version'")
    return Reference(match["name"], int(match["version"]) if match["version"] else None)
