"""What the axes of a row of features mean, read from its shape: inputs are square, so places are, too."""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_EXTRA_TOKENS = 8
"""Most tokens of a sequence that stand for no place: the class token, registers and the like. They come first."""


def channel_axis(shape: Sequence[int]) -> int:
    """Return which axis of a row counts channels: the first of (C, H, W), the last of (H, W, C) and (T, C)."""
    if len(shape) == 3:
        return 2 if shape[0] == shape[1] != shape[2] else 0
    return max(0, len(shape) - 1)


def resolution(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a row without its channels, and without tokens that stand for no place."""
    if len(shape) == 2:
        return (shape[0] - (num_extra_tokens(shape[0]) or 0),)
    axis = channel_axis(shape)
    return tuple(size for index, size in enumerate(shape) if index != axis)


def num_places(shape: Sequence[int]) -> int:
    """Return how many places a row has: 1 for a vector."""
    return math.prod(resolution(shape))


def is_picture(shape: Sequence[int]) -> bool:
    """Whether a row is a map or a sequence of places, not one vector."""
    return len(shape) in (2, 3) and num_places(shape) > 1


def num_extra_tokens(num_tokens: int) -> int | None:
    """Return how many of a sequence's tokens stand for no place, so that the rest is a square; None if none is."""
    for extra in range(min(MAX_EXTRA_TOKENS, num_tokens - 1) + 1):
        if math.isqrt(num_tokens - extra) ** 2 == num_tokens - extra and num_tokens - extra > 1:
            return extra
    return None
