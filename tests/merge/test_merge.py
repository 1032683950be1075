"""The stages `merge` and `export`: every way is measured, the nearest to the live adapter is kept, and a lost fine-tune is an error."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qkit.core.device import detect
from qkit.core.errors import ModelError, ParityFailed
from qkit.core.files import read_json
from qkit.export import stage as export_stage
from qkit.measure import candidates, gates, held_out, parity
from qkit.measure import reference as measure_reference
from qkit.measure.candidates import Candidate, CandidateResult
from qkit.measure.parity import Parity
from qkit.merge import stage as merge_stage
from qkit.merging import folder as merging_folder
from qkit.model import provenance, source
from qkit.plugins.runtime import open_runtime
from qkit.recipe import schema
from qkit.recipe.load import load
from qkit.recipe.schema import Base, Quantization
from qkit.run.directory import Run

pytestmark = pytest.mark.slow


@pytest.fixture
def finished(whole_run: Run) -> Run:
    """A run with a fine-tune that is small against the 4-bit grid."""
    return whole_run


def test_every_way_is_measured_and_the_nearest_kept(finished: Run) -> None:
    table = read_json(finished.need("merge", "candidates.json"))
    rows = {row["name"]: row for row in [*table["candidates"], *table["beside"]]}
    assert list(rows) == ["dequantized", "16bit", "base", "adapter", "adapter-16bit"]
    kl = {name: row["parity"]["kl_mean"] for name, row in rows.items() if row["parity"]}
    assert table["chosen"] == "dequantized" and 0 < kl["adapter"] < kl["base"] / 20  # what bf16 makes of it
    assert 10 * kl["dequantized"] < kl["16bit"] and 10 * kl["dequantized"] < kl["base"]
    assert rows["base"]["lost"] and not rows["dequantized"]["lost"]
    assert rows["dequantized"]["score"]["rows"] == 4 and "low" in rows["dequantized"]["gain"]
    assert rows["adapter-16bit"]["parity"] is None and "not measured" in rows["adapter-16bit"]["note"]
    assert len(table["texts"]) == 4
    assert not list(finished.folder("merge").glob(".*"))
    assert json.loads((finished.folder("merge") / "generation_config.json").read_text())["eos_token_id"] is not None


def test_the_kept_one_is_what_its_row_says(finished: Run) -> None:
    row = read_json(finished.need("merge", "candidates.json"))["candidates"][0]
    found = _distance(finished, finished.folder("merge"))
    assert found.to_dict() == pytest.approx(row["parity"], abs=1e-6)


def test_a_quantized_format_is_made_from_both_and_the_nearer_kept(finished: Run) -> None:
    table = read_json(finished.need("export", "candidates.json"))["onnx-int4"]
    kl = {row["name"]: row["parity"]["kl_mean"] for row in table["candidates"]}
    assert kl.keys() == {"dequantized", "16bit"} and table["chosen"] == min(kl, key=lambda name: kl[name])
    note = read_json(finished.need("export", "onnx-int4") / "qkit.json")
    assert note["base"] == table["chosen"] and note["merged"][0]["adapters"]
    assert read_json(finished.need("export", "onnx-fp32") / "qkit.json")["base"] == "dequantized"
    assert not list(finished.folder("export").rglob(".*"))
    assert not list(finished.folder("export").glob("*/candidates.json"))


def test_the_merged_model_takes_no_adapter_twice(finished: Run) -> None:
    with pytest.raises(ModelError, match=r"is already merged into"):
        provenance.check_adapter(finished.need("train", "adapter"), finished.folder("merge"))


def _distance(run: Run, folder: Path) -> Parity:
    rows = held_out.held_out_of(run).rows
    reference = measure_reference.recorded(run, rows)
    with open_runtime("transformers", folder, detect()) as runtime:
        return parity.measure(reference, runtime.score(rows))


def _requantized(folder: Path, out: Path) -> Path:
    """The model of a folder after NF4, as an ordinary one; what is served in 4 bit says the same."""
    how = BitsAndBytesConfig(**Quantization().model_dump())
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16, quantization_config=how)
    source.dequantize(loaded)
    del loaded.config.quantization_config
    loaded.hf_quantizer = None
    loaded.save_pretrained(out)
    return out


def _shrunk(run: Run, root: Path, share: float) -> Run:
    """The same run with an adapter whose deltas are smaller."""
    shutil.copytree(run.root, root, ignore=shutil.ignore_patterns(".work", "merge", "export"))
    file = root / "train" / "adapter" / "adapter_model.safetensors"
    pairs = load_file(file)
    save_file({name: t * share if ".lora_B." in name else t for name, t in pairs.items()}, file)
    return Run(root, run.recipe)


def test_quantizing_the_dequantized_merge_again_loses_the_fine_tune(finished: Run, tmp_path: Path) -> None:
    """Deltas that are small against the grid fall back onto the points that they came from; on the 16-bit weights they survive better."""
    small = _shrunk(finished, tmp_path / "run", 0.25)
    found = {}
    for base in ("dequantized", "16bit"):
        merging_folder.write_folder(small, tmp_path / base, base)
        found[base] = _distance(small, _requantized(tmp_path / base, tmp_path / f"{base}-nf4"))
        assert not _distance(small, tmp_path / base).lost or base == "16bit"
    assert found["dequantized"].lost
    lost = CandidateResult.of(Candidate("dequantized"), found["dequantized"])
    with pytest.raises(ParityFailed) as caught:
        candidates.refuse_lost(lost, "x", "export x", export_stage.LOST)
    assert (caught.value.artifact, caught.value.gate, caught.value.figure) == ("x", "lost", lost.parity.kl_base_live)


def test_a_stage_with_nothing_left_of_the_fine_tune_fails(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base itself in the place of its merge: nearer to the base than to the adapter, and nothing is left behind."""
    run = _shrunk(finished, tmp_path / "run", 1.0)
    (tmp_path / "out").mkdir()
    write = merging_folder.write_folder

    def without_the_adapter(run: Run, out: Path, base: Any, *rest: Any, **more: Any) -> None:
        write(run, out, base, *rest, **more)
        shutil.copyfile(Path(run.recipe.model.source) / "model.safetensors", out / "model.safetensors")

    monkeypatch.setattr(merge_stage, "write_folder", without_the_adapter)
    with pytest.raises(ParityFailed) as caught:
        merge_stage.run(run, tmp_path / "out")
    assert (caught.value.artifact, caught.value.gate) == ("merged", "lost")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_adapter_that_changed_nothing_raises_no_alarm(finished: Run, tmp_path: Path) -> None:
    """Base, adapter and merge are one model then, and which of two is nearer is chance: there is nothing to lose."""
    run = _shrunk(finished, tmp_path / "run", 1e-9)
    run.folder("merge").mkdir()
    merge_stage.run(run, run.folder("merge"))
    rows = candidates.read_table(run)["candidates"]
    assert not any(row["lost"] for row in rows)
    assert gates.judge(gates.gate_of("merged", run.recipe), Parity(**rows[0]["parity"])) == []


def test_a_model_that_float16_breaks_keeps_its_merge(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations of some models overflow in it: they were merged well, and float16 was only tried."""
    monkeypatch.setattr(candidates, "rounds_too_much", lambda recipe, _: len(recipe.merge.dtypes) > 1)
    measure = merge_stage.measure

    def measured(run: Run, candidate: Candidate, *rest: Any) -> CandidateResult:
        if candidate.dtype == "float16":
            raise ParityFailed("NaN log-probabilities")
        return measure(run, candidate, *rest)

    monkeypatch.setattr(merge_stage, "measure", measured)
    run = _shrunk(finished, tmp_path / "run", 1.0)
    run.folder("merge").mkdir()
    merge_stage.run(run, run.folder("merge"))
    assert candidates.read_table(run)["chosen"] == "dequantized"
    assert read_json(run.need("merge", "config.json"))["dtype"] == "bfloat16"
    assert run.need("merge", "model.safetensors") and not list(run.folder("merge").glob(".*"))


@pytest.mark.parametrize("nearest", ["measured", "float16"])
def test_a_merge_beyond_its_gate_is_tried_in_float16(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nearest: str
) -> None:
    """What is exported is made from it where it is the nearest; in a model this small bf16's own products are as far off as its weights."""
    monkeypatch.setattr(candidates, "rounds_too_much", lambda recipe, _: len(recipe.merge.dtypes) > 1)
    if nearest == "float16":
        monkeypatch.setattr(candidates, "choose", lambda rows, _: rows[-1 if len(rows) == 3 else 0])
    run = _shrunk(finished, tmp_path / "run", 1.0)
    for name, stage in {"merge": merge_stage, "export": export_stage}.items():
        run.folder(name).mkdir()
        stage.run(run, run.folder(name))
    table = candidates.read_table(run)
    kl = {row["name"]: row["parity"]["kl_mean"] for row in table["candidates"]}
    assert list(kl) == ["dequantized", "16bit", "dequantized-fp16"]
    chosen = min(kl, key=lambda name: kl[name]) if nearest == "measured" else "dequantized-fp16"
    dtype = "float16" if chosen.endswith("-fp16") else "bfloat16"
    assert table["chosen"] == chosen and len(table["texts"]) == 4
    weights = load_file(run.need("merge", "model.safetensors"))
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}
    assert merging_folder.dtype_of(run) == read_json(run.need("merge", "config.json"))["dtype"] == dtype
    assert not list(run.folder("merge").glob(".*"))
    made = {row["name"] for row in read_json(run.need("export", "candidates.json"))["onnx-int4"]["candidates"]}
    assert made == {chosen, "16bit"}
    assert read_json(run.need("export", "onnx-fp32") / "qkit.json")["base"] == chosen


def test_a_dtype_that_the_recipe_names_is_kept(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "rounds_too_much", lambda recipe, _: len(recipe.merge.dtypes) > 1)
    settings = ["merge.dtype=bfloat16", "merge.base=dequantized"]
    run = Run(finished.root, load(finished.root / "recipe.yaml", settings))
    merge_stage.run(run, tmp_path)
    assert [row["name"] for row in read_json(tmp_path / "candidates.json")["candidates"]] == ["dequantized"]
    assert read_json(tmp_path / "config.json")["dtype"] == "bfloat16"


# --- the rule ---------------------------------------------------------------------------------------------------------


def _row(name: str, kl: float, score: float, lost: bool = False) -> CandidateResult:
    near, far = (0.1, 0.9) if lost else (0.9, 0.1)
    found = Parity(kl, kl, 1.0, 0.5, 4, 40, "all tokens", None, kl_base=near, kl_base_live=far)
    return CandidateResult(name, "", found, {"score": score})


@pytest.mark.parametrize(
    ("rows", "rule", "chosen", "otherwise"),
    [
        ([_row("a", 0.1, 40), _row("b", 0.2, 30)], "fidelity", "a", None),
        ([_row("a", 0.1, 40), _row("b", 0.2, 50)], "fidelity", "a", "b"),
        ([_row("a", 0.1, 40), _row("b", 0.2, 50)], "score", "b", "a"),
        ([_row("a", 0.2, 40), _row("b", 0.1, 40)], "score", "b", None),
        ([_row("a", 0.1, 40, lost=True), _row("b", 0.2, 30)], "fidelity", "b", None),
        ([_row("a", 0.1, 40, lost=True), _row("b", 0.2, 30)], "score", "b", None),
        ([_row("a", 0.1, 40, lost=True)], "fidelity", "a", None),
    ],
)
def test_the_rule(rows: list[CandidateResult], rule: str, chosen: str, otherwise: str | None) -> None:
    table = candidates.table(rows, rule)
    assert table["chosen"] == chosen
    assert (table["otherwise"] or {}).get("chosen") == otherwise
    if otherwise:
        assert f"takes {otherwise}: {chosen} has KL" in table["otherwise"]["words"]


def test_without_4_bit_there_is_one_way(tiny_recipe: Path) -> None:
    only = (Candidate("16bit"),)
    assert candidates.merge_candidates(load(tiny_recipe)) == (Candidate("dequantized"), *only)
    assert candidates.merge_candidates(load(tiny_recipe, ["merge.base=16bit"])) == only
    assert candidates.merge_candidates(load(tiny_recipe, ["quantization.load_in_4bit=false"])) == only


@pytest.mark.parametrize(
    "candidate", [Candidate(base, dtype) for base in get_args(Base) for dtype in (None, "float16")]
)
def test_the_name_on_disk_tells_base_and_dtype(candidate: Candidate) -> None:
    assert Candidate.from_name(candidate.name) == candidate
    assert (candidate.name == candidate.base) == (candidate.dtype is None)


def test_how_a_format_is_measured(tmp_path: Path) -> None:
    """A server's format by transformers where that reads it; not at all where only the server does."""
    assert export_stage._measurable("onnxruntime", tmp_path) == "onnxruntime"
    assert export_stage._measurable("vllm", tmp_path) is None
    for method, runtime in (("bitsandbytes", "transformers"), ("gptq", None)):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
        assert export_stage._measurable("vllm", tmp_path) == runtime


def test_quantization_config_fields_are_bitsandbytes_own() -> None:
    from trl import SFTConfig

    assert set(Quantization.model_fields) <= set(BitsAndBytesConfig().to_dict()) | {"load_in_4bit"}
    assert set(schema.Lora.model_fields) - set(LoraConfig().to_dict()) == {"init_from", "loraplus_lr_ratio"}
    assert set(schema.Train.model_fields) - set(SFTConfig.__dataclass_fields__) == {
        "trainable",
        "embedding_learning_rate",
        "eval_rows",
        "eval_score_rows",
        "early_stopping_patience",
        "early_stopping_threshold",
    }


def test_rows_without_a_measure_are_not_chosen() -> None:
    assert candidates.choose([replace(_row("a", 0.1, 1), parity=None), _row("b", 0.2, 1)], "fidelity").name == "b"
