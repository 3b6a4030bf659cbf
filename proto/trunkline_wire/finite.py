"""Checks of rows for NaN and infinity, fast enough to be made wherever rows arrive. numpy alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trunkline_wire.errors import ErrorCode, WireError

# Shape suffix legend: B = rows

BFLOAT16_INFINITY = 0x7F80
"""Bits of infinity."""

NAN_OR_INFINITY = "NaN or infinity"
"""What rows hold, for messages."""

# Looked up, not made from text each time: most arrays are a row of some kilobytes.
_BITS_BY_DTYPE = {
    np.dtype(f"{order}f{width}"): (np.dtype(f"{order}u{width}"), infinity)
    for order in "<>"
    for width, infinity in ((2, 0x7C00), (4, 0x7F80_0000))
}
_SIGNED_BY_UNSIGNED = {np.dtype(f"{order}u{width}"): np.dtype(f"{order}i{width}") for order in "<>" for width in (2, 4)}


def check_finite(array: npt.NDArray[np.generic]) -> None:
    """Check floating-point rows for NaN and infinity.

    Raises:
        WireError: NOT_FINITE, naming the first bad row.
    """
    if not is_finite(array):
        raise not_finite(~np.isfinite(array), NAN_OR_INFINITY)


def is_finite(array: npt.NDArray[np.generic]) -> bool:
    """Return whether a floating-point array holds neither NaN nor infinity."""
    known = _BITS_BY_DTYPE.get(array.dtype)
    if known is None:
        return bool(np.isfinite(array).all())
    unsigned, infinity = known
    return are_bits_finite(array.view(unsigned), infinity)


def are_bits_finite(bits: npt.NDArray[np.unsignedinteger], infinity: int) -> bool:
    """Return whether numbers are all finite by their bits, ``infinity`` being those of that.

    As numbers, bits from infinity up are infinity and NaN, and so are those from infinity up with the sign bit set.
    numpy's own check makes an array of answers, converts each float16 in software (six times as slow), and knows no
    bfloat16.
    """
    signed = _SIGNED_BY_UNSIGNED[bits.dtype]
    sign = 1 << (8 * signed.itemsize - 1)
    highest_positive = int(bits.view(signed).max(initial=0))
    return highest_positive < infinity and int(bits.max(initial=0)) < (infinity | sign)


def not_finite(bad: npt.NDArray[np.bool_], what: str, advice: str = "") -> WireError:
    """Return the error for rows, the first dimension of ``bad``, of which some values are."""
    bad_B = bad.reshape(len(bad), -1).any(axis=1)
    text = f"{np.count_nonzero(bad_B)} of {len(bad)} rows hold {what}, the first is row {np.argmax(bad_B)}"
    return WireError(ErrorCode.NOT_FINITE, f"{text}. {advice}" if advice else text)
