"""A line chart as SVG text: figures of a result file, drawn without a library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 420, 70, 50, 210, 60
COLOURS = (
    "#1b6ca8",
    "#c8553d",
    "#3a7d44",
    "#7d4e9e",
    "#b8860b",
    "#4a4a4a",
    "#00838f",
    "#d81b60",
    "#9e9d24",
    "#5d4037",
    "#90a4ae",
)

Series = Mapping[str, Sequence[tuple[float, float]]]


def line_chart(title: str, x_title: str, y_title: str, series: Series, log_x: bool = True, zoom: bool = False) -> str:
    """Lines of points (x, y); y from 0 on, or (`zoom`) around the values; x on a logarithmic scale unless told. ValueError without a point."""
    points = [point for line in series.values() for point in line]
    if not points:
        raise ValueError(f"chart {title!r} has no point")
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    bottom, top = 0.0, _nice(max(y for _, y in points))
    if zoom:
        step = _nice(max(y for _, y in points) - min(y for _, y in points)) / 4 or top / 100
        bottom = step * math.floor(min(y for _, y in points) / step)
        top = bottom + 5 * step

    def across(x: float) -> float:
        scale = math.log10 if log_x else float
        share = (scale(x) - scale(low)) / ((scale(high) - scale(low)) or 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (y - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 16}">{escape(x_title)}</text>',
        f'<text x="{LEFT - 54}" y="{TOP - 10}">{escape(y_title)}</text>',
    ]
    for n in range(6):
        y = bottom + (top - bottom) * n / 5
        parts.append(
            f'<line x1="{LEFT}" y1="{up(y):.1f}" x2="{WIDTH - RIGHT}" y2="{up(y):.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 8}" y="{up(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        )
    for x in sorted({x for x, _ in points}):
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_short(x)}</text>')
    for n, (name, line) in enumerate(series.items()):
        colour, ordered = COLOURS[n % len(COLOURS)], sorted(line)
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in ordered)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{colour}"/>' for x, y in ordered]
        at = TOP + 18 * n
        parts.append(
            f'<rect x="{WIDTH - RIGHT + 16}" y="{at - 9}" width="12" height="4" fill="{colour}"/>'
            f'<text x="{WIDTH - RIGHT + 34}" y="{at - 3}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _nice(value: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is not below the value."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value)


def _short(x: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:g}{letter}"
    return f"{x:g}"
