from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.pages import HOSTILE, Page
from helpers.sample import FILES, SAMPLE, edit, open_sample
from qkit.core import figures
from qkit.report import stage as report_stage
from qkit.report import summary
from qkit.report.stage import Example
from qkit.run.directory import Run
from qkit.tasks import chat


def page(run: Run) -> Page:
    return Page(report_stage.page(run))


def read(file: str) -> Any:
    return json.loads((SAMPLE / file).read_text(encoding="utf-8"))


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


# --- self-contained and safe ----------------------------------------------------------------------------------------


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    html = report_stage.page(open_sample(tmp_path))
    for tag, attributes in Page(html).tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
        assert not {"src", "srcset", "data", "xlink:href", "action", "ping"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    css = html.split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|@font-face|https?:", css)
    assert """http-equiv="Content-Security-Policy" content="default-src 'none'""" in html
    assert str(tmp_path) not in html


def test_the_first_line_says_on_how_many_rows_it_was_trained(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    rows = json.loads((run.folder("data") / "summary.json").read_text())["splits"]["train"]["rows"]
    assert f"and {rows:,} rows of data" in report_stage.page(run)


def test_links_within_the_page_lead_somewhere(tmp_path: Path) -> None:
    tags = page(open_sample(tmp_path)).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {(a["href"] or "")[1:] for _, a in tags if "href" in a} <= set(ids)
    assert {name for _, a in tags for name in (a.get("aria-labelledby") or "").split()} <= set(ids)


def test_what_models_and_people_write_stays_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_sample(tmp_path)
    monkeypatch.setitem(sys.modules, f"qkit.tasks.{HOSTILE}", chat)
    keys = ("prompt", "prediction", "reference")
    lines = [
        {"artifact": name, "row": 0, "correct": False, **dict.fromkeys(keys, HOSTILE)} for name in ("base", "adapter")
    ]
    (run.root / "evaluate/predictions.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    edit(run, "evaluate/scores.json", metric=HOSTILE, scores={HOSTILE: read("evaluate/scores.json")["scores"]["base"]})
    edit(run, "train/memory.json", predicted={HOSTILE: 1})
    edit(run, "serve/server.json", argv=[HOSTILE])
    edit(run, "bench/vllm-c1.json", runtime=HOSTILE, artifact=HOSTILE, meter=HOSTILE)
    seen = page(Run(run.root, run.recipe.model_copy(update={"task": HOSTILE})))
    assert not [tag for tag, _ in seen.tags if tag in ("script", "img")]
    assert seen.text.count(HOSTILE) >= 8


# --- figures --------------------------------------------------------------------------------------------------------


def test_the_headline_states_the_result(tmp_path: Path) -> None:
    html = report_stage.page(open_sample(tmp_path))
    heading = re.sub(r"<[^>]+>", "", html.split("<h1>")[1].split("</h1>")[0])
    assert heading == "exact call match: 0 → 52 of 100 (95 % interval 42–62)"


def test_scores_on_the_page_are_those_of_the_run(tmp_path: Path) -> None:
    html = report_stage.page(open_sample(tmp_path))
    chart = html.split('id="score-chart-desc">')[1].split("</desc>")[0]
    entries = {**read("evaluate/scores.json")["scores"], **read("verify/parity.json")["scores"]}
    assert chart.split("; ") == [
        f"{name} {entry['score']:.1f}, interval {entry['low']:.0f}–{entry['high']:.0f}"
        for name, entry in entries.items()
    ]


def test_distances_on_the_page_are_those_of_the_run(tmp_path: Path) -> None:
    seen = page(open_sample(tmp_path))
    verified = read("verify/parity.json")
    for name in ("merged", "onnx-int4", "vllm"):
        entry = verified["parity"][name]
        _, mean, p99, top1, loss, tokens, over = seen.row("parity", name)
        assert (number(mean), number(p99)) == (
            pytest.approx(entry["kl_mean"], abs=5e-5), pytest.approx(entry["kl_p99"], abs=5e-5),
        )  # fmt: skip
        assert number(top1.removesuffix(" %")) == pytest.approx(100 * entry["top1"], abs=0.05)
        assert number(loss) == pytest.approx(verified["scores"][name]["heldout_loss"], abs=5e-5)
        assert (number(tokens), over) == (entry["tokens"], entry["over"])


@pytest.mark.parametrize("file", sorted(path.name for path in (SAMPLE / "bench").glob("*-c*.json")))
def test_latencies_on_the_page_are_those_of_the_run(tmp_path: Path, file: str) -> None:
    record = read(f"bench/{file}")
    row = page(open_sample(tmp_path)).row("speed", record["artifact"], record["runtime"], str(record["concurrency"]))
    for cell, key in zip(row[3:6], summary.LATENCY_KEYS, strict=True):
        expected = [1000 * record[key][p] for p in ("p50", "p99")]
        assert [number(part) for part in cell.split(" / ")] == pytest.approx(expected, rel=0.006)
    assert number(row[6]) == pytest.approx(record["output_tokens_per_second"], abs=0.05)
    assert number(row[7]) == pytest.approx(record["peak_bytes"] / 2**30, abs=0.005)


def test_stages_on_the_page_are_those_of_the_manifest(tmp_path: Path) -> None:
    seen = page(open_sample(tmp_path))
    stages = read("run.json")["stages"]
    for name, entry in stages.items():
        row = seen.row("stages", name)
        assert row[1:3] == ["done", figures.seconds_text(entry["seconds"])]
        assert row[5:] == [figures.bytes_text(entry["peak_bytes"]["measured"]), entry["peak_bytes"]["meter"]]
    assert seen.row("stages", "all")[2] == figures.seconds_text(sum(entry["seconds"] for entry in stages.values()))


def test_memory_is_compared_with_its_plan(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    edit(run, "train/memory.json", predicted={"weights": 2**30, "logits": 2**30}, measured_peak_bytes=3 * 2**30)
    html = report_stage.page(run)
    assert "50 % above the plan of 2.00 GiB" in html
    assert "weights 1.00 GiB; logits 1.00 GiB; planned 2.00 GiB; measured 3.00 GiB" in html


def test_planned_lines_are_beside_the_tensors_that_were_alive(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    edit(run, "train/memory.json", predicted={"weights": 2**30, "process": 2**29}, measured={"weights": 2**29}, step=2)
    seen = page(run)
    assert seen.row("memory", "weights")[1:] == ["1.00 GiB", "512 MiB"]
    assert seen.row("memory", "process")[1:] == ["512 MiB", figures.ABSENT]
    assert "the peak of step 2" in seen.text


def test_the_plan_of_the_manifest_serves_where_there_are_no_items(tmp_path: Path) -> None:
    html = report_stage.page(open_sample(tmp_path, without="train/memory.json"))
    assert "planned 1.52 GiB; measured 1.70 GiB" in html


def test_environment_and_hashes_are_on_the_page(tmp_path: Path) -> None:
    seen = page(open_sample(tmp_path))
    manifest = read("run.json")
    wanted = [manifest["recipe_sha256"], manifest["environment"]["git"], manifest["environment"]["device"]["name"]]
    wanted += [output["sha256"] for output in manifest["stages"]["merge"]["outputs"].values()]
    assert not [text for text in wanted if text not in seen.text]
    assert seen.row("environment", "torch") == ["torch", manifest["environment"]["packages"]["torch"]]


def _way(name: str, kl: float, lost: bool = False) -> dict[str, Any]:
    return {"name": name, "parity": {"kl_mean": kl, "kl_p99": 9 * kl, "top1": 0.98, "heldout_loss": 0.17}, "lost": lost}


def test_the_ways_to_merge_are_shown_with_the_one_that_was_kept(tmp_path: Path) -> None:
    run, ways = open_sample(tmp_path), [_way("dequantized", 0.0004), _way("16bit", 0.0373)]
    merged = {
        "chosen": "dequantized",
        "candidates": ways,
        "beside": [_way("base", 0.71, lost=True), _way("adapter-16bit", 0.7, lost=True)],
    }
    merged["otherwise"] = {"words": "merge.choose=score takes 16bit"}
    int4 = {"chosen": "16bit", "candidates": ways, "note": "measured on 32 rows"}
    for stage, table in (("merge", merged), ("export", {"onnx-int4": int4})):
        run.folder(stage).mkdir()
        (run.folder(stage) / "candidates.json").write_text(json.dumps(table), encoding="utf-8")
    html = report_stage.page(run)
    section = html[html.index('<section id="merge">') : html.index('<section id="training">')]
    assert re.findall(r'<tr class="strong"><th>([^<]+)', section) == ["dequantized", "16bit"]
    assert section.count("fine-tuning is lost") == 1
    assert "merge.choose=score takes 16bit" in section and "measured on 32 rows" in section


def test_steps_without_a_finite_loss_are_counted(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    with (run.root / "train/metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 41, "loss": NaN, "learning_rate": 0.0, "tokens": 80000}\n')
    html = report_stage.page(run)
    assert "1 logged steps without a finite loss are left out." in html
    assert "nan" not in html.split('id="loss-chart-title"')[1].split("</svg>")[0]


def test_the_validation_rows_have_a_curve_and_the_gap_is_named(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    steps = [json.loads(line) for line in (run.root / "train/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    half, last = steps[len(steps) // 2]["step"], steps[-1]["step"]
    assert steps[0]["loss"] > steps[-1]["loss"]
    with (run.root / "train/metrics.jsonl").open("a", encoding="utf-8") as file:
        for step, loss in ((half, 0.5), (last, 0.9)):
            line = {
                "step": step,
                "epoch": 1,
                "eval_loss": loss,
                "eval_loss/a": loss,
                "eval_loss/b": loss,
                "eval_score": 9,
            }
            file.write(json.dumps(line) + "\n")
    record = {
        "metric": "loss",
        "best": {"step": half, "value": 0.5},
        "last_step": last,
        "steps": 99,
        "restored": True,
        "rows": 7,
    }
    (run.root / "train/validation.json").write_text(json.dumps(record), encoding="utf-8")
    html = report_stage.page(run)
    assert f"The best loss is 0.5, at step {half}, and the result is the model of that step." in html
    assert f"Early stopping ended the training at step {last} of 99." in html
    assert f"The validation loss rises from 0.5 at step {half} to 0.9 at step {last}" in html
    assert {"loss-chart-title", "validation-score-chart-title", "source-chart-title"} <= set(
        re.findall(r'id="([\w-]+)"', html)
    )


# --- what is absent -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", FILES)
def test_a_file_may_be_absent(tmp_path: Path, absent: str) -> None:
    whole, without = page(open_sample(tmp_path / "whole")), page(open_sample(tmp_path, without=absent))
    assert without.text != whole.text or absent == "run.json"


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        ("evaluate/scores.json", "No scores: the stage evaluate left none."),
        ("evaluate/predictions.jsonl", "No predictions: the stage evaluate left none."),
        ("verify/parity.json", "No distances: the stage verify left none."),
        ("bench", "No latencies: the stage bench left none."),
        ("train/metrics.jsonl", "No training steps: the stage train left none."),
        ("data/summary.json", "No data summary: the stage data left none."),
    ],
)
def test_what_is_absent_is_said_once(tmp_path: Path, absent: str, said: str) -> None:
    run = open_sample(tmp_path, without=absent)
    if absent == "evaluate/scores.json":
        edit(run, "verify/parity.json", scores={})
    assert page(run).text.count(said) == 1


def test_a_new_run_has_a_page(tmp_path: Path) -> None:
    text = page(open_sample(tmp_path, only_recipe=True)).text
    assert "not evaluated yet" in text
    assert text.count("has not run") == 8
    assert "No environment: no stage has run." in text


def test_the_stage_writes_one_file_and_the_same_each_time(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        report_stage.run(run, tmp_path / name)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["index.html"]
    assert (tmp_path / "a/index.html").read_bytes() == (tmp_path / "b/index.html").read_bytes()


# --- examples -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_examples_are_a_mix_that_hides_no_kind(outcomes: list[tuple[bool, bool]]) -> None:
    examples = [Example(i, "", "", "", "", base, adapter) for i, (base, adapter) in enumerate(outcomes)]
    chosen = report_stage.choose(examples)
    assert len(chosen) == min(report_stage.EXAMPLES, len(examples)) == len({example.row for example in chosen})
    assert {example.kind for example in chosen} == {example.kind for example in examples}


def test_mostly_fixed_rows_leave_room_for_the_wrong_ones() -> None:
    examples = [Example(i, "", "", "", "", False, i % 2 == 0) for i in range(100)]
    assert [example.kind for example in report_stage.choose(examples)].count("still wrong") == 3


def test_the_page_counts_all_rows_and_marks_each_answer(tmp_path: Path) -> None:
    html = report_stage.page(open_sample(tmp_path))
    assert re.search(r"Of 24 held-out rows the adapter fixed 13 and broke 1;\s+9 stayed wrong and 1 stayed right", html)
    assert html.count("✓ right") + html.count("✗ wrong") == 2 * report_stage.EXAMPLES


def test_a_row_that_only_one_of_the_two_answered_is_left_out() -> None:
    line = {"prompt": "", "prediction": "", "reference": "", "correct": True}
    lines = [{"artifact": name, "row": row, **line} for name, row in (("base", 0), ("adapter", 0), ("base", 1))]
    assert [example.row for example in report_stage.pair_up(lines)] == [0]


@pytest.mark.parametrize(
    ("pairs", "names"),
    [
        (
            [("vllm", "vllm"), ("onnxruntime", "onnx-int4"), ("onnxruntime", "onnx-fp32")],
            ["vllm", "onnx-int4", "onnx-fp32"],
        ),
        ([("transformers", "merged"), ("vllm", "merged")], ["transformers", "vllm"]),
        ([("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")], ["x, a", "y, a", "x, b", "y, b"]),
    ],
)
def test_loads_have_short_names_that_tell_them_apart(pairs: list[tuple[str, str]], names: list[str]) -> None:
    bench = [{"runtime": runtime, "artifact": artifact, "concurrency": 8} for runtime, artifact in pairs]
    assert report_stage.loads(bench) == [f"{name} × 8" for name in names]
