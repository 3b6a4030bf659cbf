"""Drawings in SVG: curves, dots, bars and a heat map. Colours are those of the page's style sheet."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from trunkline._report.figures import Values
from trunkline._report.page import Child, Markup, tag
from trunkline._report.scales import Scale, Tick, scale_of
from trunkline._report.text import LABEL_LENGTH, number, shorten

# Shape suffix legend: N = rows, K = classes

_GLYPH, _WIDE_GLYPH = 6.8, 12.5
"""Widths of a character of a drawing, in its units; those of text of 12 units come to less. Chinese ones are wide."""

_GAP = 8
_LEAST = 0.85
"""How far a drawing shrinks. Its text is of 12 pixels; beyond that it is scrolled."""
_NUM_COLUMNS = 20


@dataclass(frozen=True)
class Axis:
    """One side of a drawing: what is measured, with its unit, and where."""

    title: str
    scale: Scale


@dataclass(frozen=True)
class Frame:
    """The area of a drawing, and how numbers become places in it."""

    x: Axis
    y: Axis
    left: float
    top: float
    width: float
    height: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point lies."""
        across, up = self.x.scale.share(x), self.y.scale.share(y)
        return self.left + self.width * across, self.top + self.height * (1 - up)

    def line(self, points: Iterable[tuple[float, float]], style: str) -> Markup:
        """Return a line through points."""
        places = [self.place(*one) for one in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        return tag("path", d=f"M{path}", class_=style) if places else Markup()

    def dots(self, points: Iterable[tuple[float, float]], style: str) -> Markup:
        """Return points, all of them as one element: there may be thousands."""
        path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in (self.place(*one) for one in points))
        return tag("path", d=path, class_=f"dots {style}") if path else Markup()

    def column(self, start: float, stop: float, value: float) -> Markup:
        """Return a bar that stands on the x axis, from one number to another."""
        (left, top), (right, bottom) = self.place(start, value), self.place(stop, self.y.scale.low)
        return tag("rect", x=left + 0.5, y=top, width=max(0.5, right - left - 1), height=bottom - top, class_="bar")


def frame(x: Axis, y: Axis, *, width: float = 640, height: float = 300, has_legend: bool = False) -> Frame:
    """Return the area of a drawing of that size, with room for what is written around it."""
    ticks = max(_width(one.text) for one in y.scale.ticks)
    left, right = 24 + ticks + _GAP, 24.0
    top, bottom = (32.0 if has_legend else 12.0), 46.0
    return Frame(x, y, left, top, width - left - right, height - top - bottom)


def plot(title: str, words: str, area: Frame, marks: Iterable[Markup], *, legend: Sequence[str] = ()) -> Markup:
    """Return a drawing with its axes.

    Args:
        title: What it shows.
        words: What is to be seen, for those who do not.
        area: Where the marks are.
        marks: What is drawn.
        legend: Names of the curves, in the order of their styles ``s0``, ``s1`` ...
    """
    width, height = area.left + area.width + 24, area.top + area.height + 46
    return svg(title, words, width, height, *_axes(area), *_legend(legend, area), *marks)


def svg(title: str, words: str, width: float, height: float, *children: Child) -> Markup:
    """Return a drawing of that size: it shrinks where there is less room, down to what can still be read."""
    return tag(
        "svg",
        tag("title", title),
        tag("desc", words),
        *children,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        role="img",
        style=f"max-width:{width:.0f}px;min-width:{_LEAST * width:.0f}px",
    )


def bars(
    title: str,
    words: str,
    unit: str,
    rows: Sequence[tuple[str, float, str]],
    *,
    whole: bool = False,
    width: float = 640,
) -> Markup:
    """Return horizontal bars.

    Args:
        title: What they show.
        words: What is to be seen, for those who do not.
        unit: Title of the axis.
        rows: Name, number and how the number is written, of each. At least one.
        whole: Whether only whole numbers make sense.
        width: Of the drawing.
    """
    names = [shorten(name, 2 * LABEL_LENGTH) for name, _, _ in rows]
    left = _GAP + max(map(_width, names)) + _GAP
    right = _GAP + max(_width(text) for _, _, text in rows) + _GAP
    step, top = 22, 6
    bottom = top + step * len(rows)
    scale = scale_of([0.0, max(value for _, value, _ in rows) or 1.0], whole=whole)
    span = width - left - right
    parts: list[Markup] = []
    for tick in scale.ticks:
        x = left + span * scale.share(tick.value)
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid"))
        parts.append(tag("text", tick.text, x=x, y=bottom + 16, text_anchor="middle", class_="muted"))
    for at, (name, (_, value, text)) in enumerate(zip(names, rows, strict=True)):
        y, length = top + step * at, span * max(0.0, scale.share(value))
        parts.append(tag("text", name, x=left - _GAP, y=y + 15, text_anchor="end"))
        parts.append(tag("rect", x=left, y=y + 3, width=length, height=step - 6, class_="bar"))
        parts.append(tag("text", text, x=left + length + 6, y=y + 15))
    parts.append(tag("text", unit, x=left + span / 2, y=bottom + 34, text_anchor="middle", class_="muted"))
    return svg(title, words, width, bottom + 44, *parts)


def columns(title: str, what: str, values_N: Values) -> Markup:
    """Return a histogram of values, of which there is at least one."""
    scale = scale_of([float(values_N.min()), float(values_N.max())])
    parts = max(1, round(_NUM_COLUMNS / (len(scale.ticks) - 1)))
    edges = [
        start.value + (stop.value - start.value) * part / parts
        for start, stop in pairwise(scale.ticks)
        for part in range(parts)
    ]
    edges.append(scale.high)
    counts, _ = np.histogram(np.clip(values_N, scale.low, scale.high), bins=np.array(edges))
    rows = Axis("held-out rows", scale_of([0, int(counts.max())], whole=True))
    area = frame(Axis(what, scale), rows, width=480, height=300)
    bounds = zip(pairwise(edges), counts.tolist(), strict=True)
    marks = [area.column(start, stop, count) for (start, stop), count in bounds if count]
    low, middle, high = map(number, (values_N.min(), np.median(values_N), values_N.max()))
    return plot(title, f"{len(values_N)} rows from {low} to {high}, half of them below {middle}.", area, marks)


def heat_map(title: str, words: str, names: Sequence[str], counts_KK: npt.NDArray[np.int64]) -> Markup:
    """Return a confusion matrix: a row for each true class, a column for each one that was said.

    What is right and what is wrong have colours of their own, the stronger the larger their share of the row.
    """
    num_classes = len(names)
    cell = 44.0 if num_classes <= 12 else 32.0 if num_classes <= 20 else 26.0
    short = [shorten(name, LABEL_LENGTH) for name in names]
    longest = max(map(_width, short))
    is_level = longest <= cell
    left, top = 24 + longest + _GAP, 24 + (14 if is_level else longest) + _GAP
    side = cell * num_classes
    middle = top + side / 2
    parts = [
        tag("text", "predicted class", x=left + side / 2, y=12, text_anchor="middle", class_="muted"),
        _upright("true class", 12, middle, "middle", "muted"),
    ]
    for at, name in enumerate(short):
        x, y = left + cell * (at + 0.5), top + cell * (at + 0.5)
        parts.append(tag("text", name, x=left - _GAP, y=y + 4, text_anchor="end"))
        if is_level:
            parts.append(tag("text", name, x=x, y=top - _GAP, text_anchor="middle"))
        else:
            parts.append(_upright(name, x + 4, top - _GAP, "start"))
    for at in range(num_classes + 1):
        x, y = left + cell * at, top + cell * at
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=top + side, class_="grid"))
        parts.append(tag("line", x1=left, x2=left + side, y1=y, y2=y, class_="grid"))
    totals_K = np.maximum(counts_KK.sum(axis=1), 1)
    for row, column in zip(*np.nonzero(counts_KK), strict=True):
        count = int(counts_KK[row, column])
        x, y = left + cell * int(column), top + cell * int(row)
        share = 0.15 + 0.85 * float(counts_KK[row, column] / totals_K[row])
        style = "hit" if row == column else "miss"
        text = f"{count} of {int(totals_K[row])} rows of {short[int(row)]} taken for {short[int(column)]}"
        square = tag("rect", x=x + 1, y=y + 1, width=cell - 2, height=cell - 2, class_=style, fill_opacity=share)
        size = 12 if _width(str(count)) < cell - 2 else 9
        written = tag("text", f"{count}", x=x + cell / 2, y=y + cell / 2 + 4, text_anchor="middle", font_size=size)
        parts.append(tag("g", tag("title", text), square, written))
    return svg(title, words, left + side + 12, top + side + 12, *parts)


def _axes(area: Frame) -> list[Markup]:
    right, bottom = area.left + area.width, area.top + area.height
    parts = []
    for tick in _spaced(area.x.scale, area.width):
        x = area.left + area.width * area.x.scale.share(tick.value)
        parts.append(tag("line", x1=x, x2=x, y1=area.top, y2=bottom, class_="grid"))
        parts.append(tag("text", tick.text, x=x, y=bottom + 16, text_anchor="middle", class_="muted"))
    for tick in area.y.scale.ticks:
        y = bottom - area.height * area.y.scale.share(tick.value)
        parts.append(tag("line", x1=area.left, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", tick.text, x=area.left - _GAP, y=y + 4, text_anchor="end", class_="muted"))
    parts.append(tag("path", d=f"M{area.left:.1f} {area.top:.1f}V{bottom:.1f}H{right:.1f}", class_="axis"))
    middle = area.left + area.width / 2
    parts.append(tag("text", area.x.title, x=middle, y=bottom + 36, text_anchor="middle", class_="muted"))
    parts.append(_upright(area.y.title, 12, area.top + area.height / 2, "middle", "muted"))
    return parts


def _spaced(scale: Scale, width: float) -> Sequence[Tick]:
    """Return the ticks of a level axis, every other one where their texts would touch."""
    longest = max(_width(one.text) for one in scale.ticks) + _GAP
    room = width / max(1, len(scale.ticks) - 1)
    return scale.ticks if longest <= room else scale.ticks[:: -int(-longest // room)]


def _legend(names: Sequence[str], area: Frame) -> list[Markup]:
    parts, x = [], area.left
    for at, name in enumerate(names):
        parts.append(tag("path", d=f"M{x:.1f} 14h26", class_=f"curve s{at}"))
        parts.append(tag("text", name, x=x + 32, y=18))
        x += 32 + _width(name) + 16
    return parts


def _upright(text: str, x: float, y: float, anchor: str, style: str | None = None) -> Markup:
    """Return text that is read from below."""
    turn = f"rotate(-90 {x:.1f} {y:.1f})"
    return tag("text", text, x=x, y=y, text_anchor=anchor, transform=turn, class_=style)


def _width(text: str) -> float:
    return sum(_WIDE_GLYPH if unicodedata.east_asian_width(one) in "WF" else _GLYPH for one in text)
