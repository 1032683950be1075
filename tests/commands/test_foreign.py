"""`qkit merge --base B --adapter A --out D`: adapters that no run of ours made, one or several."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qkit.commands import merge_any
from qkit.commands.combine import MergeRequest
from qkit.core.errors import MissingArtifact, ModelError, RecipeError
from qkit.core.files import make_folder
from qkit.core.progress import Progress
from qkit.measure import candidates, held_out
from qkit.run.directory import Run

pytestmark = pytest.mark.slow

FP32 = ["merge.dtype=float32"]


def _foreign(folder: Path, out: Path, seed: int = 1, **options: Any) -> Path:
    """A LoRA folder as PEFT alone saves it."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    fields = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, **options}
    get_peft_model(base, LoraConfig(**fields)).save_pretrained(out)
    return out


def test_a_foreign_adapter_goes_onto_the_16_bit_base(tiny_model: Path, tmp_path: Path) -> None:
    adapter = _foreign(tiny_model, tmp_path / "adapter")
    made = merge_any.merge(MergeRequest(str(tiny_model), [adapter], tmp_path / "merged", overrides=FP32), Progress())
    assert made["chosen"] == "16bit" and "not measured" in made["note"]
    assert "only the names and shapes of its weights could be checked" in made["notes"][0]
    base = AutoModelForCausalLM.from_pretrained(str(tiny_model), dtype=torch.float32)
    wanted = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]
    with pytest.raises(ModelError, match=r"is already merged into"):
        merge_any.merge(MergeRequest(str(tmp_path / "merged"), [adapter], tmp_path / "twice"), Progress())
    with pytest.raises(MissingArtifact, match="not empty"):
        merge_any.merge(MergeRequest(str(tiny_model), [adapter], tmp_path / "merged"), Progress())


def test_both_ways_are_measured_when_it_was_trained_in_4_bit(tiny_model: Path, tmp_path: Path, rows_file: Path) -> None:
    adapter = _foreign(tiny_model, tmp_path / "adapter")
    how = ["quantization.load_in_4bit=true"]
    request = MergeRequest(str(tiny_model), [adapter], tmp_path / "merged", rows=str(rows_file), overrides=how)
    made = merge_any.merge(request, Progress())
    kl = {row["name"]: row["parity"]["kl_mean"] for row in [*made["candidates"], *made["beside"]]}
    assert made["chosen"] == "dequantized" and kl["adapter"] < kl["base"] / 20  # what bf16 makes of it
    assert 10 * kl["dequantized"] < min(kl["16bit"], kl["base"])
    assert json.loads((tmp_path / "merged" / "qkit.json").read_text())["merged"][0]["onto"] == "dequantized"


def test_what_bfloat16_rounds_away_is_tried_in_float16(
    tiny_model: Path, tmp_path: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "rounds_too_much", lambda recipe, _: len(recipe.merge.dtypes) > 1)
    adapter = _foreign(tiny_model, tmp_path / "adapter")
    made = merge_any.merge(
        MergeRequest(str(tiny_model), [adapter], tmp_path / "merged", rows=str(rows_file)), Progress()
    )
    kl = {row["name"]: row["parity"]["kl_mean"] for row in made["candidates"]}
    assert list(kl) == ["16bit", "16bit-fp16"] and made["chosen"] == min(kl, key=lambda name: kl[name])
    dtype = json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"]
    assert dtype == ("float16" if made["chosen"].endswith("-fp16") else "bfloat16")
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


@pytest.mark.parametrize("weights", [(0.5,), (0.7, 0.3)])
def test_rank_stabilized_adapters_are_weighed_as_they_are(
    tiny_model: Path, tmp_path: Path, weights: tuple[float, ...]
) -> None:
    """What PEFT makes of them says of itself that it is one too, and would be scaled once more."""
    adapters = [_foreign(tiny_model, tmp_path / f"adapter{n}", n, use_rslora=True) for n in range(len(weights))]
    merge_any.merge(
        MergeRequest(str(tiny_model), adapters, tmp_path / "merged", weights, "cat", overrides=FP32), Progress()
    )
    base = load_file(tiny_model / "model.safetensors")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    name, wanted = "model.layers.0.self_attn.q_proj.weight", 0.0
    for adapter, weight in zip(adapters, weights, strict=True):
        held = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(str(tiny_model), dtype=torch.float32), str(adapter)
        )
        wanted += weight * (held.merge_and_unload().state_dict()[name] - base[name].float())
    torch.testing.assert_close(found[name] - base[name].float(), wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}])
def test_what_peft_would_combine_wrongly_is_refused(tiny_model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = _foreign(tiny_model, tmp_path / "adapter", **options)
    request = MergeRequest(str(tiny_model), [adapter], tmp_path / "merged", (0.5,), "cat", overrides=FP32)
    with pytest.raises(ModelError, match=f"uses {next(iter(options))}, which PEFT cannot"):
        merge_any.merge(request, Progress())
    assert not (tmp_path / "merged").exists()


def test_what_a_newer_peft_has_set_is_not_left_out(tiny_model: Path, tmp_path: Path) -> None:
    """peft itself warns and goes on without; a key that is not set says nothing."""
    adapter = _foreign(tiny_model, tmp_path / "adapter")
    said = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**said, "use_of_2027": {"scale": 2}, "of_2028": None}))
    with pytest.raises(ModelError, match=r"sets use_of_2027={'scale': 2}, which peft .* does not know"):
        merge_any.merge(MergeRequest(str(tiny_model), [adapter], tmp_path / "merged"), Progress())


def test_an_adapter_s_own_tokenizer_comes_whole(tiny_model: Path, tmp_path: Path) -> None:
    """A template of the base beside it would win over the one in its tokenizer_config.json, and the base's stop token would not stop it."""
    base, adapter = tmp_path / "base", _foreign(tiny_model, tmp_path / "adapter")
    shutil.copytree(tiny_model, base)
    (base / "chat_template.jinja").write_text("the base's")
    (base / "generation_config.json").write_text('{"eos_token_id": 7}')
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
    tokenizer.chat_template = "the adapter's"
    tokenizer.save_pretrained(adapter, save_jinja_files=False)
    merge_any.merge(MergeRequest(str(base), [adapter], tmp_path / "merged", overrides=FP32), Progress())
    assert AutoTokenizer.from_pretrained(str(tmp_path / "merged")).chat_template == "the adapter's"
    stops = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [tokenizer.eos_token_id, 7]


def _speaking(tiny_model: Path, adapter: Path, template: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(adapter)
    return adapter


def test_rows_are_what_the_merged_model_s_own_tokenizer_makes_of_them(
    tiny_model: Path, tmp_path: Path, rows_file: Path
) -> None:
    """Measured under the base's template it would be another model's prompts that are compared."""
    turn = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    template = turn + "{% if add_generation_prompt %}assistant: {% endif %}"
    adapter = _speaking(tiny_model, _foreign(tiny_model, tmp_path / "adapter"), template)
    request = MergeRequest(str(tiny_model), [adapter], tmp_path / "merged", rows=str(rows_file))
    run = Run(tmp_path / "run", merge_any.recipe_for(request), Progress())
    make_folder(run.root)
    merge_any.prepare_rows(run, str(rows_file), merge_any.tokenizer_adapter_of(request))
    row = held_out.held_out_of(run).rows[0]
    text = AutoTokenizer.from_pretrained(str(tiny_model)).decode(list(row.input_ids))
    assert text.startswith("user: say") and "assistant: " in text and "<|im_start|>" not in text


def test_adapters_that_speak_differently_are_not_one_model(tiny_model: Path, tmp_path: Path) -> None:
    adapters = [_foreign(tiny_model, tmp_path / f"adapter{n}", n) for n in (1, 2)]
    for adapter, template in zip(adapters, ("one", "another"), strict=True):
        _speaking(tiny_model, adapter, template)
    with pytest.raises(ModelError, match="different tokenizers or chat templates"):
        merge_any.merge(MergeRequest(str(tiny_model), adapters, tmp_path / "merged"), Progress())
    _speaking(tiny_model, adapters[1], "one")
    assert merge_any.tokenizer_adapter_of(MergeRequest(str(tiny_model), adapters, tmp_path / "merged")) == adapters[0]


def test_an_adapter_of_another_precision_is_named(tiny_model: Path, tmp_path: Path) -> None:
    adapters = [_foreign(tiny_model, tmp_path / f"adapter{n}", n) for n in (0, 1, 2)]
    for adapter, four in ((adapters[1], True), (adapters[2], False)):
        (adapter / "qkit.json").write_text(json.dumps({"quantization": {"load_in_4bit": four}}))
    request = MergeRequest(str(tiny_model), adapters, tmp_path / "merged")
    recipe = merge_any.recipe_for(request)
    assert recipe.quantization.load_in_4bit
    (note,) = merge_any.precision_notes(request, recipe)
    assert note == f"{adapters[2]}: was trained on the 16-bit base, and is measured on the 4-bit one"


@pytest.mark.parametrize("how", ["linear", "ties", "dare_linear", "cat"])
def test_several_are_combined_as_peft_does_it(tiny_model: Path, tmp_path: Path, how: str) -> None:
    adapters = [_foreign(tiny_model, tmp_path / f"adapter{seed}", seed) for seed in (1, 2)]
    request = MergeRequest(str(tiny_model), adapters, tmp_path / "merged", (0.7, 0.3), how, overrides=FP32)
    merge_any.merge(request, Progress())
    base = AutoModelForCausalLM.from_pretrained(str(tiny_model), dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(adapters[0]), adapter_name="a")
    peft.load_adapter(str(adapters[1]), adapter_name="b")
    torch.manual_seed(42)
    options = {} if how in {"linear", "cat"} else {"density": 0.5}
    peft.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type=how, **options)
    peft.set_adapter("both")
    wanted = peft.merge_and_unload(adapter_names=["both"]).state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    if how != "dare_linear":  # which values are dropped depends on how often the generator was asked before
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    moved = load_file(tiny_model / "model.safetensors")
    assert (
        found["model.layers.0.self_attn.q_proj.weight"] - moved["model.layers.0.self_attn.q_proj.weight"]
    ).abs().max() > 0.01
    (entry,) = json.loads((tmp_path / "merged" / "qkit.json").read_text())["merged"]
    assert sorted(entry["adapters"].values()) == [0.3, 0.7]


def test_what_is_not_clear_is_refused(tiny_model: Path, other_model: Path, tmp_path: Path) -> None:
    one, other = _foreign(tiny_model, tmp_path / "one"), _foreign(tiny_model, tmp_path / "other", r=2)
    with pytest.raises(RecipeError, match="--adapter is given 2 times and --weight 1 times"):
        merge_any.merge(MergeRequest(str(tiny_model), [one, other], tmp_path / "out", (1.0,)), Progress())
    with pytest.raises(ModelError, match="cannot combine these adapters with linear"):
        merge_any.merge(MergeRequest(str(tiny_model), [one, other], tmp_path / "out", (), "linear"), Progress())
    noted = shutil.copytree(one, tmp_path / "noted")
    (noted / "qkit.json").write_text(json.dumps({"base": "that one", "base_fingerprint": "0"}))
    with pytest.raises(ModelError, match="was trained on that one"):
        merge_any.merge(MergeRequest(str(other_model), [noted], tmp_path / "out"), Progress())
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(tiny_model: Path, tmp_path: Path, rows_file: Path) -> None:
    adapter = _foreign(tiny_model, tmp_path / "adapter")
    command = [sys.executable, "-m", "qkit", "merge", "--base", str(tiny_model), "--adapter", str(adapter)]
    with rows_file.open("a", encoding="utf-8") as file:
        file.write(rows_file.read_text(encoding="utf-8").splitlines(keepends=True)[0])
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "merged"), "--data", str(rows_file)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "16bit" in done.stdout and "<- kept" in done.stdout and "only the names and shapes" in done.stdout
    assert "1 of 25 records are dropped (duplicate 1)" in done.stdout
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "--base, --adapter and --out" in refused.stderr
