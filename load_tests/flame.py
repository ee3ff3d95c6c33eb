"""A flame graph as SVG text: weighted stacks, outermost frame at the bottom, drawn without a library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from zlib import crc32

WIDTH, ROW, TOP, LETTER = 1400, 17, 40, 6.6
LEAST = 0.0015
"""Of the width: narrower frames, and what they called, are not drawn."""

Stacks = Mapping[tuple[str, ...], float]


@dataclass(slots=True)
class _Frame:
    weight: float = 0.0
    called: dict[str, _Frame] = field(default_factory=dict)


def flame_graph(title: str, unit: str, stacks: Stacks) -> str:
    """Widths are weights; each frame's name, weight and share are its tooltip. ValueError when nothing weighs anything."""
    root = _Frame()
    for stack, weight in stacks.items():
        if weight <= 0:
            continue
        root.weight += weight
        frame = root
        for name in stack:
            frame = frame.called.setdefault(name, _Frame())
            frame.weight += weight
    if root.weight <= 0:
        raise ValueError(f"flame graph {title!r} has no stack that weighs anything")
    drawn = list(_boxes(root, 0, 0.0, root.weight))
    rows = 1 + max((depth for depth, *_ in drawn), default=0)
    height = TOP + rows * ROW + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="monospace" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="22" font-family="sans-serif" font-size="15">{escape(title)}</text>',
    ]
    for depth, at, weight, name in drawn:
        x, width, y = at * WIDTH, weight / root.weight * WIDTH, height - 10 - (depth + 1) * ROW
        letters = int(width / LETTER)
        said = f"{name}: {weight:.4g} {unit}, {weight / root.weight:.1%}"
        text = name if len(name) <= letters else name[: letters - 1] + "…" if letters > 3 else ""
        parts.append(
            f'<g><title>{escape(said)}</title><rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 1}" fill="{_colour(name)}"/>'
            + (f'<text x="{x + 2:.1f}" y="{y + 12}">{escape(text)}</text>' if text else "")
            + "</g>"
        )
    return "\n".join([*parts, "</svg>\n"])


def _boxes(frame: _Frame, depth: int, at: float, whole: float) -> Iterator[tuple[int, float, float, str]]:
    """Depth, left end as a share of the width, weight and name of each frame that is drawn."""
    for name, called in sorted(frame.called.items()):
        if called.weight / whole >= LEAST:
            yield depth, at, called.weight, name
            yield from _boxes(called, depth + 1, at, whole)
        at += called.weight / whole


def _colour(name: str) -> str:
    """The same for the same file: of ours warm, of libraries grey."""
    place = name.partition("(")[2] or name
    tone = crc32(place.encode()) % 40
    return (
        f"hsl({15 + tone} 85% {62 + tone % 9}%)"
        if "recsys/" in place or "services/" in place
        else f"hsl(210 12% {74 + tone % 12}%)"
    )
