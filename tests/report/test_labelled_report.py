"""The report, the screen and the card of a run with labels: what they say is what evaluate measured."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import jsonschema
import numpy as np
import pytest
from rich.console import Console

from helpers.labelled_sample import evaluated_run
from helpers.pages import HOSTILE, Page
from helpers.sample import edit, open_sample
from helpers.schemas import SHOW_SCHEMA, closed
from helpers.svgs import parsed, texts
from helpers.tiny_labelled import build_model, labelled_run
from qkit import pipeline
from qkit.plugins.sections import Cell, Column, Figure, Matrix, Plot, Section, Series, Table
from qkit.report import further, model_card, section_charts
from qkit.report import screen as report_screen
from qkit.report import stage as report_stage
from qkit.report import summary as report_summary
from qkit.run.directory import Run
from qkit.tasks._encoder.metrics.classes import confusion
from qkit.tasks.classify import Classify

MANY = [f"{first}_{last}_label" for first in ("account", "balance", "card", "deposit", "exchange") for last in "abcdef"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return evaluated_run(tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Thirty labels, of which the last has no held-out row."""
    return evaluated_run(tmp_path_factory.mktemp("many"), MANY, rows=290, noise=1.5, present=29)


def measured(run: Run) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((run.folder("evaluate") / "scores.json").read_text())["scores"]
    return scores


def lines(run: Run) -> list[dict[str, Any]]:
    known = map(json.loads, (run.folder("evaluate") / "predictions.jsonl").read_text().splitlines())
    return [line for line in known if line["artifact"] == run.recipe.trained_as]


def part(run: Run, section: str, kind: type, number: int = 0) -> Any:
    parts = next(each for each in further.sections(run) if each.id == section).parts
    return [each for each in parts if isinstance(each, kind)][number]


def values(table: Table, column: int) -> list[Any]:
    return [row[column].value if isinstance(row[column], Cell) else row[column] for row in table.rows]  # type: ignore[union-attr]


# --- what the sections say --------------------------------------------------------------------------------------------


def test_predictions_have_the_most_likely_labels(many: Run) -> None:
    for line in lines(many):
        top = list(line["top"].values())
        assert len(top) == 5 and top == sorted(top, reverse=True) and sum(top) <= 1 + 1e-5
        assert next(iter(line["top"])) == line["prediction"]
        assert top[0] == pytest.approx(line["confidence"], abs=1e-6)


def test_figures_of_labels_are_those_of_evaluate(run: Run) -> None:
    table, metrics = part(run, "labels", Table), measured(run)["adapter"]["metrics"]
    names = values(table, 0)
    assert sorted(names) == ["fruit", "tree", "wood"] and values(table, 1) == [20, 20, 20]
    for column, figure in enumerate(("precision", "recall", "f1"), 2):
        assert values(table, column) == [metrics[f"{figure}:{name}"]["value"] for name in names]
    assert values(table, 4) == sorted(values(table, 4))
    entry = metrics[f"f1:{names[0]}"]
    assert table.rows[0][4] == Cell(
        entry["value"], f"{100 * entry['value']:.1f} ({100 * entry['low']:.0f}–{100 * entry['high']:.0f})"
    )
    assert "95 % intervals" in table.caption


def test_a_label_without_held_out_rows_is_not_the_worst(many: Run) -> None:
    metrics = measured(many)["adapter"]["metrics"]
    assert metrics[f"support:{MANY[-1]}"]["value"] == metrics[f"f1:{MANY[-1]}"]["value"] == 0
    assert sorted(values(part(many, "labels", Table), 0)) == MANY[:-1]
    worst = report_summary.summary(many)["scores"]["adapter"]["worst_labels"]
    assert MANY[-1] not in [row["label"] for row in worst]


def test_the_matrix_counts_every_row(run: Run) -> None:
    matrix, names = part(run, "confusions", Matrix), ["fruit", "tree", "wood"]
    ids = [np.array([names.index(line[key]) for line in lines(run)]) for key in ("reference", "prediction")]
    assert (list(matrix.rows), list(matrix.columns)) == (names, names)
    assert [list(row) for row in matrix.counts] == confusion(ids[0], ids[1], 3).tolist()


def test_of_many_labels_the_matrix_has_the_worst(many: Run) -> None:
    matrix, table = part(many, "confusions", Matrix), part(many, "labels", Table)
    assert set(matrix.rows) == {*values(table, 0)[:20]} and len(matrix.columns) == 21
    support = dict(zip(values(table, 0), values(table, 1), strict=True))
    assert [sum(counts) for counts in matrix.counts] == [support[name] for name in matrix.rows]
    assert "20 labels of 30" in matrix.caption


def test_pairs_are_the_errors(run: Run) -> None:
    table = part(run, "confusions", Table)
    wrong = [line for line in lines(run) if not line["correct"]]
    assert sum(values(table, 2)) == len(wrong) > 5
    assert values(table, 2) == sorted(values(table, 2), reverse=True)
    label, other, count, share = (values(table, column)[0] for column in range(4))
    assert count == sum((line["reference"], line["prediction"]) == (label, other) for line in wrong)
    assert share == count / 20


def test_calibration_is_that_of_evaluate(run: Run) -> None:
    plot, ece = part(run, "calibration", Plot), measured(run)["adapter"]["metrics"]["ece"]
    points, known = plot.series[1].points, lines(run)
    assert sum(one.rows for one in plot.bins) == len(known) and len(points) == len(plot.bins)
    error = sum(one.rows * abs(x - y) for one, (x, y) in zip(plot.bins, points, strict=True)) / len(known)
    assert error == pytest.approx(ece["value"], abs=1e-6)
    assert f"{ece['value']:.3f} ({ece['low']:.3f}–{ece['high']:.3f})" in plot.caption
    for one, (x, y) in zip(plot.bins, points, strict=True):
        inside = [line for line in known if one.low < line["confidence"] <= one.high]
        assert one.rows == len(inside) and y == pytest.approx(np.mean([line["correct"] for line in inside]))
        assert x == pytest.approx(np.mean([line["confidence"] for line in inside]))


def test_the_surest_errors_come_first(run: Run) -> None:
    sure, unsure = part(run, "errors", Table), part(run, "errors", Table, 1)
    known = {line["row"]: line for line in lines(run)}
    wrong = sorted((-line["confidence"], row) for row, line in known.items() if not line["correct"])
    right = sorted((line["confidence"], row) for row, line in known.items() if line["correct"])
    assert values(sure, 0) == [row for _, row in wrong] and values(unsure, 0) == [row for _, row in right[:10]]
    for row in sure.rows:
        line = known[row[0].value]  # type: ignore[union-attr, index]
        assert list(row[1:4]) == [line["prompt"], line["reference"], line["prediction"]]
        assert row[5].value == line["top"][line["reference"]]  # type: ignore[union-attr]
    line = known[right[0][1]]
    assert unsure.rows[0][4] == list(line["top"])[1]


def test_a_label_beyond_the_recorded_ones_has_a_bound(many: Run) -> None:
    known = {line["row"]: line for line in lines(many)}
    cells = {row[0].value: row[5].text for row in part(many, "errors", Table).rows}  # type: ignore[union-attr]
    beyond = {row: text for row, text in cells.items() if known[row]["reference"] not in known[row]["top"]}
    assert beyond and len(beyond) < len(cells)
    for row, text in beyond.items():
        assert text == f"< {100 * min(known[row]['top'].values()):.1f} %"


def test_a_model_without_errors_has_no_table_of_errors(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path, noise=0.0)
    assert [type(one) for one in next(s for s in further.sections(run) if s.id == "confusions").parts] == [Matrix]
    assert [table.caption for table in next(s for s in further.sections(run) if s.id == "errors").parts] == [
        "Right, the least sure first: 10 of 60"
    ]
    assert "Wrong, the surest first" not in report_stage.page(run)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_has_the_tables(run: Run) -> None:
    seen = Page(report_stage.page(run))
    for section, number in (("labels", 0), ("confusions", 0), ("errors", 0), ("errors", 1)):
        table = part(run, section, Table, number)
        for row in table.rows:
            shown = [cell if isinstance(cell, str) else cell.text for cell in row]
            assert seen.row(section, *shown[:2])[: len(shown)] == shown or number == 1


def test_the_page_needs_nothing_but_itself_and_allows_its_one_script(run: Run, tmp_path: Path) -> None:
    html = report_stage.page(run)
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1 and f"script-src 'sha256-{digest}'" in html.partition("<title>")[0]
    assert not re.search(r"https?:|fetch|import|eval|innerHTML|XMLHttp", scripts[0])
    for tag, attributes in Page(html).tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form"}
        assert not {"src", "srcset", "data", "xlink:href", "action"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    chat = report_stage.page(open_sample(tmp_path))
    assert "<script" not in chat and "script-src" not in chat


def test_figures_are_sorted_by_their_values(run: Run) -> None:
    """The script reads `data-value`, not the text, whose intervals are no numbers."""
    html = report_stage.page(run)
    section = html[html.index('<section id="labels"') : html.index('<section id="confusions"')]
    assert 'class="sortable"' in section and section.count('data-kind="figure"') == 4
    written = [float(value) for value in re.findall(r'data-value="([^"]*)"', section)]
    assert written == [cell.value for row in part(run, "labels", Table).rows for cell in row[1:]]


def test_every_chart_has_a_title_and_links_lead_somewhere(many: Run) -> None:
    html = report_stage.page(many)
    tags = Page(html).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {(a["href"] or "")[1:] for _, a in tags if "href" in a} <= set(ids)
    charts = [a for tag, a in tags if tag == "svg" and a.get("aria-hidden") is None]
    assert {(a["aria-labelledby"] or "").split()[0] for a in charts} >= {
        "confusion-chart-title",
        "reliability-chart-title",
        "gradient-chart-title",
    }
    for chart in charts:
        assert chart["role"] == "img" and {*(chart["aria-labelledby"] or "").split()} <= set(ids)


def test_charts_have_no_colour_of_their_own(many: Run) -> None:
    """So that they follow the page's colour scheme, and every class that they use is in its style sheet."""
    html = report_stage.page(many)
    style = html.split("<style>")[1].split("</style>")[0]
    for chart in (part(many, "confusions", Matrix), part(many, "calibration", Plot)):
        for mark in parsed(section_charts.drawn(chart)).iter():
            assert not {"fill", "stroke", "style", "color"} & mark.attrib.keys()
            assert all(f".{name} " in style for name in (mark.attrib.get("class") or "").split())


def test_only_tasks_with_a_new_head_show_gradients(run: Run, tmp_path: Path) -> None:
    assert "gradient-chart" in report_stage.page(run)
    assert "gradient-chart" not in report_stage.page(open_sample(tmp_path))


def test_what_people_write_stays_text(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path, [HOSTILE, "a|b", "`c`\n"], rows=45)
    seen = Page(report_stage.page(run))
    assert [tag for tag, _ in seen.tags if tag in ("script", "img")] == ["script"]
    assert seen.text.count(HOSTILE) >= 8
    card = model_card.render(run)
    rows = [line for line in card.splitlines() if "a\\|b" in line]
    assert len(re.split(r"(?<!\\)\|", rows[0])) == 7 and not re.search(r"^`c`$", card, re.MULTILINE)


@pytest.mark.parametrize(
    ("absent", "sections"),
    [
        ("evaluate/predictions.jsonl", []),
        ("evaluate/scores.json", ["confusions", "calibration", "errors"]),
        ("data/labels.json", ["labels", "confusions", "calibration", "errors"]),
    ],
)
def test_a_run_may_lack_a_file(tmp_path: Path, absent: str, sections: list[str]) -> None:
    run = evaluated_run(tmp_path)
    (run.root / absent).unlink()
    assert [section.id for section in further.sections(run)] == sections
    assert Page(report_stage.page(run)).text and model_card.render(run)


# --- charts -----------------------------------------------------------------------------------------------------------


def matrix_of(names: Sequence[str], count: int) -> Matrix:
    counts = [[count] * len(names) for _ in names]
    return Matrix("m", "T", "", ("label", "predicted"), names, names, counts)


@pytest.mark.parametrize("count", [1, 999, 12_345])
def test_labels_and_counts_of_a_matrix_do_not_meet(count: int) -> None:
    names = [f"a rather long name of a label {number}" for number in range(21)]
    root = parsed(section_charts.matrix(matrix_of(names, count)))
    upright = [t.attrib["transform"] for t in root.iter("text") if "transform" in t.attrib]
    places = [float(re.findall(r"[\d.]+", transform)[0]) for transform in upright]
    assert len(places) == 21 and all(b - a >= 13 for a, b in pairwise(places))
    counts = [t for t in root.iter("text") if t.attrib.get("text-anchor") == "middle"]
    cells = [float(rect.attrib["width"]) for rect in root.iter("rect")]
    assert len(counts) == len(cells) == 441
    assert max(len(t.text or "") * section_charts.LETTER for t in counts) <= min(cells)
    assert max(float(t.attrib["x"]) for t in counts) < section_charts.WIDTH


def test_a_matrix_tells_right_from_wrong_and_shades_by_share() -> None:
    chart = Matrix("m", "T", "", ("label", "predicted"), ["a", "b"], ["a", "b"], [[9, 1], [0, 4]])
    root = parsed(section_charts.matrix(chart))
    cells = [(r.attrib["class"], float(r.attrib["fill-opacity"])) for r in root.iter("rect")]
    assert [kind for kind, _ in cells] == ["cell", "cell miss", "cell"]
    assert cells[1][1] < cells[0][1] < cells[2][1] == section_charts.MOST
    assert "label (rows): predicted. a (10): 9 a, 1 b; b (4): 4 b" in (root[1].text or "")


def test_names_that_begin_alike_stay_apart() -> None:
    names = [f"balance_not_updated_after_{what}" for what in ("bank_transfer", "cheque_or_cash_deposit")]
    shown = [text for text in texts(section_charts.matrix(matrix_of(names, 1))) if "…" in text]
    assert len(set(shown)) == 2 and max(map(len, shown)) <= 30


@pytest.mark.parametrize("points", [[(2.5, 3.0)], [(-1.0, -2.0), (4.0, 5.0), (4.0, 5.0)]])
def test_points_can_be_drawn_where_they_are(points: list[tuple[float, float]]) -> None:
    chart = Plot("p", "T", "D", "", ("true", "predicted"), [Series("rows", points)])
    svg = section_charts.plot(chart)
    assert "nan" not in svg and {"true", "predicted", "rows"} <= set(texts(svg))
    dots = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in parsed(svg).iter("circle")]
    inside = [(x, y) for x, y in dots if y > section_charts.TOP - 1]
    assert len(inside) == len(points)
    assert [x for x, _ in inside] == sorted(x for x, _ in inside)
    assert [y for _, y in inside] == sorted((y for _, y in inside), reverse=True)


# --- the contract -----------------------------------------------------------------------------------------------------


def test_a_task_brings_sections_of_its_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a task on numbers would: what it gives is on the page, the card and the screen, and nothing of labels."""
    scatter = Plot("scatter", "Numbers", "two rows", "True and predicted", ("true", "predicted"), [
        Series("equal", [(0, 0), (5, 5)], joined=True), Series("rows", [(1, 2), (4, 4)], strong=True),
    ])  # fmt: skip
    table = Table("Quarters", [Column("Quarter", "name"), Column("MAE")], [["lowest", Cell(0.5, "0.50")]], on_card=True)
    section = Section("numbers", "Numbers", ("note",), [scatter, table])
    monkeypatch.setattr(Classify, "sections", lambda self, evaluated: [section, Section("none", "None", (), [])])
    monkeypatch.setattr(Classify, "FIGURES", (Figure("ece", "mean distance", "mae", share=False),))
    monkeypatch.setattr(Classify, "LABEL_FIGURE", None)
    seen = Page(report_stage.page(run))
    assert seen.row("numbers", "lowest") == ["lowest", "0.50"]
    assert {"numbers"} == {a["id"] for tag, a in seen.tags if tag == "section"} & {"numbers", "none", "labels"}
    assert "script" not in {tag for tag, _ in seen.tags}
    score = report_summary.summary(run)["scores"]["adapter"]
    assert [entry["title"] for entry in score["metrics"].values()] == ["mean distance"] and "worst_labels" not in score
    assert "| lowest | 0.50 |" in model_card.render(run)
    assert "mean distance" in drawn(run) and "worst labels" not in drawn(run)


# --- qkit show --------------------------------------------------------------------------------------------------------


def drawn(run: Run) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(report_screen.screen(report_summary.summary(run)), highlight=False)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_document_has_the_further_figures(run: Run) -> None:
    document = report_summary.summary(run)
    jsonschema.Draft202012Validator(closed(SHOW_SCHEMA)).validate(document)
    scores = measured(run)
    for name, score in document["scores"].items():
        assert list(score["metrics"]) == [figure.name for figure in Classify.FIGURES]
        for figure, entry in score["metrics"].items():
            assert {end: entry[end] for end in ("value", "low", "high")} == scores[name]["metrics"][figure]
    assert "worst_labels" not in document["scores"]["majority"]
    worst = document["scores"]["adapter"]["worst_labels"]
    assert [row["value"] for row in worst] == sorted(row["value"] for row in worst) and len(worst) == 3
    assert (worst[0]["support"], worst[0]["title"]) == (20, "F1")


def test_figures_that_are_not_defined_are_null(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path)
    scores = measured(run)
    scores["adapter"]["metrics"]["ece"] = dict.fromkeys(("value", "low", "high"), float("nan"))
    edit(run, "evaluate/scores.json", scores=scores)
    document = report_summary.summary(run)
    jsonschema.Draft202012Validator(closed(SHOW_SCHEMA)).validate(document)
    assert document["scores"]["adapter"]["metrics"]["ece"]["value"] is None
    assert re.search(r"calibration error +– +–", drawn(run))
    assert "calibration error" not in [r.metric_name for r in results(run, "vllm-adapter")]
    assert Page(report_stage.page(run)).text


def test_the_screen_has_figures_and_the_worst_labels(many: Run) -> None:
    screen, score = drawn(many), report_summary.summary(many)["scores"]["adapter"]
    rows = screen.splitlines()
    assert len(rows) <= 23 and max(map(len, rows)) <= 80
    macro, ece = score["metrics"]["f1_macro"], score["metrics"]["ece"]
    ends = f"{100 * macro['low']:.0f}–{100 * macro['high']:.0f}"
    assert re.search(rf"macro F1 +{100 * macro['value']:.1f} +{ends} ", screen)
    assert re.search(rf"calibration error +{ece['value']:.3f} +{ece['low']:.3f}–{ece['high']:.3f}", screen)
    places = [screen.index(row["label"]) for row in score["worst_labels"]]
    assert len(places) == further.WORST and places == sorted(places)


# --- the model card ---------------------------------------------------------------------------------------------------


def results(run: Run, export: str | None = None) -> list[Any]:
    """What the hub's own reader finds in the card."""
    return list(huggingface_hub.ModelCard(model_card.render(run, export)).data.eval_results or ())


def test_the_hub_reads_a_result_for_every_figure(run: Run) -> None:
    score, known = measured(run)["adapter"], results(run, "vllm-adapter")
    assert [(r.metric_type, r.metric_name) for r in known] == [
        ("accuracy", "accuracy"),
        *((figure.metric, figure.title) for figure in Classify.FIGURES),
    ]
    metrics = score["metrics"]
    assert [r.metric_value for r in known] == pytest.approx(
        [score["score"], *(metrics[f.name]["value"] * (100 if f.share else 1) for f in Classify.FIGURES)]
    )
    assert {(r.task_type, r.dataset_name, r.dataset_type, r.dataset_split) for r in known} == {
        ("text-classification", "rows.jsonl, held-out rows", "rows.jsonl", "test")
    }
    assert [r.metric_args for r in known if r.metric_type == "f1"] == [{"average": "macro"}, {"average": "weighted"}]


def test_a_merged_model_has_its_own_figures_or_none(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path)
    assert results(run) == []
    run.folder("verify").mkdir()
    own = {**measured(run)["adapter"], "score": 50.0, "metrics": {"f1_macro": {"value": 0.4, "low": 0.3, "high": 0.5}}}
    (run.folder("verify") / "parity.json").write_text(json.dumps({"parity": {}, "scores": {"merged": own}}))
    assert [(r.metric_name, r.metric_value) for r in results(run)] == [("accuracy", 50.0), ("macro F1", 40.0)]


def test_chat_runs_have_theirs(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    (result,) = results(run, "vllm-adapter")
    assert (result.metric_value, result.metric_name, result.dataset_split) == (52.0, "exact call match", "test")


def test_a_split_of_the_hub_keeps_its_name(tmp_path: Path) -> None:
    source = {"source": "org/set", "name": "en", "split": "validation", "revision": "abc"}
    run = evaluated_run(tmp_path, data={"test": [source]})
    result = results(run, "vllm-adapter")[0]
    known = (result.dataset_type, result.dataset_config, result.dataset_split, result.dataset_revision)
    assert known == ("org/set", "en", "validation", "abc")


def test_the_card_has_at_most_twenty_labels(run: Run, many: Run) -> None:
    for each, count in ((run, 3), (many, 20)):
        card, table = model_card.render(each), part(each, "labels", Table)
        block = card.partition("| Label | Support |")[2].partition("\n\n")[0].splitlines()[2:]
        assert len(block) == count
        assert [line.split("|")[1].strip() for line in block] == values(table, 0)[:count]
        assert ("the first 20 of 29" in card) is (count == 20)
    assert "| macro F1 |" in model_card.render(run)


@pytest.mark.slow
def test_every_artifact_of_a_real_run_has_figures_of_its_own(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model", "bert", initializer_range=0.1)
    run = labelled_run(tmp_path, model, train={"max_steps": 40}, export={"formats": ["onnx-fp32"]})
    for stage in ("data", "train", "evaluate", "merge", "export", "verify"):
        pipeline.execute(run, stage)
    model_card.write(run)
    document = report_summary.summary(run)
    jsonschema.Draft202012Validator(closed(SHOW_SCHEMA)).validate(document)
    trained = document["scores"]["adapter"]["metrics"]["f1_macro"]["value"]
    for name, folder in (("merged", "merge"), ("onnx-fp32", "export/onnx-fp32")):
        assert document["scores"][name]["metrics"]["f1_macro"]["value"] == pytest.approx(trained)
        card = huggingface_hub.ModelCard.load(run.root / folder / "README.md")
        shown = {r.metric_name: r.metric_value for r in card.data.eval_results or ()}
        assert (
            shown["macro F1"] == pytest.approx(100 * trained) and shown["accuracy"] == document["scores"][name]["score"]
        )
    seen = Page(report_stage.page(run))
    assert {"labels", "confusions", "calibration", "errors"} <= {a["id"] for tag, a in seen.tags if tag == "section"}
