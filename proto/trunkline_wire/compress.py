"""Lossless compression on top of every codec: zstd, one level, on both sides."""

from __future__ import annotations

import sys

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_LEVEL = 3


def compress(data: bytes | memoryview) -> bytes:
    """Return the data as one zstd frame, which may be larger than what went in."""
    return zstd.compress(data, _LEVEL)
