"""Texts from elsewhere, made fit to be shown, and numbers as people read them."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

NAME_LENGTH = 80
"""Most characters of a name in a sentence or a table."""

LABEL_LENGTH = 18
"""Most characters of a name in a drawing."""

NONE = "\u2013"
"""Stands where there is no number."""

_UNSEEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    r"\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
"""Controls, marks that turn the direction of what follows, and halves of characters, which no file can hold."""

_PLAIN = 1e6
"""Whole numbers below it are written out."""

_EXPONENT = re.compile(r"e([+-])0*(?=\d)")


def clean(text: str) -> str:
    r"""Return a text in which characters that cannot be seen stand as their codes, such as ``\u202e``."""
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def shorten(text: str, most: int = NAME_LENGTH) -> str:
    """Return a clean text of so many characters at most. What is left out is in the middle: names often end alike."""
    text = clean(text)
    if len(text) <= most:
        return text
    head = max(1, 2 * most // 3)
    tail = max(0, most - head - 1)
    return f"{text[:head]}…{text[len(text) - tail :]}"


def number(value: float, digits: int = 4) -> str:
    """Return a number to some significant digits; a dash for none."""
    if not math.isfinite(value):
        return NONE
    text = f"{value + 0.0:.{digits}g}"
    if "e+" in text and abs(value) < _PLAIN:
        return f"{value:.0f}"
    return _EXPONENT.sub(lambda match: "e-" if match[1] == "-" else "e", text)


def score(value: float) -> str:
    """Return a score: to four places, or four digits where it is very large or small."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e3 else number(value)


def percent(share: float) -> str:
    """Return a share in per cent."""
    return f"{100 * share:.1f}\u00a0%"


def amount(count: float, what: str) -> str:
    """Return how many there are: ``1 row``, ``2,000 rows``."""
    return f"{count:,.0f}\u00a0{what if count == 1 else plural(what)}"


def plural(what: str) -> str:
    """Return a word for several: ``rows``, ``classes``."""
    return f"{what}es" if what.endswith("s") else f"{what}s"


def seconds(value: float) -> str:
    """Return a time that something took."""
    if value < 90:
        return f"{value:.2f}\u00a0s" if value < 10 else f"{value:.1f}\u00a0s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 90:
        return f"{minutes}\u00a0min {rest}\u00a0s"
    return f"{minutes // 60}\u00a0h {minutes % 60}\u00a0min"


def num_bytes(value: float) -> str:
    """Return how much something takes, in decimal units."""
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f}\u00a0{unit}" if unit == "bytes" else f"{value:.1f}\u00a0{unit}"
        value /= 1000
    return f"{value:,.1f}\u00a0GB"


def moment(when: datetime | None) -> str:
    """Return a point in time, in UTC; nothing for none."""
    return "" if when is None else f"{when.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
