from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.svgs import parsed, texts, widths
from qkit.report import svg as report_svg
from qkit.report.svg import Bar, WaterfallStep

FIGURES = st.floats(0, 1e9, allow_nan=False)


def test_bars_are_as_long_as_their_values_and_say_them() -> None:
    rows = [Bar("base", 10, "10.0"), Bar("adapter", 40, "40.0", note="30–50", low=30, high=50)]
    svg = report_svg.bars("c", "Score", "base 10", rows, top=100, width=500, ticks=(0, 50, 100))
    short, long = widths(svg)
    assert long == pytest.approx(4 * short, rel=0.01)
    assert texts(svg) == ["0", "50", "100", "base", "10.0", "adapter", "40.0", "30–50"]


def test_a_whisker_begins_and_ends_at_its_interval() -> None:
    svg = report_svg.bars("c", "", "", [Bar("a", 40, "40", low=20, high=60)], top=100, width=500)
    rect = next(parsed(svg).iter("rect"))
    whisker = next(path for path in parsed(svg).iter("path") if path.attrib["class"] == "whisker").attrib["d"]
    start, rest = whisker.removeprefix("M").split(" ", 1)
    end = rest.split("H")[1].split("M")[0]
    left, length = float(rect.attrib["x"]), float(rect.attrib["width"])
    assert float(start) - left == pytest.approx(length / 2, abs=0.2)
    assert float(end) - left == pytest.approx(length * 1.5, abs=0.2)


def test_waterfall_items_follow_each_other_and_totals_start_at_nought() -> None:
    rows = [
        WaterfallStep("a", 10, "10"),
        WaterfallStep("b", 30, "30"),
        WaterfallStep("planned", 40, "40", True),
        WaterfallStep("measured", 50, "50", True),
    ]
    a, b, planned, measured = parsed(report_svg.waterfall("m", "", "", rows, width=500)).iter("rect")
    at, width = (lambda r: float(r.attrib["x"])), (lambda r: float(r.attrib["width"]))
    assert at(b) == pytest.approx(at(a) + width(a), abs=0.2)
    assert at(planned) == at(measured) == at(a)
    assert at(b) + width(b) == pytest.approx(at(planned) + width(planned), abs=0.2)
    assert width(measured) == pytest.approx(1.25 * width(planned), rel=0.01)


@pytest.mark.parametrize("points", [[(1.0, 0.5)], [(1.0, 0.5), (2.0, 0.5)], [(1.0, 2.0), (2.0, -1.0)]])
def test_a_curve_of_any_points_can_be_drawn(points: list[report_svg.Point]) -> None:
    svg = report_svg.curve("l", "Loss", "", points, [], width=400, height=100)
    assert "nan" not in svg
    assert texts(svg)[-1] == f"{points[-1][1]:.3g}"


def test_a_curve_beside_another_is_in_the_same_frame() -> None:
    loss, beside = [(1.0, 2.0), (9.0, 1.0)], [(4.0, 3.0), (8.0, 0.5)]
    svg = report_svg.curve("l", "Loss", "", loss, [], width=400, height=100, beside=beside)
    dots = [circle for circle in parsed(svg).iter("circle") if circle.attrib["class"] == "dot"]
    high, low = (float(dot.attrib["cy"]) for dot in dots)
    assert len(dots) == 2 and 0 < high < low < 100
    last = next(circle for circle in parsed(svg).iter("circle") if circle.attrib["class"] == "end")
    assert float(last.attrib["cx"]) > max(float(dot.attrib["cx"]) for dot in dots)


@pytest.mark.parametrize("svg", [
    report_svg.bars("x", "T", "D", [Bar("<i>", 1, "&")], top=1, width=100),
    report_svg.waterfall("x", "T", "D", [WaterfallStep("<i>", 1, "&")], width=100),
    report_svg.curve("x", "T", "D", [(0, 1), (1, 2)], [], width=100, height=100),
])  # fmt: skip
def test_every_chart_is_named_and_well_formed(svg: str) -> None:
    root = parsed(svg)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-labelledby"] == "x-title x-desc"
    assert [(child.tag, child.attrib["id"], child.text) for child in root[:2]] == [
        ("title", "x-title", "T"), ("desc", "x-desc", "D"),
    ]  # fmt: skip
    assert root.find(".//i") is None


@settings(deadline=None)
@given(st.tuples(FIGURES, FIGURES).map(sorted), st.integers(2, 8))
def test_ticks_enclose_the_figures_and_stay_few(ends: list[float], count: int) -> None:
    low, high = ends
    ticks = report_svg.nice_ticks(low, high, count)
    slack = 1e-9 * max(1e-3, high)
    assert ticks == sorted(ticks)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert len(ticks) <= count + 3


@settings(deadline=None)
@given(st.lists(FIGURES, min_size=1), st.integers(1, 9))
def test_smoothing_keeps_the_steps_and_the_range(values: list[float], window: int) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    smooth = report_svg.smoothed(points, window)
    assert [step for step, _ in smooth] == [step for step, _ in points]
    slack = 1e-6 * (1 + max(values))
    assert all(min(values) - slack <= value <= max(values) + slack for _, value in smooth)
