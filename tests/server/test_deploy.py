"""What cannot be deployed is known before training; where a library can be asked whether a rule still holds, it is."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.tiny import tiny_settings
from qkit import pipeline
from qkit.core.errors import NotDeployable, RecipeError
from qkit.plan import deployable, screen, sheet
from qkit.recipe.load import from_dict
from qkit.recipe.registry import format_names
from qkit.recipe.schema import ALL, Recipe
from qkit.run.directory import Run
from qkit.server import lora
from qkit.train import stage as train_stage


def recipe(model: Path, *overrides: str) -> Recipe:
    settings = {**tiny_settings(model, model / "rows.jsonl"), "bench": {"runtimes": ["transformers"]}}
    return from_dict(settings, overrides, "test")


def altered(tmp_path: Path, tiny_model: Path, **config: Any) -> Path:
    """A folder with the tiny model's config, changed; there are no weights, which nobody asks for."""
    folder = tmp_path / "altered"
    folder.mkdir()
    read = json.loads((tiny_model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**read, **config}))
    (folder / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    return folder


def test_the_default_formats_are_few_and_all_of_them_can_be_had(tiny_model: Path) -> None:
    how = recipe(tiny_model)
    assert how.export.formats == ("onnx-fp32", "onnx-int4", "vllm")
    assert deployable.refusals(how) == ()


@pytest.mark.parametrize(
    ("config", "override", "format", "said"),
    [
        ({"model_type": "gemma2"}, "model.pad_token=null", "gguf-f16", "'gemma2' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "model.pad_token=null", "gguf-q8_0", "the RoPE scaling 'yarn'"),
        (
            {"model_type": "qwen3", "head_dim": 32},
            "model.pad_token=null",
            "gguf-f16",
            "head_dim 128, and this model has 32",
        ),
        ({"model_type": "gpt_oss"}, "model.pad_token=null", "onnx-fp32", "rows of different lengths"),
        (
            {"hidden_size": 48},
            "model.pad_token=null",
            "vllm-w4a16",
            "cannot be divided into groups of 128, 64, 32; use w8a8",
        ),
        ({"num_local_experts": 8}, "model.pad_token=null", "vllm-w8a8", "mixture of experts"),
        ({"num_local_experts": 8}, "model.pad_token=null", "bnb-nf4", "stay in 16 bit"),
        ({}, "model.add_tokens=['<x>']", "vllm-adapter", "is unsupported LoRA weight"),
        ({}, "lora.r=600", "vllm-adapter", "lora.r=600 is more than vLLM supports"),
    ],
)
def test_refusals(
    tmp_path: Path, tiny_model: Path, config: dict[str, Any], override: str, format: str, said: str
) -> None:
    how = recipe(altered(tmp_path, tiny_model, **config), override, f"export.formats=[vllm,{format}]")
    (refusal,) = deployable.refusals(how)
    assert refusal.format == format and said in refusal.reason
    with pytest.raises(NotDeployable, match=r"--set export.formats=\[vllm\]"):
        deployable.check(how)


@pytest.mark.parametrize("rank", [4, 16, 24, 512])
def test_an_adapter_of_any_rank_up_to_the_largest_is_served(tiny_model: Path, rank: int) -> None:
    """In the room of the next rank that vLLM knows."""
    assert deployable.refusals(recipe(tiny_model, f"lora.r={rank}", "export.formats=[vllm-adapter]")) == ()
    assert lora.rank_for({"r": rank, "rank_pattern": {}}) >= rank


def test_training_refuses_before_it_loads_anything(tmp_path: Path, tiny_model: Path) -> None:
    how = recipe(altered(tmp_path, tiny_model, model_type="gemma2"), "export.formats=[gguf-f16]")
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", how)
    with pytest.raises(NotDeployable, match="gguf-f16"):
        train_stage.run(run, tmp_path / "out")
    with pytest.raises(NotDeployable, match="gguf-f16"):
        pipeline.run_all(run)
    assert not list((tmp_path / "run").iterdir())


def test_the_plan_warns(tmp_path: Path, tiny_model: Path) -> None:
    from rich.console import Console

    how = recipe(altered(tmp_path, tiny_model, rope_parameters={"rope_type": "yarn"}), "export.formats=[vllm,gguf-f16]")
    found = sheet.sheet(how)
    (entry,) = sheet.to_dict(found)["not_deployable"]
    assert entry["format"] == "gguf-f16"
    drawn = io.StringIO()
    Console(width=300, file=drawn).print(screen.screen(found))
    assert "warning: not deployable as gguf-f16: the RoPE scaling 'yarn'" in drawn.getvalue()


# --- export.formats=all -----------------------------------------------------------------------------------------------


def test_all_is_every_format_that_this_model_can_be_had_in(tmp_path: Path, tiny_model: Path) -> None:
    how, left = deployable.resolved(
        recipe(tiny_model, "export.formats=all", "bench.runtimes=[transformers, onnx-fp32]")
    )
    assert how.export.formats == tuple(format_names()) and left == ()
    folder = altered(tmp_path, tiny_model, model_type="gemma2")
    how, left = deployable.resolved(recipe(folder, "export.formats=all"))
    assert {refusal.format for refusal in left} >= {"gguf-f16", "gguf-q8_0"}
    assert ALL not in how.export.formats and not {refusal.format for refusal in left} & {*how.export.formats}


def test_the_command_line_names_what_it_leaves_out(tmp_path: Path, tiny_model: Path) -> None:
    folder = altered(tmp_path, tiny_model, rope_parameters={"rope_type": "yarn"})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tiny_settings(folder, tmp_path / "rows.jsonl")))
    argv = [sys.executable, "-m", "qkit", "plan", str(file), "--set", "export.formats=all", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "left out of export.formats: gguf-f16: the RoPE scaling 'yarn'" in done.stderr
    assert json.loads(done.stdout)["not_deployable"] == []


def test_an_unknown_format_is_still_named(tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match="unknown format 'ggfu-f16', did you mean 'gguf-f16'"):
        recipe(tiny_model, "export.formats=[ggfu-f16]")


# --- what the installed libraries say ---------------------------------------------------------------------------------


def vllm_source(name: str) -> ast.Module:
    """A module of vLLM's, read and not imported."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    return ast.parse((Path(found.submodule_search_locations[0]) / name).read_text(encoding="utf-8"))


def test_the_ranks_are_vllms() -> None:
    assigned = {
        node.targets[0].id: node.value
        for node in vllm_source("config/lora.py").body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    literal = assigned["MaxLoRARanks"]
    assert isinstance(literal, ast.Subscript)
    assert ast.literal_eval(literal.slice) == lora.RANKS


def test_the_refused_keys_are_those_that_vllm_looks_at() -> None:
    """Each `if self.KEY:` of the function that collects what is unsupported."""
    function = next(
        node
        for node in ast.walk(vllm_source("lora/peft_helper.py"))
        if isinstance(node, ast.FunctionDef) and node.name == "_validate_features"
    )
    looked_at = {
        node.test.attr for node in function.body if isinstance(node, ast.If) and isinstance(node.test, ast.Attribute)
    }
    assert looked_at == {*lora.REFUSED}


def test_rows_of_embeddings_are_unsupported_weights() -> None:
    source = ast.unparse(vllm_source("lora/utils.py"))
    function = source.partition("def parse_fine_tuned_lora_name")[2].partition("\ndef ")[0]
    assert "is unsupported LoRA weight" in function and "trainable_tokens" not in function


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gguf_knows_the_architectures(architecture: str) -> None:
    import gguf

    from qkit.export.formats.gguf import ARCHITECTURES

    assert architecture in gguf.MODEL_ARCH_NAMES.values()
    assert {*ARCHITECTURES.values()} == {"llama", "qwen2", "qwen3"}
