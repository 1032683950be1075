"""The whole road on a tiny model, with every real component: NF4, TRL, the merge, ONNX Runtime and a vLLM server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml

from helpers.command import qkit, qkit_here
from helpers.paths import ROOT
from helpers.processes import living
from helpers.tiny import CHATML, build_model, chat_rows
from qkit import pipeline
from qkit.core.device import Device
from qkit.core.errors import MissingArtifact
from qkit.recipe.load import load
from qkit.run import stages
from qkit.run.directory import Run
from qkit.train import stage as train_stage
from qkit.train.checkpoints import SEAL

pytestmark = pytest.mark.slow

NOTHING_TO_DO = "nothing to do: every stage is done"


@pytest.fixture
def finished(whole_run: Run) -> Path:
    return whole_run.root


def _summary(run: Path) -> dict[str, Any]:
    return json.loads(qkit("show", run, "--json").stdout)


def test_every_stage_leaves_its_evidence(finished: Path) -> None:
    summary = _summary(finished)
    assert [stage["status"] for stage in summary["stages"].values()] == ["done"] * len(stages.STAGES)
    assert all(stage["peak_bytes"]["measured"] > 20e6 for stage in summary["stages"].values())
    assert summary["stages"]["train"]["peak_bytes"]["predicted"] > 50e6
    assert set(summary["scores"]) == {"base", "adapter", "merged", "onnx-fp32", "onnx-int4", "vllm"}
    assert set(summary["parity"]) == {"adapter", "merged", "onnx-fp32", "onnx-int4", "vllm"}
    assert {(b["artifact"], b["concurrency"]) for b in summary["bench"]} == {
        (artifact, concurrency) for artifact in ("merged", "onnx-fp32", "onnx-int4", "vllm") for concurrency in (1, 2)
    }
    assert all(b["output_tokens_per_second"] > 0 and b["ttft_seconds"]["p50"] > 0 for b in summary["bench"])


def test_bench_records_are_whole(finished: Path) -> None:
    """Each is valid; a server's tokens are usage's, its chunks' and those asked for, and its prompts reached it as trained on."""
    schema = json.loads((Path(pipeline.__file__).parent / "bench" / "bench.schema.json").read_text())
    records = [json.loads(file.read_text()) for file in (finished / "bench").glob("*.json")]
    for record in records:
        jsonschema.validate(record, schema)
        assert record["tokens"] == record["chunks"] == record["prompts"] * record["output_tokens"]
        assert record["quality"]["kl_mean"] is not None and record["model_sha256"] and record["training"]["seconds"] > 0
    served = [record for record in records if record["runtime"] == "vllm"]
    assert {record["load"]["tool"] for record in served} == {"vllm bench serve"}
    assert all(record["argv"] and record["memory"]["rss_tree_peak_bytes"] > 100e6 for record in served)
    assert {record["load"]["kind"] for record in records if record not in served} == {"direct"}


def test_artifacts_are_close_to_the_live_adapter(finished: Path) -> None:
    parity = _summary(finished)["parity"]
    assert parity["merged"]["kl_mean"] < 1e-3 and parity["merged"]["top1"] > 0.9
    assert parity["onnx-fp32"]["kl_mean"] < 1e-3 and parity["onnx-fp32"]["top1"] > 0.9
    assert parity["vllm"]["kl_mean"] < 1e-2 and parity["vllm"]["top1"] > 0.8
    raw = json.loads((finished / "verify" / "parity.json").read_text())["parity"]
    assert parity["adapter"]["status"] is None and raw["adapter"]["kl_mean"] == pytest.approx(raw["merged"]["rounding"])
    contract = {check["name"]: check for check in raw["vllm"]["contract"]}
    assert contract["prompt tokens"]["status"] == contract["stop tokens"]["status"] == "ok"
    assert contract["prompt tokens"]["detail"].startswith(
        "4 "
    )  # every held-out prompt reaches the server as it was trained on
    assert {entry["status"] for name, entry in raw.items() if name != "adapter"} == {"passed"}


def test_the_report_and_the_model_card_are_there(finished: Path) -> None:
    page = (finished / "report" / "index.html").read_text()
    assert "onnx-int4" in page and "http-equiv" in page
    assert "adapter" in (finished / "merge" / "README.md").read_text()


def test_a_copied_run_is_done_too(finished: Path, tmp_path: Path) -> None:
    """Its files have other times and the same content; what is changed in the copy is seen all the same."""
    copy = shutil.copytree(finished, tmp_path / "copy", copy_function=shutil.copyfile)
    assert set(pipeline.statuses(Run.open(copy)).values()) == {"done"}
    done = qkit("run", copy)
    assert done.returncode == 0 and NOTHING_TO_DO in done.stderr
    entry = Run.open(copy).manifest()["stages"]["merge"]["outputs"]["merge/config.json"]
    assert entry["mtime_ns"] == (copy / "merge" / "config.json").stat().st_mtime_ns
    file = copy / "train" / "adapter" / "adapter_model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(bytes(damaged))
    assert pipeline.statuses(Run.open(copy))["train"] == "stale"


def test_a_second_run_does_nothing(finished: Path) -> None:
    before = (finished / "run.json").read_bytes()
    done = qkit("run", finished)
    assert done.returncode == 0 and NOTHING_TO_DO in done.stderr
    assert (finished / "run.json").read_bytes() == before


def test_what_changed_is_done_again_and_no_more(finished: Path) -> None:
    run = Run(finished, load(finished / "recipe.yaml", ["bench.output_tokens=5"]))
    stale = [name for name, status in pipeline.statuses(run).items() if status != "done"]
    assert stale == ["bench", "report"]
    run = Run(finished, load(finished / "recipe.yaml", ["train.learning_rate=1e-3"]))
    assert pipeline.statuses(run)["data"] == "done" and pipeline.statuses(run)["train"] == "stale"


def test_no_process_is_left(finished: Path) -> None:
    mine = [
        p
        for p in psutil.process_iter(["cmdline"])
        if "vllm.entrypoints" in " ".join(p.info["cmdline"] or []) and str(finished) in " ".join(p.info["cmdline"])
    ]
    assert not mine


def test_json_is_the_only_thing_on_stdout(finished: Path) -> None:
    for command in (["show", finished], ["run", finished], ["plan", finished], ["inspect", finished]):
        done = qkit(*command, "--json")
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)


@contextmanager
def served(run: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`qkit serve` in a process of its own, as below a shell that ignores SIGINT for its jobs, and what it says of itself."""
    command = [sys.executable, "-m", "qkit", "serve", str(run), "--json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        assert process.stdout
        lines = []
        while not lines or lines[-1] not in ("}\n", ""):
            lines.append(process.stdout.readline())
        yield process, json.loads("".join(lines))
    finally:
        process.kill()
        process.communicate()


def test_a_server_answers_and_stops_cleanly(finished: Path) -> None:
    """As a person uses it: chat completions through the openai client, and the example client, then Ctrl-C."""
    import openai

    shared = set(Path("/dev/shm").glob("psm_*"))
    with served(finished) as (process, described):
        children = psutil.Process(process.pid).children(recursive=True)
        client = openai.OpenAI(base_url=f"{described['url']}/v1", api_key="none")
        asked = {"model": described["model"], "messages": [{"role": "user", "content": "say a "}], "temperature": 0}
        answer = client.chat.completions.create(**asked, max_tokens=6)
        assert answer.choices[0].message.content is not None
        assert answer.usage and answer.usage.completion_tokens <= 6
        assert [chunk for chunk in client.chat.completions.create(**asked, max_tokens=4, stream=True) if chunk.choices]
        example = ROOT / "serve" / "client.py"
        command = [sys.executable, str(example), "Hello", "--url", f"{described['url']}/v1", "--max-tokens", "4"]
        assert subprocess.run(command, capture_output=True, check=True).stdout
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=40) == 0
        assert process.stderr and "stopped" in process.stderr.read()
    assert len(children) > 1 and not living(children, 5)
    assert set(Path("/dev/shm").glob("psm_*")) <= shared


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        ("cpu", ["serve", "verify", "bench", "serve ends", "report"]),
        (
            "cuda",
            ["serve", "serve ends", "verify", "bench", "report"],
        ),  # a card has no room for a server beside a model
    ],
)
def test_when_the_server_is_up(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, order: list[str]
) -> None:
    run = Run.create(tmp_path / "run", load(tiny_recipe))
    events: list[str] = []

    class Stage:
        """A stage's process that does nothing; the server's is ready at once."""

        returncode = 0

        def __init__(self, run: Run, name: str, _: object):
            self.name, self.stdin = name, self
            events.append(name)
            if name == "serve":
                (run.root / ".work" / "serve").mkdir(parents=True)
                (run.root / ".work" / "serve" / "server.json").touch()

        def close(self) -> None:
            events.append(f"{self.name} ends")

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(pipeline, "_process", Stage)
    monkeypatch.setattr(pipeline, "detect", lambda: Device(kind, "a device", 24 << 30, 2))
    assert pipeline.run_all(run) == list(stages.STAGES)
    assert events[events.index("serve") :] == order


# --- killed at any moment -----------------------------------------------------------------------------------------------


def _run_data(tiny_recipe: Path, root: Path, *overrides: str) -> Run:
    run = Run.create(root, load(tiny_recipe, overrides))
    pipeline.execute(run, "data")
    return run


def test_a_killed_training_goes_on_to_the_same_result(tiny_recipe: Path, tmp_path: Path) -> None:
    """Killed with SIGKILL after a checkpoint; the same command ends with the same adapter, bit for bit, and the same metrics."""
    settings = ["train.max_steps=24", "train.save_steps=4"]
    whole = _run_data(tiny_recipe, tmp_path / "whole", *settings)
    pipeline.execute(whole, "train")
    cut = _run_data(tiny_recipe, tmp_path / "cut", *settings)
    process = subprocess.Popen([sys.executable, "-m", "qkit", "train", str(cut.root), "--quiet"])
    while not any((cut.root / ".work" / "train" / "checkpoints").glob(f"checkpoint-*/{SEAL}")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not cut.folder("train").exists() and pipeline.statuses(cut)["train"] == "missing"
    assert qkit_here("train", cut.root).returncode == 0
    resumed = [json.loads(line)["loss"] for line in (cut.folder("train") / "metrics.jsonl").read_text().splitlines()]
    straight = [json.loads(line)["loss"] for line in (whole.folder("train") / "metrics.jsonl").read_text().splitlines()]
    assert resumed == straight and len(straight) == 24
    assert (cut.folder("train") / "adapter" / "adapter_model.safetensors").read_bytes() == (
        whole.folder("train") / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("moment", [(Run, "record"), (Run, "commit"), (Path, "rename"), (Path, "unlink")])
def test_a_training_that_is_killed_at_its_very_end_is_not_done_again(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: tuple[Any, str]
) -> None:
    import transformers

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    run, whole = _run_data(tiny_recipe, tmp_path / "run"), train_stage.run
    with monkeypatch.context() as patched:

        def then_killed(given: Run, out: Path) -> Any:
            peak = whole(given, out)
            patched.setattr(*moment, killed)
            return peak

        patched.setattr(train_stage, "run", then_killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.execute(run, "train")
    monkeypatch.setattr(transformers.Trainer, "training_step", lambda *_: pytest.fail("it trains again"))
    adapter = next(run.root.rglob("adapter_model.safetensors"))
    before = adapter.read_bytes()
    if moment != (Path, "unlink"):  # after that it is in its place
        assert pipeline.statuses(run)["train"] != "done"
        pipeline.execute(run, "train")
    assert pipeline.statuses(run)["train"] == "done"
    assert (run.folder("train") / "adapter" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("sign", ["recipe.yaml", "data/summary.json", ".work/train/checkpoints", "train/adapter"])
def test_a_killed_run_leaves_nothing_half_done(tiny_recipe: Path, tmp_path: Path, sign: str) -> None:
    """SIGKILL to `qkit run` alone as soon as it has come so far: its stage dies too, and no folder of a stage is there without its record."""
    root = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-m", "qkit", "run", str(tiny_recipe), "--out", str(root), "--quiet"])
    while not (root / sign).exists():
        assert process.poll() is None
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not living(children, 10)
    run = Run.open(root)
    done = {name for name, status in pipeline.statuses(run).items() if status == "done"}
    assert all(run.whole(name) for name in done)
    assert qkit_here("data", tiny_recipe, "--out", root).returncode == 0  # the lock is free again


def test_changed_outputs_are_noticed(tiny_recipe: Path, tmp_path: Path) -> None:
    run = _run_data(tiny_recipe, tmp_path / "run")
    assert pipeline.statuses(run)["data"] == "done"
    rows = run.folder("data") / "train.parquet"
    os.utime(rows, ns=(1, 1))  # as a copy has it: another time, the same content
    assert pipeline.statuses(run)["data"] == "done"
    damaged = bytearray(rows.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    rows.write_bytes(bytes(damaged))
    assert pipeline.statuses(run)["data"] == "stale"
    with pytest.raises(MissingArtifact, match="out of date"):
        pipeline.execute(run, "train")


def test_changed_rows_are_noticed(tiny_recipe: Path, rows_file: Path, tmp_path: Path) -> None:
    """By their content; what was made of the old ones is still good for the stages of a run that goes on."""
    run = _run_data(tiny_recipe, tmp_path / "run")
    before = rows_file.read_bytes()
    with rows_file.open("ab") as file:
        file.write(before.splitlines(keepends=True)[0].replace(b"say a", b"say it"))
    assert pipeline.statuses(run)["data"] == "stale"
    pipeline._check_inputs(run, stages.STAGES["train"])
    rows_file.write_bytes(before)
    assert pipeline.statuses(run)["data"] == "done"
    run.refresh_mtimes()
    [[stamp]] = [files.values() for files in run.manifest()["stages"]["data"]["sources"].values()]
    assert stamp["mtime_ns"] == rows_file.stat().st_mtime_ns
    rows_file.write_bytes(before.replace(b"say a", b"SAY a", 1))
    assert pipeline.statuses(run)["data"] == "stale"
    pipeline.execute(run, "data")
    assert pipeline.statuses(run)["data"] == "done"


def test_a_run_without_its_rows_is_done(tiny_recipe: Path, rows_file: Path, tmp_path: Path) -> None:
    """Copied to another machine; and a run of a version that did not note what it read."""
    run = _run_data(tiny_recipe, tmp_path / "run")
    content = rows_file.read_bytes()
    rows_file.unlink()
    assert pipeline.statuses(run)["data"] == "done"
    rows_file.write_bytes(content[:-1])
    assert pipeline.statuses(run)["data"] == "stale"
    manifest = run.manifest()
    del manifest["stages"]["data"]["sources"]
    (run.root / "run.json").write_text(json.dumps(manifest))
    assert pipeline.statuses(run)["data"] == "done"


def test_a_changed_folder_or_template_is_noticed(tiny_recipe: Path, rows_file: Path, tmp_path: Path) -> None:
    folder, template = tmp_path / "rows", tmp_path / "rows" / "mine.jinja"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(rows_file, folder / "deep" / "a.jsonl")
    template.write_text(CHATML)
    settings = [f"data.train=[{{source: {folder}}}]", "data.test=[]", f"model.chat_template={template}"]
    run = _run_data(tiny_recipe, tmp_path / "run", *settings)
    (folder / "README.md").write_text("What these are.")
    assert pipeline.statuses(run)["data"] == "done"
    (folder / "b.jsonl").write_text(json.dumps(chat_rows(1)[0]))
    assert pipeline.statuses(run)["data"] == "stale"
    (folder / "b.jsonl").unlink()
    assert pipeline.statuses(run)["data"] == "done"
    template.write_text(CHATML + " ")
    assert pipeline.statuses(run)["data"] == "stale"


def test_an_adapter_for_another_base(tiny_recipe: Path, tmp_path: Path) -> None:
    """The base model's folder is replaced after training: merging says so, and what was made before stays."""
    model = tmp_path / "model"
    build_model(model, seed=0)
    settings = yaml.safe_load(tiny_recipe.read_text())
    settings["model"]["source"] = str(model)
    tiny_recipe.write_text(yaml.safe_dump(settings))
    run = _run_data(tiny_recipe, tmp_path / "run")
    assert qkit_here("train", run.root).returncode == 0
    assert qkit_here("evaluate", run.root).returncode == 0
    shutil.rmtree(model)
    build_model(model, seed=1)
    done = qkit_here("merge", run.root)
    assert done.returncode == 2 and "was trained on" in done.stderr
    assert pipeline.statuses(run)["train"] == "done" and not run.folder("merge").exists()
