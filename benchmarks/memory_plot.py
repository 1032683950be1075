"""The memory benchmark as one SVG: planned against measured on logarithmic axes, the diagonal, and a band of 10 % around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from qkit.report.svg import tag

SIZE, LEFT, TOP, BOTTOM = 560, 70, 56, 52
BAND = 0.10
NAMESPACE = "http://www.w3.org/2000/svg"
STYLE = """text{font:13px system-ui,sans-serif;fill:#333}.grid{stroke:#ddd}.band{fill:#2f6fb2;opacity:.12}.diagonal{stroke:#888}
.plain{fill:#2f6fb2;opacity:.75}.checkpointed{fill:none;stroke:#c2571a;stroke-width:2}.title{font-size:15px;font-weight:600}
@media(prefers-color-scheme:dark){svg{background:#16181c}text{fill:#ddd}.grid{stroke:#3a3d44}}"""


def plot(points: Sequence[dict[str, Any]]) -> str:
    """The SVG of some points that were planned and measured."""
    pairs = [(p["measured_peak_bytes"] / 2**30, p["predicted_peak_bytes"] / 2**30, p["checkpointing"]) for p in points]
    ends = [value for x, y, _ in pairs for value in (x, y)]
    low, high = _powers(min(ends), max(ends))
    scale = _Scale(low, high)
    body = [_grid(scale), _band(scale), *(_mark(scale, *pair) for pair in pairs), _words(points)]
    width, height = LEFT + SIZE + 20, TOP + SIZE + BOTTOM
    style = tag("style", Markup(STYLE))
    return f"{tag('svg', style, *body, xmlns=NAMESPACE, viewBox=f'0 0 {width} {height}', role='img')}\n"


class _Scale:
    """GiB to pixels, alike on both axes."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def at(self, value: float) -> float:
        return SIZE * math.log(value / self.low) / math.log(self.high / self.low)

    def x(self, value: float) -> float:
        return LEFT + self.at(value)

    def y(self, value: float) -> float:
        return TOP + SIZE - self.at(value)

    def ticks(self) -> list[float]:
        count = round(math.log2(self.high / self.low))
        return [self.low * 2**power for power in range(count + 1)]


def _powers(low: float, high: float) -> tuple[float, float]:
    """The powers of two around a range."""
    return 2.0 ** math.floor(math.log2(low)), 2.0 ** math.ceil(math.log2(high))


def _grid(scale: _Scale) -> Any:
    drawn = []
    for tick in scale.ticks():
        x, y = scale.x(tick), scale.y(tick)
        drawn.append(tag("path", class_="grid", d=f"M{x:.1f} {TOP}V{TOP + SIZE}M{LEFT} {y:.1f}H{LEFT + SIZE}"))
        drawn.append(tag("text", f"{tick:g}", x=x, y=TOP + SIZE + 20, text_anchor="middle"))
        drawn.append(tag("text", f"{tick:g}", x=LEFT - 10, y=y + 4.5, text_anchor="end"))
    return tag("g", *drawn)


def _band(scale: _Scale) -> Any:
    low, high = scale.low, scale.high
    over, under = high / (1 + BAND), low / (1 - BAND)
    corners = [(low, low), (low, low * (1 + BAND)), (over, high), (high, high), (high, high * (1 - BAND)), (under, low)]
    path = "L".join(f"{scale.x(x):.1f} {scale.y(y):.1f}" for x, y in corners)
    diagonal = f"M{scale.x(low):.1f} {scale.y(low):.1f}L{scale.x(high):.1f} {scale.y(high):.1f}"
    return tag("g", tag("path", class_="band", d=f"M{path}Z"), tag("path", class_="diagonal", d=diagonal))


def _mark(scale: _Scale, measured: float, planned: float, checkpointed: bool) -> Any:
    return tag(
        "circle", class_="checkpointed" if checkpointed else "plain", cx=scale.x(measured), cy=scale.y(planned), r=5
    )


def _words(points: Sequence[dict[str, Any]]) -> Any:
    title = f"Peak memory of training, {len(points)} points: planned (up) against measured (across), GiB"
    machines = ", ".join(sorted({point["hardware"] for point in points}))
    foot = f"filled: all activations kept; rings: checkpointed; band: 10 %; measured on: {machines}"
    return tag(
        "g",
        tag("text", title, class_="title", x=LEFT, y=28),
        tag("text", foot, x=LEFT, y=TOP + SIZE + 44),
    )
