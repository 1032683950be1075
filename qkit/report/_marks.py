"""Marks that charts are made of: text, lines and the frame of an SVG, as markup. Colours and fonts are the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Iterable

from markupsafe import Markup, escape

LETTER = 7.0  # width of an average letter at the page's 13 px; wide enough for labels never to be cut
TEXT = 13.0  # height of a line of text

Point = tuple[float, float]


def tag(name: str, *content: str, **attributes: str | float | None) -> Markup:
    """One element; content and attributes are escaped unless they are markup already. `class_` is written `class`."""
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    written = "".join(f' {key}="{escape(short(value))}"' for key, value in pairs)
    return Markup(f"<{name}{written}>{''.join(map(escape, content))}</{name}>")


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers, 1, 2 or 5 times a power of ten apart, that enclose `low` and `high`."""
    size = max(abs(low), abs(high))
    span = high - low if high - low > 1e-6 * size else size
    span = span if span > 1e-12 else 1.0  # figures that are all the same, or all nought
    power = 10.0 ** math.floor(math.log10(span / count))
    gap = next(power * factor for factor in (1, 2, 5, 10) if power * factor * count >= span * 0.999)
    first, last = math.floor(low / gap), math.ceil(high / gap)
    return [float(f"{i * gap:.12g}") for i in range(first, last + 1)]


def polyline(points: Iterable[Point], kind: str, dash: str | None = None) -> Markup:
    """A line through points; nothing without points. `dash`: lengths of dashes and gaps."""
    path = "L".join(f"{short(x)} {short(y)}" for x, y in points)
    return tag("path", class_=kind, d=f"M{path}", stroke_dasharray=dash) if path else Markup()


def vertical(x: float, top: float, bottom: float, label: str) -> Markup:
    """A grid line upright, its label below."""
    line = tag("path", class_="grid", d=f"M{short(x)} {short(top)}V{short(bottom)}")
    return line + (words(label, x, bottom + 18, "tick", anchor="middle") if label else Markup())


def level(start: float, end: float, y: float, label: str) -> Markup:
    """A grid line across, its label on the left."""
    line = tag("path", class_="grid", d=f"M{short(start)} {short(y)}H{short(end)}")
    return line + words(label, start - 10, y + 4.5, "tick", anchor="end")


def words(content: str, x: float, y: float, kind: str, anchor: str | None = None) -> Markup:
    """Text whose line begins at (x, y), or ends or has its middle there."""
    return tag("text", content, class_=kind, x=x, y=y, text_anchor=anchor)


def frame(name: str, title: str, description: str, width: float, height: float, content: Iterable[Markup]) -> Markup:
    """The whole chart: its title and description for screen readers, then its marks."""
    heading = tag("title", title, id=f"{name}-title") + tag("desc", description, id=f"{name}-desc")
    labelled = f"{name}-title {name}-desc"
    view = f"0 0 {short(width)} {short(height)}"
    return tag("svg", heading, *content, viewBox=view, role="img", aria_labelledby=labelled)


def short(value: str | float) -> str:
    """A coordinate with no more digits than can be seen."""
    return value if isinstance(value, str) else f"{round(value, 1):g}"
