from __future__ import annotations

import json
from itertools import pairwise
from math import log10
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from helpers.sample import SAMPLE, open_sample
from helpers.svgs import parsed, texts
from qkit.core.errors import MissingArtifact, MissingExtra
from qkit.report import bench_charts
from qkit.report import svg as report_svg
from qkit.report.bench_charts import pareto
from qkit.report.svg import Line

SVG = "{http://www.w3.org/2000/svg}"


def dots(svg: str) -> list[tuple[float, float]]:
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in parsed(svg).iter("circle")]


def plane(*lines: Line, joined: bool = True, lowest: float | None = 0.0) -> str:
    return report_svg.plane("p", "T", "D", lines, axes=("x", "y"), width=400, height=200, joined=joined, lowest=lowest)


def test_points_are_where_their_figures_say() -> None:
    svg = plane(Line("l", [(0, 0), (5, 10), (10, 20)], ("1", "2", "3")))
    a, b, c = dots(svg)
    assert b[0] - a[0] == pytest.approx(c[0] - b[0], abs=0.2)
    assert a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.2) and b[1] < a[1]
    assert {"1", "2", "3", "l", "x", "y"} <= set(texts(svg))


def test_labels_of_like_points_do_not_cover_each_other() -> None:
    svg = plane(*(Line(f"line {i}", [(1, 1)], ("",)) for i in range(4)), joined=False)
    heights = sorted(float(t.attrib["y"]) for t in parsed(svg).iter("text") if (t.text or "").startswith("line"))
    assert len(heights) == 4 and all(b - a >= report_svg.TEXT for a, b in pairwise(heights))


@pytest.mark.parametrize("points", [[(0.0, 0.0)], [(3.0, 3.0), (3.0, 3.0)], [(1.0, 50.0), (2.0, 51.0)]])
def test_any_points_can_be_drawn(points: list[report_svg.Point]) -> None:
    for lowest in (0.0, None):
        assert "nan" not in plane(Line("l", points, ("",) * len(points)), lowest=lowest)


def test_lines_differ_by_more_than_colour() -> None:
    svg = plane(*(Line(str(i), [(0, i), (1, i)]) for i in range(3)))
    paths = [p.attrib.get("stroke-dasharray") for p in parsed(svg).iter("path") if p.attrib["class"] == "plain"]
    assert len(set(paths)) == 3


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ({"fast": (9, 1), "good": (1, 9), "neither": (1, 1)}, {"fast", "good"}),
        ({"a": (1, 1), "b": (1, 1)}, {"a", "b"}),
        ({"a": (1, 1), "b": (1, 2)}, {"b"}),
        ({}, set()),
    ],
)
def test_who_is_beaten(points: dict[str, tuple[float, float]], front: set[str]) -> None:
    assert pareto(points) == front


def test_charts_say_the_figures_of_the_records(tmp_path: Path) -> None:
    found = bench_charts.charts_of(open_sample(tmp_path))
    assert list(found) == ["latency", "memory-over-time", "quality"]
    record = json.loads((SAMPLE / "bench" / "vllm-c8.json").read_text(encoding="utf-8"))
    said = f"8 at once {record['output_tokens_per_second']:.4g} tokens/s, {record['e2e_seconds']['p50']:.3g} s"
    assert said in found["latency"][1]
    assert "onnx-int4 (beaten)" in found["quality"][1] and "vllm (beaten)" not in found["quality"][1]
    assert (
        f"vllm × 8: at most {record['memory']['rss_tree_peak_bytes'] / 2**30:.2f} GiB" in found["memory-over-time"][1]
    )


def test_size_is_that_of_the_folders(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    for name, size in (("onnx-fp32", 5_000_000), ("onnx-int4", 1_000_000), ("vllm", 6_000_000)):
        folder = run.folder("export") / name
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"x" * size)
    said = bench_charts.charts_of(run)["size"][1]
    parity = json.loads((SAMPLE / "verify" / "parity.json").read_text(encoding="utf-8"))["parity"]
    assert f"onnx-int4: 1 MB on disk, {-log10(parity['onnx-int4']['kl_mean']):.2f}" in said
    (run.folder("export") / "vllm" / "adapter_config.json").write_text("{}")
    assert "vllm" not in bench_charts.charts_of(run)["size"][1]


def test_files_stand_alone(tmp_path: Path) -> None:
    written = bench_charts.write(open_sample(tmp_path), tmp_path / "charts", png=False)
    assert [path.name for path in written] == ["latency.svg", "memory-over-time.svg", "quality.svg"]
    for path in written:
        root = ET.fromstring(path.read_text(encoding="utf-8"))
        assert root.tag == f"{SVG}svg" and root[0].tag == f"{SVG}style" and root[1].tag == f"{SVG}title"
        assert float(root.attrib["width"]) == bench_charts.WIDTH
        used = {name for e in root.iter() for name in (e.attrib.get("class") or "").split()}
        assert not [name for name in used if f".{name} " not in (root[0].text or "")]


def test_what_cannot_be_drawn_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingArtifact, match="no bench records to draw"):
        bench_charts.write(open_sample(tmp_path, without="bench"), tmp_path / "charts", png=False)
    import sys

    monkeypatch.setitem(sys.modules, "cairosvg", None)
    (tmp_path / "other").mkdir()
    with pytest.raises(MissingExtra, match="pip install cairosvg"):
        bench_charts.write(open_sample(tmp_path / "other"), tmp_path / "charts", png=True)
