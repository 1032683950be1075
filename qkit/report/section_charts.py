"""Draws the charts that a task adds to the report: counts as a matrix, and points over two axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from qkit.plugins.sections import Bin, Matrix, Plot, Point, Series
from qkit.report._marks import LETTER, frame, level, nice_ticks, polyline, short, tag, vertical, words

WIDTH = 1088  # CSS pixels: a section of a task fills the page
HEAD, TAIL = 14, 15  # letters of a label in a chart, where it is longer than both; tables have the whole name
WIDE = 8.0  # width of a letter, for labels that stand at an edge
CELL, CELL_HEIGHT = 56.0, 28.0
LEAST, MOST = 0.1, 0.55  # opacity of a cell; at most so much that the text on it is readable in both colour schemes
PLOT_HEIGHT, BINS_HEIGHT = 260.0, 44.0
LEFT, RIGHT, TOP = 56.0, WIDTH - 16.0, 34.0
DASH = "6 4"
CROWD = 100  # points; more of them are drawn smaller


def drawn(chart: Matrix | Plot) -> Markup:
    """A chart as SVG."""
    return matrix(chart) if isinstance(chart, Matrix) else plot(chart)


def matrix(chart: Matrix) -> Markup:
    """Counts by row and column. The shade is the share of the row: right ones in the accent colour, errors in grey."""
    rows, columns = ([_label(name) for name in names] for names in (chart.rows, chart.columns))
    corner = (f"{chart.axes[1]} →", f"{chart.axes[0]} ↓")
    left = WIDE * max(map(len, (*rows, *corner))) + 14
    top = WIDE * max(5, *map(len, columns)) + 14
    size = min(CELL, (WIDTH - left) / len(columns))
    drawn = [words(text, left - 10, top - 24 + 17 * n, "tick", anchor="end") for n, text in enumerate(corner)]
    drawn += [_upright(text, left + size * (n + 0.5) + 4.5, top - 8) for n, text in enumerate(columns)]
    for number, (name, counts) in enumerate(zip(chart.rows, chart.counts, strict=True)):
        y = top + CELL_HEIGHT * number
        drawn.append(words(rows[number], left - 10, y + CELL_HEIGHT / 2 + 4.5, "label", anchor="end"))
        for place, count in enumerate(counts):
            if count:
                right = name == chart.columns[place]
                drawn.append(_cell(count, sum(counts), left + size * place, y, size, right))
    lines = [vertical(left + size * n, top, top + CELL_HEIGHT * len(rows), "") for n in range(len(columns) + 1)]
    height = top + CELL_HEIGHT * len(rows) + 2
    return frame(chart.name, chart.title, _in_words(chart), WIDTH, height, [*lines, *drawn])


def _label(name: str) -> str:
    """The name, without its middle if it is long: names of one set often begin alike."""
    return name if len(name) <= HEAD + TAIL + 1 else f"{name[:HEAD]}…{name[-TAIL:]}"


def _upright(content: str, x: float, y: float) -> Markup:
    """Text that reads from below."""
    return tag("text", content, class_="label", transform=f"translate({short(x)} {short(y)}) rotate(-90)")


def _cell(count: int, of_row: int, x: float, y: float, size: float, right: bool) -> Markup:
    kind = "cell" if right else "cell miss"
    shade = f"{LEAST + (MOST - LEAST) * count / of_row:.2f}"
    body = tag("rect", class_=kind, x=x + 1, y=y + 1, width=size - 2, height=CELL_HEIGHT - 2, rx=2, fill_opacity=shade)
    text = words(_count(count), x + size / 2, y + CELL_HEIGHT / 2 + 4.5, "value" if right else "label", anchor="middle")
    return body + text


def _count(count: int) -> str:
    """At most four letters."""
    return str(count) if count < 1000 else f"{count / 1000:.{0 if count >= 9950 else 1}f}k"


def _in_words(chart: Matrix) -> str:
    """Each row of the matrix: its sum, and its counts from the largest."""
    texts = []
    for name, counts in zip(chart.rows, chart.counts, strict=True):
        pairs = sorted(zip(counts, chart.columns, strict=True), key=lambda pair: -pair[0])
        texts.append(f"{name} ({sum(counts)}): " + ", ".join(f"{count} {other}" for count, other in pairs if count))
    return f"{chart.axes[0]} (rows): {chart.axes[1]}. " + "; ".join(texts)


def plot(chart: Plot) -> Markup:
    """Points over two axes, with a legend above, and how many rows there are along the x axis below."""
    x_ticks, y_ticks = (_ticks(chart, axis) for axis in (0, 1))
    bottom = TOP + PLOT_HEIGHT
    x_scale = (RIGHT - LEFT) / ((x_ticks[-1] - x_ticks[0]) or 1)
    y_scale = PLOT_HEIGHT / ((y_ticks[-1] - y_ticks[0]) or 1)

    def place(point: Point) -> Point:
        return LEFT + (point[0] - x_ticks[0]) * x_scale, bottom - (point[1] - y_ticks[0]) * y_scale

    grid = [level(LEFT, RIGHT, place((x_ticks[0], tick))[1], f"{tick:g}") for tick in y_ticks]
    feet = [words(f"{tick:g}", place((tick, 0))[0], bottom + 18, "tick", anchor="middle") for tick in x_ticks]
    drawn = [_series(series, place) for series in chart.series]
    base = bottom + 18 + (24 + BINS_HEIGHT if chart.bins else 0)
    bars = _histogram(chart.bins, base, lambda x: place((x, 0))[0]) if chart.bins else []
    axes = [words(chart.axes[1], 0, 13, "tick"), words(chart.axes[0], RIGHT, base + 20, "tick", anchor="end")]
    content = [*grid, *feet, *drawn, *bars, *axes, *_legend(chart.series)]
    return frame(chart.name, chart.title, chart.description, WIDTH, base + 26, content)


def _ticks(chart: Plot, axis: int) -> list[float]:
    extent = (chart.x_range, chart.y_range)[axis]
    values = [point[axis] for series in chart.series for point in series.points]
    low, high = extent or (min(values), max(values))
    return nice_ticks(low, high, 5)


def _series(series: Series, place: Callable[[Point], Point]) -> Markup:
    points = [place(point) for point in series.points]
    if series.joined:
        return polyline(points, "smooth" if series.strong else "plain", None if series.strong else DASH)
    radius = 4 if len(points) <= CROWD else 2.5
    return Markup().join(tag("circle", class_=_dot(series), cx=x, cy=y, r=radius) for x, y in points)


def _dot(series: Series) -> str:
    return "end" if series.strong else "dot"


def _legend(series: Sequence[Series]) -> list[Markup]:
    """Each series' mark and label, in one line that ends above the right end of the plot."""
    drawn: list[Markup] = []
    x = RIGHT
    for one in reversed(series):
        drawn.append(words(one.label, x, 13, "label", anchor="end"))
        x -= LETTER * len(one.label) + 8
        if one.joined:
            drawn.append(polyline([(x - 24, 8.5), (x, 8.5)], "smooth" if one.strong else "plain", DASH))
        else:
            drawn.append(tag("circle", class_=_dot(one), cx=x - 6, cy=8.5, r=4))
        x -= 44
    return drawn


def _histogram(bins: Sequence[Bin], base: float, place: Callable[[float], float]) -> list[Markup]:
    """A bar for each bin, its rows above it."""
    most = max(one.rows for one in bins)
    drawn = []
    for one in bins:
        left, right = place(one.low), place(one.high)
        height = max((BINS_HEIGHT - 16) * one.rows / most, 1)
        drawn.append(
            tag("rect", class_="bar", x=left + 1, y=base - height, width=max(right - left - 2, 1), height=height)
        )
        drawn.append(words(_count(one.rows), (left + right) / 2, base - height - 4, "tick", anchor="middle"))
    return drawn
