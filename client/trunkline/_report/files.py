"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from trunkline.errors import InvalidArgumentError


def check_place(place: Path) -> None:
    """Check that there can be a file, before anything is asked for.

    Raises:
        InvalidArgumentError: There cannot.
    """
    if place.is_dir():
        raise InvalidArgumentError(f"{place} is a folder", hint="Give the name of a file")
    if not place.parent.is_dir():
        raise InvalidArgumentError(f"there is no folder {place.parent}", hint="Make it first")


def write_whole(place: Path, content: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        InvalidArgumentError: It cannot be written.
    """
    check_place(place)
    temporary = place.with_name(f".{place.name[:100]}.{secrets.token_hex(4)}")
    try:
        try:
            # Made as any file of the user's is: a temporary file of the library's would be for the owner alone.
            with temporary.open("x", encoding="utf-8", newline="\n") as file:
                file.write(content)
            os.replace(temporary, place)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise InvalidArgumentError(f"{place} cannot be written: {error.strerror or error}") from None
