"""How this process asks for memory, and looks for what it needs no more."""

from __future__ import annotations

import ctypes
import gc
import logging
import sys

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_BYTES = 32 * 2**20
_KEEP_BYTES = 512 * 2**20

_NEW_OBJECTS = 10_000
"""Objects that are made before Python looks for cycles among them; 700 are a few requests."""


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed, up to half a GiB, in place of giving it back to the system at once.

    Every message of some MiB would otherwise be memory fresh from the system, which zeroes each page of it on first
    touch: that costs as much as all that gRPC does with the message.

    Returns:
        Whether that was possible: only glibc knows how.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Setting the first one also ends malloc's own guessing at both.
    done = mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES) == 1 and mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES) == 1
    if not done:
        logger.warning("malloc goes on giving memory back at once; large messages cost more")
    return bool(done)


def spare_long_lived() -> None:
    """Have Python's collector of cycles leave alone what there is by now: the libraries and the model.

    Looking through all of it, a million objects, takes a good part of a second, in which nobody is answered.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, *gc.get_threshold()[1:])
