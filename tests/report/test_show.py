from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from helpers import paths
from helpers.sample import FILES, SAMPLE, edit, open_sample
from helpers.schemas import SHOW_SCHEMA as SCHEMA
from helpers.schemas import closed
from qkit.core import figures, files
from qkit.core.errors import MissingArtifact
from qkit.report import model_card
from qkit.report import screen as report_screen
from qkit.report import stage as report_stage
from qkit.report import summary as report_summary
from qkit.run import stages as run_stages

GOLDEN = paths.GOLDEN / "show.json"


def check(summary: report_summary.Summary) -> None:
    jsonschema.Draft202012Validator(closed(SCHEMA)).validate(summary)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_golden(tmp_path: Path) -> None:
    """The public contract: QKIT_UPDATE_GOLDEN=1 rewrites the file, and its diff is the change of the contract."""
    summary = report_summary.summary(open_sample(tmp_path))
    if os.environ.get("QKIT_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    check(summary)
    assert json.loads(json.dumps(summary, allow_nan=False)) == json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("absent", FILES)
def test_a_file_may_be_absent(tmp_path: Path, absent: str) -> None:
    check(report_summary.summary(open_sample(tmp_path, without=absent)))


def test_a_new_run_has_a_summary(tmp_path: Path) -> None:
    summary = report_summary.summary(open_sample(tmp_path, only_recipe=True))
    check(summary)
    assert {stage["status"] for stage in summary["stages"].values()} == {"missing"}
    assert summary["scores"] == {}
    assert summary["bench"] == []


@pytest.mark.parametrize("place", ["", "stages.data", "scores.base", "parity.vllm"])
def test_readers_may_meet_new_keys_and_we_may_not(tmp_path: Path, place: str) -> None:
    summary = report_summary.summary(open_sample(tmp_path))
    record = summary
    for key in filter(None, place.split(".")):
        record = record[key]
    record["unheard_of"] = 1
    jsonschema.validate(summary, SCHEMA)
    with pytest.raises(jsonschema.ValidationError, match="unheard_of"):
        check(summary)


def test_stages_are_the_pipelines(tmp_path: Path) -> None:
    stages = report_summary.summary(open_sample(tmp_path))["stages"]
    assert list(stages) == list(run_stages.STAGES)
    assert sorted(SCHEMA["properties"]["stages"]["required"]) == sorted(stages)


def test_statuses_given_overrule_the_manifest(tmp_path: Path) -> None:
    stages = report_summary.summary(open_sample(tmp_path), {"train": "stale"})["stages"]
    assert stages["train"]["status"] == "stale"
    assert stages["train"]["seconds"] == 282.6
    assert (stages["data"]["status"], stages["report"]["status"]) == ("done", "missing")


def test_scores_come_from_evaluate_and_verify_in_the_order_of_making(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    summary = report_summary.summary(run)
    assert list(summary["scores"]) == ["base", "adapter", "merged", *run.recipe.export.formats]
    assert [(r["artifact"], r["concurrency"]) for r in summary["bench"]][:4] == [
        ("merged", 1), ("merged", 8), ("onnx-fp32", 1), ("onnx-fp32", 8),
    ]  # fmt: skip


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    edit(run, "verify/parity.json", parity={"vllm": {"kl_mean": float("inf"), "kl_p99": float("nan"), "top1": 0.5}})
    summary = report_summary.summary(run)
    check(summary)
    assert summary["parity"]["vllm"]["kl_mean"] is None
    assert report_summary.farthest(summary) is None
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize("file", ["evaluate/scores.json", "bench/vllm-c1.json"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str) -> None:
    run = open_sample(tmp_path)
    (run.root / file).write_text('{"cut of', encoding="utf-8")
    with pytest.raises(MissingArtifact, match=file):
        report_summary.summary(run)


def test_lines_with_unicode_line_separators_stay_whole(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert files.read_lines(file) == [{"prompt": "a\u2028b\x85c"}]


# --- words and figures ----------------------------------------------------------------------------------------------


def scored(
    base: tuple[float, float, float] | None, adapter: tuple[float, float, float] | None
) -> report_summary.Summary:
    keys = ("score", "low", "high")
    pairs = (("base", base), ("adapter", adapter))
    scores = {name: dict(zip(keys, value, strict=True)) for name, value in pairs if value}
    return {"metric": "call match", "confidence": 0.95, "scores": scores}


@pytest.mark.parametrize(
    ("base", "adapter", "headline", "verdict"),
    [
        ((0, 0, 0), (52, 42, 62), "call match: 0 → 52 of 100 (95 % interval 42–62)", "better"),
        ((52, 42, 62), (12.5, 6.25, 18), "call match: 52 → 12.5 of 100 (95 % interval 6.2–18)", "worse"),
        ((40, 30, 50), (45, 35, 55), "call match: 40 → 45 of 100 (95 % interval 35–55)", "may be chance"),
        (None, (45, 35, 55), "call match: 45 of 100 (95 % interval 35–55)", ""),
        ((40, 30, 50), None, "not evaluated yet", ""),
    ],
)
def test_headline_and_verdict(base: Any, adapter: Any, headline: str, verdict: str) -> None:
    assert report_summary.headline(scored(base, adapter)) == headline
    said = report_summary.verdict(scored(base, adapter))
    assert verdict in said
    assert bool(said) == bool(verdict)


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        (figures.bytes_text, None, "–"),
        (figures.bytes_text, 0, "0.0 MiB"),
        (figures.bytes_text, 1_572_864, "1.5 MiB"),
        (figures.bytes_text, 110 * 2**20, "110 MiB"),
        (figures.bytes_text, 1.7 * 2**30, "1.70 GiB"),
        (figures.seconds_text, 0.045, "45 ms"),
        (figures.seconds_text, 9.46, "9.5 s"),
        (figures.seconds_text, 282.6, "4 min 43 s"),
        (figures.seconds_text, 7500, "2 h 05 min"),
        (figures.ms_text, 0.0481, "48.1"),
        (figures.ms_text, 1.6731, "1,673"),
        (figures.kl_text, 0.0, "0.0000"),
        (figures.kl_text, 2.1e-6, "< 0.0001"),
        (figures.kl_text, 0.709, "0.7090"),
        (figures.percent, 0.978, "97.8 %"),
        (figures.percent, None, "–"),
    ],
)
def test_figures_as_text(text: Any, value: float | None, expected: str) -> None:
    assert text(value) == expected


# --- the screen -----------------------------------------------------------------------------------------------------


def drawn(summary: report_summary.Summary, width: int = 80) -> list[str]:
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=width)
    console.print(report_screen.screen(summary), highlight=False)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


def test_the_best_step_is_on_the_screen(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    record = {
        "metric": "loss",
        "best": {"step": 20, "value": 0.5},
        "last_step": 30,
        "steps": 40,
        "restored": True,
        "rows": 7,
    }
    (run.root / "train/validation.json").write_text(json.dumps(record), encoding="utf-8")
    screen = "\n".join(drawn(report_summary.summary(run), 160))
    said = "best validation loss 0.5 at step 20 of 40, stopped early at step 30, and that step is the result"
    assert f"training: {said}" in screen


def test_a_whole_run_fits_a_screen(tmp_path: Path) -> None:
    lines = drawn(report_summary.summary(open_sample(tmp_path)))
    assert len(lines) <= 23  # one line of 24 is the prompt's
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines), "something was cut off"
    assert lines[0] == "exact call match: 0 → 52 of 100 (95 % interval 42–62)"


def test_the_screen_shows_the_runs_figures(tmp_path: Path) -> None:
    text = "\n".join(drawn(report_summary.summary(open_sample(tmp_path))))
    train = next(line.split() for line in text.splitlines() if line.startswith("train"))
    assert train[:5] == ["train", "done", "4:43", "1.70", "1.52"]
    vllm = next(line.split() for line in text.splitlines() if line.startswith("vllm") and " 8 " in line)
    record = json.loads((SAMPLE / "bench" / "vllm-c8.json").read_text(encoding="utf-8"))
    assert float(vllm[3]) == pytest.approx(1000 * record["ttft_seconds"]["p50"], abs=0.5)
    assert float(vllm[6]) == pytest.approx(record["output_tokens_per_second"], abs=0.05)


def test_a_failed_gate_is_seen(tmp_path: Path) -> None:
    """On the screen, in the report and on the model card: which artifact, the figure, the limit."""
    run = open_sample(tmp_path)
    file = run.folder("verify") / "parity.json"
    kept = json.loads(file.read_text())
    failed = [
        {"gate": "kl_mean", "figure": 0.31, "limit": 0.1, "detail": ""},
        {"gate": "contract", "figure": None, "limit": None, "detail": "stop tokens: it talks on after token 2"},
    ]
    kept["parity"]["onnx-int4"] |= {"status": "failed", "failed": failed}
    file.write_text(json.dumps(kept))
    summary = report_summary.summary(run)
    check(summary)
    screen = "\n".join(drawn(summary, 160))
    page, card = report_stage.page(run), model_card.render(run)
    for said in (
        "mean KL to the trained model beyond rounding and chance 0.31 (limit 0.1)",
        "stop tokens: it talks on after token 2",
    ):
        assert said in screen and said in page and said in card
    assert "onnx-int4 failed its gate" in screen and "vllm failed" not in screen


@pytest.mark.parametrize("status", ["failed", "passed"])
def test_an_artifact_that_was_made_again_is_shown_as_stale(tmp_path: Path, status: str) -> None:
    """In the document and on the screen: what verify found of the files before is not shown as the present verdict."""
    run = open_sample(tmp_path)
    failed = [{"gate": "kl_mean", "figure": 0.31, "limit": 0.1, "detail": ""}] if status == "failed" else []
    verified = json.loads((run.folder("verify") / "parity.json").read_text())
    verified["parity"]["onnx-int4"] |= {"status": status, "failed": failed}
    edit(run, "verify/parity.json", **verified)
    before = report_summary.summary(run)
    assert before["parity"]["onnx-int4"]["status"] == status
    manifest = run.manifest()
    manifest["stages"]["export"]["outputs"]["export/onnx-int4/model.onnx"]["sha256"] = 64 * "f"
    edit(run, "run.json", **manifest)
    after = report_summary.summary(run)
    check(after)
    entry = after["parity"].pop("onnx-int4")
    assert entry == {**dict.fromkeys(report_summary.PARITY_KEYS), "status": "stale", "failed": []}
    assert "onnx-int4" not in after["scores"]
    assert before["parity"].pop("onnx-int4").keys() == entry.keys() and before["parity"] == after["parity"]
    text = "\n".join(drawn(report_summary.summary(run), 160))
    assert "onnx-int4 has changed since it was measured" in text and "onnx-int4 failed" not in text
    assert "changed since it was measured" in report_stage.page(run)


def test_names_are_not_read_as_markup(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    edit(run, "evaluate/scores.json", metric="[red]match[/nonsense]")
    assert "[red]match[/nonsense]" in drawn(report_summary.summary(run))[0]


def test_a_new_run_can_be_drawn(tmp_path: Path) -> None:
    lines = drawn(report_summary.summary(open_sample(tmp_path, only_recipe=True)))
    assert lines[0] == "not evaluated yet"
    assert sum("missing" in line for line in lines) == len(run_stages.STAGES)
