"""Plots as SVG files that read on light and dark pages. A hundred lines instead of a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 190, 34, 52
_COLOURS = ("#3b6fb6", "#c8553d", "#3f8f5f", "#8a5fb0", "#b08a2e", "#5b6770", "#2f9aa0", "#b8507f", "#7c8f2e")
_SHAPES = ("circle", "square", "diamond")


@dataclass(frozen=True)
class Series:
    """Points that belong together: (x, y, name) each; drawn in one colour, joined by a line if asked."""

    name: str
    points: Sequence[tuple[float, float, str]]
    line: bool = True
    named: bool = True


@dataclass(frozen=True)
class Bar:
    """One bar; a marked one stands out."""

    name: str
    value: float
    marked: bool = False


def bars(path: Path, title: str, entries: Sequence[Bar]) -> None:
    """Draw bars that lie, each with its name before it and its value behind it."""
    left, step, thick = 270, 24, 15
    height = _TOP + step * len(entries) + 14
    scale = (_WIDTH - left - 70) / (max(one.value for one in entries) or 1.0)
    parts = [f'<text x="16" y="20" class="title">{escape(title)}</text>']
    for index, one in enumerate(entries):
        y, length = _TOP + step * index, max(1.0, one.value * scale)
        colour = _COLOURS[1] if one.marked else _COLOURS[0]
        middle = y + thick - 3
        parts += [
            f'<text x="{left - 8}" y="{middle}" text-anchor="end">{escape(one.name)}</text>',
            f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{thick}" fill="{colour}"/>',
            f'<text x="{left + length + 6:.1f}" y="{middle}">{one.value:.0f}</text>',
        ]
    _write(path, parts, height)


def scatter(path: Path, title: str, x_label: str, y_label: str, series: Sequence[Series]) -> None:
    """Draw points with a logarithmic x axis and a linear y axis."""
    xs = [x for one in series for x, _, _ in one.points]
    ys = [y for one in series for _, y, _ in one.points]
    low, high = math.log10(min(xs)) - 0.08, math.log10(max(xs)) + 0.08
    bottom, top = min(ys), max(ys)
    margin = (top - bottom) * 0.08 or 0.01
    bottom, top = bottom - margin, top + margin

    def at(x: float, y: float) -> tuple[float, float]:
        right = _LEFT + (math.log10(x) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)
        return right, _TOP + (top - y) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [*_frame(title, x_label, y_label), *_x_ticks(low, high, at, bottom), *_y_ticks(bottom, top, at, 10**low)]
    for index, one in enumerate(series):
        colour, shape = _COLOURS[index % len(_COLOURS)], _SHAPES[index % len(_SHAPES)]
        places = [at(x, y) for x, y, _ in one.points]
        if one.line and len(places) > 1:
            route = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{route}" fill="none" stroke="{colour}" stroke-opacity="0.45"/>')
        for (x, y), (_, _, name) in zip(places, one.points, strict=True):
            parts.append(_mark(x, y, colour, shape))
            if one.named:
                parts.append(f'<text x="{x + 6:.1f}" y="{y - 5:.1f}" class="small">{escape(name)}</text>')
        y = _TOP + 14 + 20 * index
        x = _WIDTH - _RIGHT + 18
        parts += [_mark(x, y - 4, colour, shape), f'<text x="{x + 12}" y="{y}">{escape(one.name)}</text>']
    _write(path, parts)


def _frame(title: str, x_label: str, y_label: str) -> list[str]:
    right, low = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    middle = (_TOP + low) / 2
    return [
        f'<text x="{_LEFT}" y="20" class="title">{escape(title)}</text>',
        f'<path d="M{_LEFT} {_TOP}V{low}H{right}" fill="none" class="axis"/>',
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
    ]


def _x_ticks(low: float, high: float, at: object, bottom: float) -> list[str]:
    parts = []
    for power in range(math.floor(low), math.ceil(high) + 1):
        for factor in (1, 2, 5):
            value = factor * 10.0**power
            if low <= math.log10(value) <= high:
                x, y = at(value, bottom)  # type: ignore[operator]
                parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{y:.1f}" class="grid"/>')
                parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{_short(value)}</text>')
    return parts


def _y_ticks(bottom: float, top: float, at: object, left: float) -> list[str]:
    step = 10.0 ** math.floor(math.log10((top - bottom) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (top - bottom) / (step * factor) <= 7)
    parts = []
    for count in range(math.ceil(bottom / step), math.floor(top / step) + 1):
        x, y = at(left, count * step)  # type: ignore[operator]
        parts.append(f'<line x1="{x:.1f}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{count * step:g}</text>')
    return parts


def _mark(x: float, y: float, colour: str, shape: str) -> str:
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if shape == "diamond" else ""
    return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"{turn}/>'


def _short(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _write(path: Path, parts: Sequence[str], height: int = _HEIGHT) -> None:
    style = (
        "text{font:12px system-ui,sans-serif;fill:#333}.small{font-size:10px}.title{font-size:14px;font-weight:600}"
        ".axis{stroke:#888}.grid{stroke:#888;stroke-opacity:.18}"
    )
    body = "\n".join(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{style}</style>\n{ground}\n{body}\n</svg>\n',
        encoding="utf-8",
    )
