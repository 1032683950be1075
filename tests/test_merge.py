from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qkit import merge, model, recipe
from qkit.device import detect
from qkit.errors import MissingArtifact, ModelError
from qkit.recipe import Data, Merge, Model, Quantization, Recipe


def _recipe(folder: Path) -> Recipe:
    return Recipe(task="chat", model=Model(source=str(folder)), data=Data())


def _adapter(folder: Path, out: Path, **options: object) -> Path:
    """A LoRA adapter with random weights, as `train` leaves it."""
    torch.manual_seed(1)
    base = model.load_base(folder, _recipe(folder), detect())
    names = model.quantized_names(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **options)
    get_peft_model(base, config).save_pretrained(out)
    model.write_adapter_note(out, folder, _recipe(folder), names)
    return out


def _merge(folder: Path, adapter: Path, out: Path, section: Merge) -> dict[str, torch.Tensor]:
    out.mkdir(exist_ok=True)
    merge.merge(folder, adapter, out, section, model.check_adapter(adapter, folder))
    return {name: tensor for shard in sorted(out.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("rslora", [False, True])
def test_equals_pefts_merge_of_the_dequantized_base(tiny_model: Path, tmp_path: Path, rslora: bool) -> None:
    adapter = _adapter(tiny_model, tmp_path / "adapter", use_rslora=rslora)
    merged = _merge(tiny_model, adapter, tmp_path / "merged", Merge(dtype="float32"))
    base = model.load_base(tiny_model, _recipe(tiny_model), detect())
    model.dequantize(base)
    for parameter in base.parameters():
        parameter.data = parameter.data.float()
    peft = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    for name, tensor in peft.state_dict().items():
        if name in merged:
            assert torch.equal(merged[name], tensor), name
    assert len(merged) == 21  # every tensor of the checkpoint: 2 layers of 9, the embeddings, the last norm, the head


def test_onto_the_16_bit_base(tiny_model: Path, tmp_path: Path) -> None:
    adapter = _adapter(tiny_model, tmp_path / "adapter")
    merged = _merge(tiny_model, adapter, tmp_path / "merged", Merge(base="16bit", dtype="float32"))
    base = AutoModelForCausalLM.from_pretrained(str(tiny_model), dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    assert all(torch.equal(merged[n], t) for n, t in peft.state_dict().items() if n in merged)


def test_the_merged_model_says_what_the_live_one_says(tiny_model: Path, tmp_path: Path) -> None:
    adapter = _adapter(tiny_model, tmp_path / "adapter")
    _merge(tiny_model, adapter, tmp_path / "merged", Merge())
    model.copy_companions(tiny_model, tmp_path / "merged")
    live = model.load_live(tiny_model, _recipe(tiny_model), detect(), adapter)
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype=torch.bfloat16)
    base = model.load_live(tiny_model, _recipe(tiny_model), detect(), None)
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        p, q, b = (m(ids).logits.float().log_softmax(-1) for m in (live, merged, base))
    near, far = ((p.exp() * (p - other)).sum(-1).mean() for other in (q, b))
    assert near < 1e-3 and 100 * near < far


def test_several_shards_hold_the_same_tensors(tiny_model: Path, tmp_path: Path) -> None:
    adapter = _adapter(tiny_model, tmp_path / "adapter")
    one = _merge(tiny_model, adapter, tmp_path / "one", Merge())
    many = _merge(tiny_model, adapter, tmp_path / "many", Merge(max_shard_bytes=40_000))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert one.keys() == many.keys() and all(torch.equal(one[n], many[n]) for n in one)
    model.copy_companions(tiny_model, tmp_path / "many")
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "many"), dtype=torch.bfloat16)
    assert torch.equal(loaded.state_dict()["model.norm.weight"], one["model.norm.weight"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_a_few_tensors_whatever_the_model(tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Anonymous memory only: the base is mapped from its file, and the system takes those pages back when it wants them."""
    adapter = _adapter(tiny_model, tmp_path / "adapter")
    big = shutil.copytree(tiny_model, tmp_path / "big")
    tensor_bytes = 8 << 20
    more = {f"model.extra.{i}": torch.zeros(2048, 2048, dtype=torch.bfloat16) for i in range(24)}
    save_file({**load_file(big / "model.safetensors"), **more}, big / "model.safetensors", {"format": "pt"})
    held: list[int] = []
    write = merge.ShardWriter.write

    def measured(self: merge.ShardWriter, name: str, tensor: torch.Tensor) -> None:
        write(self, name, tensor)
        held.append(int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]) << 10)

    monkeypatch.setattr(merge.ShardWriter, "write", measured)
    (tmp_path / "merged").mkdir()
    note = json.loads((adapter / model.ADAPTER_NOTE).read_text())
    merge.merge(big, adapter, tmp_path / "merged", Merge(), note)
    assert len(held) == 45
    assert max(held) - held[0] < 6 * tensor_bytes < sum(tensor.nbytes for tensor in more.values()) / 3


def test_an_adapter_of_another_base_is_refused(tiny_model: Path, other_model: Path, tmp_path: Path) -> None:
    adapter = _adapter(tiny_model, tmp_path / "adapter")
    with pytest.raises(ModelError, match="was trained on"):
        model.check_adapter(adapter, other_model)
    with pytest.raises(MissingArtifact, match="not an adapter"):
        model.check_adapter(tmp_path, tiny_model)


def test_a_delta_without_a_weight_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    adapter = _adapter(tiny_model, tmp_path / "adapter")
    deltas = merge.Deltas(adapter)
    with pytest.raises(ModelError, match="which the base model does not have"):
        deltas.check_all_used()


def test_quantization_config_fields_are_bitsandbytes_own() -> None:
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    assert set(Quantization.model_fields) <= set(BitsAndBytesConfig().to_dict()) | {"load_in_4bit"}
    assert set(recipe.Lora.model_fields) <= set(LoraConfig().to_dict())
    assert set(recipe.Train.model_fields) <= set(SFTConfig.__dataclass_fields__)


def test_stop_tokens_and_dtype_reach_the_merged_folder(tmp_path: Path, tiny_model: Path) -> None:
    merge._write_config(tiny_model, tmp_path, "bfloat16")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
