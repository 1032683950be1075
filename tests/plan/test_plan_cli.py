"""`qkit plan` as a program: what it prints, what it costs, and how it answers to what it cannot read."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import paths
from qkit.core import figures
from qkit.model.config import shape_of
from qkit.plan import gpus, remedies, solve
from qkit.plan import plan as plan_plan
from qkit.plan import speed as plan_speed
from qkit.recipe import load

RECIPE = paths.RECIPES / "llama-3.1-8b-24gb.yaml"
MODEL = ["--model", "llama-3.1-8B", "--quantization", "nf4", "--rank", "16", "--batch", "2", "--length", "2048"]


def qkit(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qkit", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=paths.ROOT)


def answer(*arguments: str, code: int = 0) -> dict[str, Any]:
    done = qkit(*arguments, "--json")
    assert done.returncode == code, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_json_has_the_plan_its_stages_and_its_time() -> None:
    document = answer(str(RECIPE), "--card", "rtx-4090")
    assert document["fits"] is True
    assert document["stage"] == "train"
    assert document["peak_bytes"] == sum(item["bytes"] for item in document["items"])
    assert {"name", "bytes", "exact", "formula"} <= set(document["items"][0])
    assert [stage["stage"] for stage in document["stages"]] == list(plan_plan.STAGES)
    assert document["time"]["bound"] is True
    assert len(document["anchors"]) == 2


def test_what_does_not_fit_comes_with_a_line_of_sets_that_does() -> None:
    document = answer(str(RECIPE), "--memory", "6GiB", "--set", "train.gradient_checkpointing=false", code=2)
    assert document["fits"] is False
    sets = [text for remedy in document["remedies"] for text in remedy["set"]]
    options = [option for text in sets for option in ("--set", text)]
    # its 16-bit weights are more than such a card holds, so that other stages do not fit
    after = answer(str(RECIPE), "--memory", "7GiB", "--set", "train.gradient_checkpointing=false", *options, code=2)
    assert after["fits"] is True
    assert " ".join(f"--set {text}" for text in sets) in " ".join(
        qkit(str(RECIPE), "--memory", "6GiB", "--set", "train.gradient_checkpointing=false").stdout.split()
    )


@pytest.mark.slow
def test_a_stage_that_does_not_fit_ends_with_2_and_says_what_to_do() -> None:
    """Training fits here and serving does not; then nothing does, on the screen and in the document."""
    small = ["--card", "rtx-3060-12gb", "--model", "Qwen2.5-3B"]
    long = ["--set", "serve.max_model_len=32768", "--set", "serve.concurrency=8"]
    assert qkit(*small).returncode == 0
    done = qkit(*small, *long)
    said = " ".join(done.stdout.split())
    assert done.returncode == 2 and said.startswith("train fits: ") and "serve does not fit: needs " in said
    stage = next(stage for stage in answer(*small, *long, code=2)["stages"] if stage["stage"] == "serve")
    sets = [f"--set {text}" for remedy in stage["remedies"] for text in remedy["set"]]
    assert sets and " ".join(sets) in said
    assert qkit(*small, *long, *" ".join(sets).split()).returncode == 0
    assert qkit(*small, *long, "--set", "export.formats=[safetensors]", "--set", "bench.runtimes=[]").returncode == 0
    assert qkit(*small, *long, "--solve", "rank").returncode == 0


@pytest.mark.parametrize("question", solve.QUESTIONS)
def test_solved_value_is_in_the_document(question: str) -> None:
    document = answer(*MODEL, "--set", "train.gradient_checkpointing=true", "--card", "rtx-3090", "--solve", question)
    assert document["solved"]
    assert document["solution"]["question"] == question
    assert document["solution"]["plan"]["fits"]


def test_a_model_needs_no_recipe(tmp_path: Path, tiny_model: Path) -> None:
    for source in (tiny_model, tiny_model / "config.json"):
        document = answer("--model", str(source), "--card", "t4")
        assert document["exact"]
        assert document["time_seconds"] is None  # this card has no bf16
    assert answer(*MODEL)["items"][1]["bytes"] == 41_943_040 * 4


def test_explain_prints_the_formula_with_its_numbers() -> None:
    said = qkit(*MODEL, "--card", "rtx-4090", "--explain", "weights").stdout
    assert said.startswith("weights = ")
    assert "x (1/2 byte + 4 bytes of absmax for each 64)" in " ".join(said.split())
    parts = json.loads(qkit(*MODEL, "--explain", "weights", "--json").stdout)
    assert parts[0]["bytes"] == sum(part["bytes"] for part in parts[1:])


def test_verdict_comes_first() -> None:
    assert qkit(str(RECIPE), "--card", "rtx-4090").stdout.startswith("train fits: needs ")
    assert qkit(str(RECIPE), "--memory", "6GiB").stdout.startswith("train does not fit: needs ")


def test_rows_of_a_run_give_a_choice_of_lengths(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "recipe.yaml").write_text(RECIPE.read_text(encoding="utf-8"), encoding="utf-8")
    summary = {"lengths": [[100, 90, 900], [3000, 10, 100]]}
    (tmp_path / "data" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    document = answer(str(tmp_path), "--card", "rtx-4090")
    assert document["lengths"]["percentiles"]["p90"] == 100
    assert document["time"]["tokens"] == 9000 * load.load(RECIPE).train.num_train_epochs
    assert document["time_seconds"] > 0
    assert "p90 100" in qkit(str(tmp_path), "--card", "rtx-4090").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one of the two"),
        ([str(RECIPE), *MODEL], "one of the two"),
        ([*MODEL, "--solve", "speed"], "must be one of max_length, batch, rank, card"),
        ([*MODEL, "--explain", "soup"], "must be one of weights"),
        (["--model", "llama-3.1-8B", "--quantization", "int3"], "must be one of nf4-double"),
    ],
)
def test_what_cannot_be_read_is_the_users_error(arguments: list[str], said: str) -> None:
    done = qkit(*arguments)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_plan_takes_little_memory_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from qkit.cli.app import app\n"
        f"app(['plan', {str(RECIPE)!r}, '--memory', '8GiB'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'trl', 'huggingface_hub'} & {*sys.modules}\n"
        "assert not heavy, heavy\n"
        "peak, = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "print(peak.split()[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) * 1024 < 60 * figures.MIB


@pytest.mark.slow
def test_a_thousand_plans_take_less_than_a_second() -> None:
    how, device = load.load(RECIPE), gpus.device("rtx-4060")
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    for rank in range(1, 1001):
        plan_plan.plan(remedies.apply(how, [remedies.Remedy((f"lora.r={rank}",), 0, "")]), device=device)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - begin < 5  # under 1 s on an idle machine


def test_speed_of_earlier_runs_is_remembered_and_used() -> None:
    how, device = load.load(RECIPE), gpus.device("rtx-4090")
    shape = shape_of(how.model)
    before = plan_speed.pace(how, shape, device, None)
    for speed in (50.0, 100.0, 5000.0):
        plan_speed.remember(how, shape, device, speed, 1.0)
    after = plan_speed.pace(how, shape, device, None)
    assert before.bound
    assert not after.bound
    assert after.tokens_per_second == pytest.approx(100)
    longer = how.model_copy(update={"train": how.train.model_copy(update={"max_steps": 10})})
    assert plan_speed.pace(longer, shape, device, None).seconds == pytest.approx(
        10 * how.data.batch_tokens * how.train.gradient_accumulation_steps / 100
    )
