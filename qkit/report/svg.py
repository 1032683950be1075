"""Charts as inline SVG: pure functions from figures to markup. Colours, fonts and dark mode are the page's CSS.

Every chart has a title and a description for screen readers, and writes its figures as text: colour says nothing alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from qkit.report._marks import LETTER, TEXT, Point, frame, level, nice_ticks, polyline, short, tag, vertical, words

ROW = 30
BAR = 14


@dataclass(frozen=True)
class Bar:
    """One bar of a chart; a whisker runs from `low` (or else the bar's end) to `high`.

    `text` is the figure at the right, `note` what stands smaller beside it. `strong` bars are in the accent colour.
    """

    label: str
    value: float
    text: str
    note: str = ""
    low: float | None = None
    high: float | None = None
    strong: bool = False


@dataclass(frozen=True)
class WaterfallStep:
    """One item of a waterfall: it starts where the one before ended. A total starts at 0, in the accent colour."""

    label: str
    value: float
    text: str
    total: bool = False


@dataclass(frozen=True)
class Line:
    """Points of one kind. `texts` stand at the points, the label beside the last; `strong` is in the accent colour."""

    label: str
    points: Sequence[Point]
    texts: Sequence[str] = ()
    strong: bool = False


def bars(
    name: str,
    title: str,
    description: str,
    rows: Sequence[Bar],
    *,
    top: float,
    width: int,
    ticks: Sequence[float] = (),
) -> Markup:
    """Horizontal bars from 0 to `top`, one row each, whiskers where there is an interval, grid lines at `ticks`."""
    left = LETTER * max(len(row.label) for row in rows) + 14
    notes = LETTER * max(len(row.note) for row in rows)
    figures = width - notes - (8 if notes else 0)
    scale = (figures - LETTER * max(len(row.text) for row in rows) - 14 - left) / (top or 1)
    height = ROW * len(rows)
    grid = [vertical(left + tick * scale, 0, height, f"{tick:g}") for tick in ticks]
    middles = [ROW * index + ROW / 2 for index in range(len(rows))]
    drawn = [_bar(row, left, scale, figures, middle) for row, middle in zip(rows, middles, strict=True)]
    noted = ((row.note, middle) for row, middle in zip(rows, middles, strict=True) if row.note)
    drawn += [words(note, width, middle + 4.5, "tick", anchor="end") for note, middle in noted]
    return frame(name, title, description, width, height + (22 if ticks else 0), [*grid, *drawn])


def _bar(row: Bar, left: float, scale: float, right: float, middle: float) -> Markup:
    kind = "bar strong" if row.strong else "bar"
    body = tag("rect", class_=kind, x=left, y=middle - BAR / 2, width=max(row.value * scale, 1), height=BAR, rx=2)
    whisker = Markup()
    if row.high is not None:
        low = row.value if row.low is None else row.low
        whisker = _whisker(left + low * scale, left + row.high * scale, middle, capped=row.low is not None)
    label = words(row.label, left - 10, middle + 4.5, "label", anchor="end")
    return label + body + whisker + words(row.text, right, middle + 4.5, "value", anchor="end")


def _whisker(start: float, end: float, middle: float, *, capped: bool) -> Markup:
    caps = "".join(f"M{short(x)} {short(middle - 5)}v10" for x in ((start, end) if capped else (end,)))
    path = f"M{short(start)} {short(middle)}H{short(end)}{caps}"
    return tag("path", class_="halo", d=path) + tag("path", class_="whisker", d=path)  # the halo parts it from the bar


def waterfall(name: str, title: str, description: str, rows: Sequence[WaterfallStep], *, width: int) -> Markup:
    """Items one after the other, each where the one before ended; totals from 0, with a line through all rows."""
    left = LETTER * max(len(row.label) for row in rows) + 14
    right = LETTER * max(len(row.text) for row in rows) + 14
    starts = _starts(rows)
    scale = (width - left - right) / (max(s + row.value for s, row in zip(starts, rows, strict=True)) or 1)
    drawn: list[Markup] = [vertical(left + row.value * scale, 0, ROW * len(rows), "") for row in rows if row.total]
    for index, (start, row) in enumerate(zip(starts, rows, strict=True)):
        drawn.append(_step(row, left, start * scale, row.value * scale, width, ROW * index + ROW / 2))
    return frame(name, title, description, width, ROW * len(rows), drawn)


def _starts(rows: Sequence[WaterfallStep]) -> list[float]:
    """Where each row begins: totals at 0, items at the sum of the items before them."""
    return [0.0 if row.total else sum(r.value for r in rows[:i] if not r.total) for i, row in enumerate(rows)]


def _step(row: WaterfallStep, left: float, start: float, length: float, width: float, middle: float) -> Markup:
    kind = "bar strong" if row.total else "bar"
    body = tag("rect", class_=kind, x=left + start, y=middle - BAR / 2, width=max(length, 1), height=BAR, rx=2)
    label = words(row.label, left - 10, middle + 4.5, "label", anchor="end")
    return label + body + words(row.text, width, middle + 4.5, "value", anchor="end")


def curve(
    name: str,
    title: str,
    description: str,
    raw: Sequence[Point],
    smooth: Sequence[Point],
    *,
    width: int,
    height: int,
    beside: Sequence[Point] = (),
) -> Markup:
    """A curve over steps: `raw` thin and grey, `smooth` on top in the accent colour, the last value at its end.

    `beside`: another curve, broken, with a dot at each point.
    """
    last = f"{(smooth or raw)[-1][1]:.3g}"
    left, right, bottom, over = 56, LETTER * len(last) + 24, 24, 8
    xs, ys = [x for x, _ in (*raw, *beside)], [y for _, y in (*raw, *beside)]
    y_ticks = nice_ticks(min(ys), max(ys), 4)
    low, high = min(*ys, *y_ticks), max(*ys, *y_ticks)
    x_scale = (width - left - right) / ((max(xs) - min(xs)) or 1)
    y_scale = (height - bottom - over) / ((high - low) or 1)

    def place(point: Point) -> Point:
        return left + (point[0] - min(xs)) * x_scale, over + (high - point[1]) * y_scale

    grid = [level(left, width - right, place((min(xs), tick))[1], f"{tick:g}") for tick in y_ticks]
    steps = [tick for tick in nice_ticks(min(xs), max(xs), 6) if tick.is_integer() and min(xs) <= tick <= max(xs)]
    feet = [words(f"{tick:g}", place((tick, low))[0], height - 4, "tick", anchor="middle") for tick in steps]
    lines = [polyline(map(place, raw), "raw" if smooth else "smooth"), polyline(map(place, smooth), "smooth")]
    end_x, end_y = place((smooth or raw)[-1])
    end = [tag("circle", class_="end", cx=end_x, cy=end_y, r=3), words(last, end_x + 9, end_y + 4.5, "value")]
    other = _series(Line("", beside), list(map(place, beside)), DASHES[1], joined=True) if beside else Markup()
    dots = [tag("circle", class_="dot", cx=x, cy=y, r=3) for x, y in map(place, beside)]
    return frame(name, title, description, width, height, [*grid, *feet, *lines, other, *dots, *end])


DASHES = (None, "6 3", "2 3", "9 3 2 3")  # colour says nothing alone


def plane(
    name: str,
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    axes: tuple[str, str],
    width: int,
    height: int,
    joined: bool = True,
    lowest: float | None = 0.0,
) -> Markup:
    """Lines or points over two axes, titled `axes`. `lowest`: where the upright axis begins; None: near the least value."""
    xs, ys = ([point[axis] for line in lines for point in line.points] for axis in (0, 1))
    x_ticks = nice_ticks(min(0.0, *xs), max(xs), 5)
    y_ticks = nice_ticks(min(ys) if lowest is None else lowest, max(ys), 4)
    longest = max(len(line.label) for line in lines)
    left, right, top, bottom = 56.0, width - LETTER * longest - 16, 26.0, height - 44.0
    x_scale = (right - left) / ((x_ticks[-1] - x_ticks[0]) or 1)
    y_scale = (bottom - top) / ((y_ticks[-1] - y_ticks[0]) or 1)

    def place(point: Point) -> Point:
        return left + (point[0] - x_ticks[0]) * x_scale, bottom - (point[1] - y_ticks[0]) * y_scale

    grid = [level(left, right, place((0, tick))[1], f"{tick:g}") for tick in y_ticks]
    feet = [words(f"{tick:g}", place((tick, 0))[0], bottom + 18, "tick", anchor="middle") for tick in x_ticks]
    named = [words(axes[0], right, bottom + 36, "tick", anchor="end"), words(axes[1], 0, TEXT, "tick")]
    placed = [[place(point) for point in line.points] for line in lines]
    drawn = [
        _series(line, points, DASHES[i % len(DASHES)], joined)
        for i, (line, points) in enumerate(zip(lines, placed, strict=True))
    ]
    return frame(name, title, description, width, height, [*grid, *feet, *named, *drawn, *_labels(lines, placed)])


def _series(line: Line, points: Sequence[Point], dash: str | None, joined: bool) -> Markup:
    kind = "smooth" if line.strong else "plain"
    path = "L".join(f"{short(x)} {short(y)}" for x, y in points)
    drawn = tag("path", class_=kind, d=f"M{path}", stroke_dasharray=dash) if joined and len(points) > 1 else Markup()
    if joined and not line.texts:
        return drawn
    dots = [tag("circle", class_="end" if line.strong else "dot", cx=x, cy=y, r=3) for x, y in points]
    texts = [words(text, x, y - 7, "tick", anchor="middle") for text, (x, y) in zip(line.texts, points, strict=False)]
    return drawn + Markup().join([*dots, *texts])


def _labels(lines: Sequence[Line], placed: Sequence[Sequence[Point]]) -> list[Markup]:
    """A label at the right of each line's last point, moved up where another one stands."""
    drawn: list[Markup] = []
    taken: list[tuple[float, float, float]] = []  # from, to, height
    for line, points in zip(lines, placed, strict=True):
        x, y = points[-1]
        start, length = x + 8, LETTER * len(line.label)
        while any(a < start + length and start < b and abs(y - other) < TEXT for a, b, other in taken):
            y -= TEXT / 2
        taken.append((start, start + length, y))
        drawn.append(words(line.label, start, y + 4.5, "value" if line.strong else "label"))
    return drawn


def share(fraction: float) -> Markup:
    """A small bar for a table cell; the figure beside it says the same, so screen readers skip it."""
    body = tag("rect", class_="bar", x=0, y=0, width=max(100 * fraction, 0.5), height=8, rx=1.5)
    return tag("svg", body, class_="share", viewBox="0 0 100 8", preserveAspectRatio="none", aria_hidden="true")


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """Mean over the `window` points around each; near the ends over those that are there."""
    half = window // 2
    near = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    return [(point[0], sum(y for _, y in some) / len(some)) for point, some in zip(points, near, strict=True)]
