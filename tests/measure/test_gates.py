"""The limits of each kind of artifact, and what becomes of a run with an artifact beyond them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.command import qkit, qkit_here
from helpers.sample import edit, open_sample
from helpers.tiny import tiny_settings
from qkit import pipeline
from qkit.core.errors import ParityFailed, RecipeError
from qkit.core.files import write_json
from qkit.measure import evidence, parity, remedies
from qkit.measure import gates as measure_gates
from qkit.measure.gates import Exactness
from qkit.measure.parity import Parity
from qkit.measure.scores import SignTest
from qkit.plugins.exporter import exporter
from qkit.plugins.task import open_task
from qkit.recipe.load import load
from qkit.recipe.registry import format_names, split
from qkit.recipe.schema import Gate, Recipe
from qkit.run.directory import Run

GATES = open_task("chat").GATES

NEAR = Parity(
    kl_mean=5e-4, kl_p99=0.01, top1=0.998, heldout_loss=0.17, rows=100, tokens=3977, over="all tokens", kl_base=0.9, kl_base_live=5e-4
)  # fmt: skip


def recipe(model: Path, **gates: object) -> Recipe:
    return Recipe.model_validate(
        {"task": "chat", "model": {"source": str(model)}, "data": {}, "verify": {"gates": gates}}
    )


@pytest.mark.parametrize("name", ["merged", *format_names()])
def test_every_format_has_its_gate(name: str, tiny_model: Path) -> None:
    """16 bits: 1e-4; quantized: 0.1 and the score; fp32: also equal to what it was made from."""
    kind, variant = split(name)
    quantized = kind != "merged" and (variant in exporter(name).QUANTIZED or name == "vllm-adapter")
    found = measure_gates.gate_of(name, recipe(tiny_model))
    assert found.kl_mean == (0.1 if quantized else 1e-4) and bool(found.score) is quantized
    assert (found.top1, found.max_difference) == ((1.0, 1e-3) if name == "onnx-fp32" else (None, None))


def test_a_recipe_changes_what_it_names_and_no_more(tiny_model: Path) -> None:
    how = recipe(tiny_model, **{"onnx-int4": {"kl_mean": 0.05, "kl_p99": 1}, "merged": {"kl_mean": float("inf")}})
    again = Recipe.model_validate(yaml.safe_load(how.to_yaml()))
    for one in (how, again):
        assert measure_gates.gate_of("onnx-int4", one) == Gate(kl_mean=0.05, kl_row=2.0, kl_p99=1, score=True)
        assert not measure_gates.judge(measure_gates.gate_of("merged", one), replace(NEAR, kl_mean=9.0))


def test_a_wrong_gate_is_named_with_its_line(tiny_recipe: Path) -> None:
    settings = yaml.safe_load(tiny_recipe.read_text())
    del settings["verify"]
    text = yaml.safe_dump(settings) + "verify:\n  gates:\n    onnx-int44: {}\n    vllm:\n      kl_men: 1\n"
    tiny_recipe.write_text(text)
    lines = len(text.splitlines())
    with pytest.raises(RecipeError) as caught:
        load(tiny_recipe, ["verify.gates.merged.kl_mean=-1"])
    said = str(caught.value)
    assert f"{tiny_recipe}:{lines}: unknown key 'verify.gates.vllm.kl_men', did you mean 'kl_mean'?" in said
    assert f"{tiny_recipe}:{lines - 2}: verify.gates: unknown format 'onnx-int44', did you mean 'onnx-int4'?" in said
    assert "--set: verify.gates.merged.kl_mean: Input should be greater than or equal to 0" in said


@pytest.mark.parametrize(
    ("gate", "measured", "change", "exactness", "fires", "message"),
    [
        (GATES["16-bit"], replace(NEAR, beyond=5e-5), None, None, [], ""),
        (GATES["16-bit"], replace(NEAR, kl_mean=0.0021), None, None, ["kl_mean"], "0.0021 (limit 0.0001)"),
        (GATES["16-bit"], replace(NEAR, kl_mean=float("nan")), None, None, ["kl_mean"], "nan (limit 0.0001)"),
        (GATES["16-bit"], replace(NEAR, beyond=0.0, worst_row=0.3), None, None, ["kl_row"], "0.3 (limit 0.05)"),
        (Gate(kl_p99=0.005), NEAR, None, None, ["kl_p99"], "0.01 (limit 0.005)"),
        (GATES["quantized"], replace(NEAR, kl_mean=0.09), SignTest(5, 2, 100), None, [], ""),
        (GATES["quantized"], NEAR, SignTest(4, 0, 100), None, [], ""),  # p = 1/8: chance
        (GATES["quantized"], NEAR, SignTest(6, 0, 100), None, ["score"], "in points -6 (limit 0): 6 answers lost and 0 gained of 100"),
        (GATES["quantized"], NEAR, SignTest(0, 6, 100), None, [], ""),  # better
        (GATES["16-bit"], replace(NEAR, beyond=0.0), SignTest(90, 0, 100), None, [], ""),  # has no score gate
        (GATES["exact"], NEAR, None, Exactness(1.0, 1.3e-4, 32), [], ""),
        (GATES["exact"], NEAR, None, Exactness(0.999, 1.3e-4, 32), ["top1"], "0.999 (limit 1)"),
        (GATES["exact"], NEAR, None, Exactness(1.0, 0.02, 32), ["max_difference"], "0.02 (limit 0.001)"),
        (GATES["exact"], NEAR, None, Exactness(float("nan"), float("nan"), 32), ["top1", "max_difference"], "nan (limit"),
        (Gate(kl_mean=float("inf")), replace(NEAR, kl_base=0.1, kl_base_live=0.2), None, None, ["lost"], "is lost 0.1 (limit 0.2)"),
    ],
)  # fmt: skip
def test_limits(
    gate: Gate, measured: Parity, change: SignTest | None, exactness: Exactness | None, fires: list[str], message: str
) -> None:  # fmt: skip
    found = measure_gates.judge(gate, measured, change, exactness)
    assert [breach.gate for breach in found] == fires
    assert message in "".join(breach.message for breach in found)


def test_what_is_said_of_each_limit(tmp_path: Path, tiny_recipe: Path) -> None:
    """Artifact, figure, limit, what to do; and only of those that were asked for."""
    run = Run.create(tmp_path / "run", load(tiny_recipe))
    measure_gates.check(run)  # nothing has been measured: nothing failed
    run.folder("verify").mkdir()
    failed = [{"gate": "kl_mean", "figure": 0.21, "limit": 0.1}]
    entries = {"onnx-int4": {"status": "failed", "failed": failed}, "vllm": {"status": "passed", "failed": []}}
    write_json(run.folder("verify") / "parity.json", {"parity": entries, "scores": {}})
    measure_gates.check(run, "vllm")
    for names in ((), ("onnx-int4",)):
        with pytest.raises(ParityFailed) as caught:
            measure_gates.check(run, *names)
        assert (caught.value.artifact, caught.value.gate, caught.value.figure) == ("onnx-int4", "kl_mean", 0.21)
        assert str(caught.value).startswith(f"{run.root}: onnx-int4 failed its gate: ") and "0.21 (limit 0.1)" in str(
            caught.value
        )
        assert "accept it: --set verify.gates.onnx-int4.kl_mean=0.23" in str(caught.value)


@pytest.mark.parametrize("status", ["failed", "passed"])
def test_a_verdict_on_other_files_is_not_one_on_these(status: str, tmp_path: Path) -> None:
    """An export that was made again after `verify`: its gate has not failed, and has not passed either."""
    run = open_sample(tmp_path)
    verified = json.loads((run.folder("verify") / "parity.json").read_text())
    failed = [{"gate": "kl_mean", "figure": 0.21, "limit": 0.1}] if status == "failed" else []
    verified["parity"]["onnx-int4"] |= {"status": status, "failed": failed}
    edit(run, "verify/parity.json", **verified)
    assert evidence.read_evidence(run.root).status("onnx-int4") == status
    manifest = run.manifest()
    manifest["stages"]["export"]["outputs"]["export/onnx-int4/model.onnx"]["sha256"] = 64 * "f"
    edit(run, "run.json", **manifest)
    now = evidence.read_evidence(run.root)
    assert now.stale == {"onnx-int4"} and now.status("onnx-int4") is None and not now.failures()
    assert "onnx-int4" not in now.scores and "merged" in now.scores and "adapter" in now.scores
    measure_gates.check(run, "onnx-int4")


def test_the_files_that_a_verdict_is_of_are_known_by_the_manifest(tmp_path: Path) -> None:
    run = open_sample(tmp_path)
    manifest = run.manifest()
    assert evidence.is_current(manifest, "verify", "merged") and evidence.is_current(manifest, "verify", "adapter")
    manifest["stages"]["merge"]["outputs"]["merge/more.safetensors"] = {"sha256": 64 * "f"}
    assert not evidence.is_current(manifest, "verify", "merged") and evidence.is_current(
        manifest, "verify", "onnx-int4"
    )
    del manifest["stages"]["export"]
    assert not evidence.is_current(manifest, "verify", "onnx-int4")
    assert evidence.is_current({}, "verify", "merged")  # without a record nothing says that the files changed


@pytest.mark.parametrize("name", ["merged", "vllm", "onnx-fp32", "onnx-int4", "gguf-q4_0", "vllm-w4a16"])
@pytest.mark.parametrize("gate", evidence.DESCRIPTIONS)
def test_what_accepts_a_figure_is_a_setting_that_accepts_it(
    name: str, gate: str, tmp_path: Path, tiny_recipe: Path
) -> None:
    """Every `--set` that a remedy names loads; the one that accepts lets this very figure pass."""
    figure = 0.9871 if gate == "top1" else 0.2131
    made = [] if name == "merged" else [f"export.formats=[{name}]", f"bench.runtimes=[transformers,{name}]"]
    run = Run.create(tmp_path / "run", load(tiny_recipe, made))
    advice = remedies.remedy(run, name, evidence.Breach(gate, figure, 0.1))
    settings = re.findall(r"--set (\S+?=(?:\[[^\]]*\]|[\w.-]*\w))", advice)
    assert settings or "`qkit verify" in advice  # something to do
    load(tiny_recipe, [*made, *settings])  # no error: what it names can be set
    accepting = [setting for setting in settings if setting.startswith("verify.gates.")]
    assert bool(accepting) is (gate in ("kl_mean", "kl_row", "kl_p99", "top1", "max_difference", "score"))
    for setting in accepting:
        allowed = measure_gates.gate_of(name, load(tiny_recipe, [setting]))
        beyond = replace(NEAR, kl_mean=figure, kl_p99=figure, worst_row=figure)
        exact = Exactness(figure, figure, 32) if gate in ("top1", "max_difference") else None
        loss = SignTest(lost=30, gained=0, rows=100) if gate == "score" else None
        assert gate not in [breach.gate for breach in measure_gates.judge(allowed, beyond, loss, exact)], setting


def test_answers_may_hold_any_character(tmp_path: Path) -> None:
    """U+2028 and U+0085 end a line for splitlines, and none of a file of JSON lines."""
    run = open_sample(tmp_path)
    line = {"artifact": "adapter", "correct": True, "text": "a\u2028b\u0085c"}
    file = run.folder("evaluate") / "predictions.jsonl"
    file.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert evidence.reference_answers(run) == [line]


@pytest.mark.slow
def test_a_failed_gate_ends_a_run_after_its_report(tiny_recipe: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The measurement is kept and the stages are done; exit code 2, now and the next time, when nothing is measured again."""
    rows = yaml.safe_load(tiny_recipe.read_text())["data"]["train"][0]["source"]
    settings = tiny_settings(tiny_model, Path(rows))
    settings |= {"export": {"formats": []}, "verify": {"gates": {"merged": {"kl_p99": 1e-9}}}}
    settings["bench"] |= {"runtimes": ["transformers"], "concurrency": [1]}
    tiny_recipe.write_text(yaml.safe_dump(settings))
    run = Run.create(tmp_path / "run", load(tiny_recipe))
    for stage in ("data", "train", "evaluate", "merge", "export", "verify", "bench"):
        pipeline.execute(run, stage)
    first, again = qkit("run", run.root), qkit_here("run", run.root, "--json")
    assert first.returncode == again.returncode == 2
    assert (run.folder("report") / "index.html").read_text().count("merged failed its gate") == 1
    assert set(pipeline.statuses(run).values()) == {"done"}
    kept = json.loads((run.folder("verify") / "parity.json").read_text())["parity"]["merged"]
    assert kept["status"] == "failed" and kept["failed"][0]["limit"] == 1e-9 and kept["kl_p99"] > 1e-9
    assert json.loads(again.stdout)["error"]["type"] == "ParityFailed"
    said = "merged failed its gate: 99th percentile of the KL to the trained model"
    assert said in first.stdout and said in first.stderr and said in again.stderr
    accepted = Run(run.root, load(run.root / "recipe.yaml", ["verify.gates.merged.kl_p99=0.1"]))
    pipeline.execute(accepted, "verify")
    measure_gates.check(accepted)


def test_bounds_of_what_is_only_known_in_part() -> None:
    """Over the top tokens that both show: never above the full divergence, and nothing for a model beside itself."""
    import numpy as np

    from qkit.measure import divergence
    from qkit.plugins.runtime import RowScores

    def scores(seed: int, top: int = 0) -> RowScores:
        logits = np.random.default_rng(seed).normal(size=(7, 40), scale=2).astype("f4")
        full = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        ids = np.argsort(-full, 1)[:, :top]
        part = {"top_ids": ids, "top": np.take_along_axis(full, ids, 1)} if top else {"full": full}
        return RowScores(full[:, 0], full.argmax(1), **part)

    exact = divergence.divergence(scores(0), scores(1))
    for reference, other in ((scores(0), scores(1, 9)), (scores(0, 9), scores(1)), (scores(0, 9), scores(1, 9))):
        bound = divergence.divergence(reference, other)
        assert (bound <= exact + 1e-5).all() and (bound > -1e-5).all() and bound.mean() > 0.05
    assert abs(divergence.divergence(scores(0, 9), scores(0, 9))).max() < 1e-5
    assert parity.largest_difference(scores(0), scores(1, 9)) is None


@pytest.mark.parametrize(
    ("name", "settings", "limit"),
    [
        ("vllm", {}, 1e-4),
        ("vllm-adapter", {}, 0.1),  # vLLM has the base in 16 bit, and it was trained on in 4
        ("vllm-adapter", {"quantization": {"load_in_4bit": False}}, 1e-4),
        ("merged", {"merge": {"base": "16bit"}}, 0.1),
        ("onnx-fp32", {"merge": {"choose": "score"}}, 0.1),
    ],
)
def test_another_base_by_choice_is_held_to_the_limits_of_rounding(
    name: str, settings: dict[str, Any], limit: float
) -> None:
    how = Recipe.model_validate({"task": "chat", "model": {"source": "none"}, "data": {}, **settings})
    found = measure_gates.gate_of(name, how)
    assert found.kl_mean == limit
    assert found.max_difference == (1e-3 if name == "onnx-fp32" else None)


def test_every_gate_has_its_remedy() -> None:
    assert set(remedies.REMEDIES) == set(evidence.DESCRIPTIONS)
    assert set(Gate.model_fields) <= {gate for gate, entry in remedies.REMEDIES.items() if entry.accepted}


def test_a_tie_of_the_top_tokens_is_no_difference() -> None:
    """Two tokens that are equally likely within an fp32 file's own limit: which of them comes first is chance."""
    import numpy as np

    from qkit.plugins.runtime import RowScores
    from qkit.verify.stage import ExactnessMeter

    def scores(full: np.ndarray, top1: list[int]) -> RowScores:
        return RowScores(full[:, 0], np.array(top1), full=full)

    full = np.log(np.array([[0.5, 0.499999, 0.000001], [0.5, 0.4, 0.1]], "f4"))
    meter = ExactnessMeter([scores(full, [0, 0])], 1e-3)
    meter.add(scores(full, [1, 1]))  # the first is a tie, the second is not
    meter.add(scores(full, [2, 2]))  # there is nothing to compare this row with
    assert meter.result() == Exactness(top1=0.5, max_difference=0.0, rows=1)
    assert ExactnessMeter([], 1e-3).result() is None
