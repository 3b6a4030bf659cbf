"""Codecs of features: what their names mean, which of them can be used, and which one is best at a cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from trunkline_wire import quantise
from trunkline_wire.errors import WireError
from trunkline_wire.limits import MAX_CODEC_ERROR
from trunkline_wire.quantise import CodecChoice
from trunkline_wire.specs import FLOAT32, PRECISIONS, CodecCost, CutCost, StemCost, codec_label

from trunkline.errors import InvalidArgumentError, UnsupportedError, from_wire

if TYPE_CHECKING:
    from trunkline._calls import Rows
    from trunkline.records import ServerInfo

AUTO = "auto"
"""Name that asks for the codec with the fewest bytes whose embedding error is allowed."""

DEFAULT_CODEC = quantise.FLOAT16

OLD_CODECS = (quantise.FLOAT32, quantise.FLOAT16)
"""What a cluster reads that does not say what it reads."""


def check_codec(name: str) -> CodecChoice:
    """Take a codec's name apart.

    Raises:
        UnsupportedError: There is no such codec.
    """
    if not isinstance(name, str):
        raise InvalidArgumentError(f"codec is {name!r}; expected one of {', '.join(quantise.CODECS)}")
    try:
        return quantise.parse_codec(name)
    except WireError as error:
        raise from_wire(error) from None


def check_local_codec(name: str) -> str:
    """Return the codec of local features.

    Raises:
        UnsupportedError: There is no such codec.
        InvalidArgumentError: It asks for zstd.
    """
    choice = check_codec(name)
    if choice.zstd:
        raise InvalidArgumentError(
            f"codec is {name!r}; local features travel without zstd", hint=f"Use codec={choice.codec!r}"
        )
    return choice.codec


def offered_codecs(info: ServerInfo) -> tuple[str, ...]:
    """Return the codecs that both sides know."""
    return tuple(one for one in info.codecs or OLD_CODECS if one in quantise.CODECS)


def check_offered(choice: CodecChoice, info: ServerInfo) -> CodecChoice:
    """Check that the cluster reads a codec.

    Raises:
        UnsupportedError: It does not.
    """
    offered = offered_codecs(info)
    if choice.codec not in offered:
        raise UnsupportedError(
            f"the cluster (version {info.version}) does not read features in {choice.codec}; "
            f"it reads {', '.join(offered)}",
            hint="Choose one of these",
        )
    return choice


def check_precision(name: str) -> str:
    """Return a stem's precision.

    Raises:
        UnsupportedError: There is none of that name.
    """
    if name not in PRECISIONS:
        raise UnsupportedError(f"there is no stem of precision {name!r}; there are {', '.join(PRECISIONS)}")
    return name


def check_max_error(max_error: float | None) -> float:
    """Return the bound on the embedding error; None is the usual one.

    Raises:
        InvalidArgumentError: It is no bound.
    """
    if max_error is None:
        return MAX_CODEC_ERROR
    if isinstance(max_error, bool) or not isinstance(max_error, (int, float)) or not 0 <= max_error < math.inf:
        raise InvalidArgumentError(f"max_error is {max_error!r}; expected a number, 0 or more")
    return float(max_error)


def packed(features: npt.NDArray[Any], codec: str, channel_axis: int) -> Rows:
    """Return features in a codec.

    Raises:
        NotFiniteError: One is NaN, infinite, or beyond what the codec can hold.
    """
    try:
        return quantise.pack(features, codec, channel_axis)
    except WireError as error:
        raise from_wire(error, hint="Use codec='float32', or leave these rows out") from None


def parse_label(label: str) -> tuple[str, str]:
    """Return codec and precision of a label; an empty one, of before there were any others, is ``float16``."""
    codec, _, precision = label.partition("@")
    return codec or DEFAULT_CODEC, precision or FLOAT32


def stem_cost(cost: CutCost, precision: str) -> StemCost:
    """Return what a stem costs.

    Raises:
        UnsupportedError: The cluster does not offer it at that cut; says why.
    """
    found = cost.stem(precision)
    if found is None or found.refused:
        reason = found.refused if found else "the cluster makes none"
        usable = [one.precision for one in cost.stems if not one.refused]
        raise UnsupportedError(
            f"there is no stem of precision {precision} at {cost.cut.name}: {reason}",
            hint=f"Use precision={usable[0]!r}" if usable else "Choose another cut",
        )
    return found


def usable_codecs(cost: CutCost, offered: Sequence[str]) -> list[CodecCost]:
    """Return the codecs for features that this client, the cluster and the cut offer, fewest bytes first."""
    known = [one for one in cost.codecs if one.codec.removesuffix(quantise.ZSTD) in offered]
    # Of equal sizes the one that loses less, then the one without zstd.
    return sorted(known, key=lambda one: (one.bytes_per_row, one.embedding_error, len(one.codec)))


def choose_codec(cost: CutCost, precision: str, offered: Sequence[str], max_error: float) -> CodecCost:
    """Return the codec with the fewest bytes a row whose embedding error, with the stem's, is allowed.

    Raises:
        UnsupportedError: None is; lists each with its error. Or there is no such stem.
    """
    own_error = stem_cost(cost, precision).embedding_error
    candidates = usable_codecs(cost, offered)
    for one in candidates:
        if one.embedding_error + own_error <= max_error:
            return one
    with_stem = "" if precision == FLOAT32 else f", its {own_error:.3g} of the {precision} stem included"
    listed = ", ".join(f"{one.codec} {one.embedding_error + own_error:.3g}" for one in candidates)
    raise UnsupportedError(
        f"no codec keeps the embedding error at {cost.cut.name} within {max_error:g}{with_stem}: "
        f"{listed or 'the cluster offers none for features'}",
        hint="Allow more with max_error=" + ("" if precision == FLOAT32 else ", or use precision='float32'"),
    )


def check_error(cost: CutCost, precision: str, choice: CodecChoice, max_error: float) -> float:
    """Return the embedding error of a codec that was named.

    Raises:
        UnsupportedError: With the stem's it is not allowed, the cut does not offer it, or there is no such stem.
    """
    own_error = stem_cost(cost, precision).embedding_error
    found = cost.codec(str(choice)) or cost.codec(choice.codec)
    if found is None:
        raise UnsupportedError(
            f"{cost.cut.name} does not offer the codec {choice}; "
            f"it offers {', '.join(one.codec for one in cost.codecs)}"
        )
    if found.embedding_error + own_error > max_error:
        raise UnsupportedError(
            f"the embedding error of {codec_label(str(choice), precision)} at {cost.cut.name} is "
            f"{found.embedding_error + own_error:.3g}; at most {max_error:g} is allowed",
            hint="Use codec='auto', or allow more with max_error=",
        )
    return found.embedding_error
