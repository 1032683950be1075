"""What a model folder has beside its weights goes with what is made of it; and what its config says of the weights is true."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qkit.commands import merge_any
from qkit.commands.combine import MergeRequest
from qkit.core.device import detect
from qkit.core.errors import ModelError
from qkit.core.progress import Progress
from qkit.export.formats import bnb, gguf, onnx, safetensors, vllm
from qkit.model import load, older_forms
from qkit.model import source as model_source
from qkit.plugins.exporter import Job
from qkit.plugins.runtime import open_runtime
from qkit.recipe.schema import Data, Model, Quantization, Recipe
from qkit.tensors.companions import copy_companions

pytestmark = pytest.mark.slow

TAKEN = (
    "LICENSE",
    "NOTICE",
    "qwen.tiktoken",
    "preprocessor_config.json",
    "modeling_own.py",
    "additional_chat_templates/tool_use.jinja",
    "code/__init__.py",
    "code/inner/layers.py",
)
LEFT = (
    "README.md",
    "trainer_state.json",
    "pytorch_model.bin",
    "onnx/config.json",
    "onnx/model.onnx",
    "checkpoint-5/config.json",
    ".cache/a.json",
    "figures/plot.png",
    "original/consolidated.00.pth",
    "original/params.json",
)
ODD = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 5, 2], "of_a_newer_version": 1}


def _base(folder: Path, source: Path, **config: Any) -> Path:
    shutil.copytree(source, folder)
    for name in (*TAKEN, *LEFT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else "text")
    (folder / "generation_config.json").write_text(json.dumps(ODD))
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **config}))
    return folder


def _adapter(folder: Path, out: Path, **options: Any) -> Path:
    torch.manual_seed(1)
    held = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    fields = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **options}
    get_peft_model(held, LoraConfig(**fields)).save_pretrained(out, save_embedding_layers=False)
    return out


def _has(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_all_but_weights_and_what_is_of_others_is_taken(tiny_model: Path, tmp_path: Path) -> None:
    base = _base(tmp_path / "base", tiny_model)
    (tmp_path / "out").mkdir()
    copy_companions(base, tmp_path / "out")
    own = {"config.json", "generation_config.json", *(file.name for file in tiny_model.iterdir())} - {
        "model.safetensors"
    }
    assert _has(tmp_path / "out") == {*TAKEN, *own}


def test_a_merge_and_every_export_of_it_have_them(tiny_model: Path, tmp_path: Path) -> None:
    """And the generation config as it stood, which transformers would refuse to save: sampling is off, and a temperature is set."""
    base = _base(tmp_path / "base", tiny_model, eos_token_id=[0, 5, 2])
    merged = tmp_path / "merged"
    merge_any.merge(MergeRequest(str(base), [_adapter(base, tmp_path / "adapter")], merged), Progress())
    assert _has(merged) >= set(TAKEN) and not _has(merged) & set(LEFT)
    how = Recipe(task="chat", model=Model(source=str(base)), data=Data())
    job = Job(merged, base, tmp_path / "adapter", tmp_path / "rows", how, tmp_path / "log")
    for exporter, variant in ((bnb, "nf4"), (safetensors, "fp16"), (vllm, ""), (vllm, "w8a8"), (onnx, "fp32")):
        out = tmp_path / f"{exporter.__name__}-{variant}"
        exporter.export(job, out, variant)
        assert _has(out) >= set(TAKEN) and not _has(out) & set(LEFT), out
        assert json.loads((out / "generation_config.json").read_text()) == ODD, out
        assert list(older_forms.unreadable(out)) == [], out
        spoken = json.loads((out / "tokenizer_config.json").read_text())
        assert spoken["tokenizer_class"] == "PreTrainedTokenizerFast", out
    assert json.loads((out / "genai_config.json").read_text())["model"]["eos_token_id"] == [0, 5, 2]


def test_tokens_are_added_beside_them(tiny_model: Path, tmp_path: Path) -> None:
    base = _base(tmp_path / "base", tiny_model)
    prepared = model_source.resolve(Model(source=str(base), add_tokens=["<tool>"]))
    assert _has(prepared) >= set(TAKEN)
    assert isinstance(AutoTokenizer.from_pretrained(prepared).chat_template, dict)


def test_a_base_from_a_gguf_file_is_said_in_both_forms(tiny_model: Path, tmp_path: Path) -> None:
    how = Recipe(task="chat", model=Model(source=str(tiny_model)), data=Data())
    rows = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"input_ids": [[70, 71, 72]], "labels": [[-100, 71, 72]]}), rows)
    gguf.export(Job(tiny_model, tiny_model, tiny_model, rows, how, tmp_path / "log"), tmp_path / "made", "f16")
    folder = model_source.resolve(Model(source=str(next((tmp_path / "made").glob("*.gguf")))))
    assert list(older_forms.unreadable(folder)) == []
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 10000.0


# --- whether one matrix is embedding and head -------------------------------------------------------------------------

CLAIMS = [
    # what the config says, what the weights hold: a head like the embedding, another, or none; what is true
    (True, "another", False),
    (True, "alike", True),
    (True, "none", True),
    (False, "another", False),
    (False, "none", True),
    (None, "another", False),
]


@pytest.mark.parametrize(
    "odd",
    [ODD, {"num_return_sequences": 2}, {"max_new_tokens": 0}, {"cache_implementation": "of_a_newer_version"}],
    ids=str,
)
def test_no_generation_config_ends_a_stage(odd: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    """transformers raises at loading some, and at saving others; it is somebody else's file, and qkit decodes by itself."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(odd))
    how = Recipe(task="chat", model=Model(source=str(base)), data=Data(), quantization=Quantization(load_in_4bit=False))
    load.load_base(base, how, detect())
    with open_runtime("transformers", base, detect()) as runtime:
        assert runtime.generate([[3, 4]], 2, frozenset())
    bnb.export(Job(base, base, base, base, how, tmp_path / "log"), tmp_path / "out", "nf4")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == odd


@pytest.mark.parametrize(("said", "head", "true"), CLAIMS)
def test_the_merge_says_what_is_true_of_the_head(
    said: bool | None, head: str, true: bool, tiny_model: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    if head == "alike":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    elif head == "none":
        del weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config if said is None else {**config, "tie_word_embeddings": said}))
    merge_any.merge(
        MergeRequest(str(base), [_adapter(tiny_model, tmp_path / "adapter")], tmp_path / "merged"), Progress()
    )
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is true


def test_a_head_that_is_said_to_be_tied_and_is_not_keeps_its_values(tiny_model: Path, tmp_path: Path) -> None:
    """transformers loads both matrices as they are: an adapter on one of them is not to make the other one's values of it."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    adapter = _adapter(tiny_model, tmp_path / "adapter", target_modules=["embed_tokens"])
    merge_any.merge(
        MergeRequest(str(base), [adapter], tmp_path / "merged", overrides=["merge.dtype=float32"]), Progress()
    )
    found, own = load_file(tmp_path / "merged" / "model.safetensors"), load_file(base / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], own["lm_head.weight"].float())
    assert not torch.equal(found["model.embed_tokens.weight"], own["model.embed_tokens.weight"].float())


@pytest.mark.parametrize("quantized", [True, False])
def test_a_base_without_its_head_is_not_trained_on_random_numbers(
    quantized: bool, tiny_model: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    how = Recipe(
        task="chat", model=Model(source=str(base)), data=Data(), quantization=Quantization(load_in_4bit=quantized)
    )
    with pytest.raises(ModelError, match=r"lack lm_head.weight and 0 more.*tie_word_embeddings to true"):
        load.load_base(base, how, detect())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert torch.equal(load.load_base(base, how, detect()).lm_head.weight, weights["model.embed_tokens.weight"])
