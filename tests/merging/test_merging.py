"""Streaming merge: the weights that come out, by kind of adapter, and the memory that it takes."""

from __future__ import annotations

import gc
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from qkit.core.device import detect
from qkit.core.errors import MissingArtifact, ModelError
from qkit.merging import weights
from qkit.model import load, provenance, source
from qkit.recipe import schema
from qkit.recipe.schema import Data, Merge, Model, Quantization, Recipe
from qkit.tensors.lora_deltas import Deltas
from qkit.tensors.nf4_roundtrip import FourBit

FP32 = Merge(dtype="float32")
NOTHING_QUANTIZED = {"quantized": [], "quantization": {}}


def _recipe(folder: Path) -> Recipe:
    return Recipe(task="chat", model=Model(source=str(folder)), data=Data())


def _adapter(folder: Path, out: Path, **options: Any) -> Path:
    """A LoRA adapter with random weights, as `train` leaves it."""
    torch.manual_seed(1)
    base = load.load_base(folder, _recipe(folder), detect())
    names = source.quantized_names(base)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **options}
    )
    get_peft_model(base, config).save_pretrained(out)
    provenance.write_adapter_note(out, folder, _recipe(folder), names)
    return out


def _merge(folder: Path, adapter: Path, out: Path, base: schema.Base, section: Merge) -> dict[str, torch.Tensor]:
    out.mkdir(exist_ok=True)
    weights.merge(folder, adapter, out, base, section, provenance.check_adapter(adapter, folder))
    return _weights(out)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_equals_pefts_merge_of_the_dequantized_base(tiny_model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = _adapter(tiny_model, tmp_path / "adapter", **options)
    merged = _merge(tiny_model, adapter, tmp_path / "merged", "dequantized", FP32)
    base = load.load_base(tiny_model, _recipe(tiny_model), detect())
    source.dequantize(base)
    for parameter in base.parameters():
        parameter.data = parameter.data.float()
    peft = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    for name, tensor in peft.state_dict().items():
        if name in merged:
            assert torch.equal(merged[name], tensor), name
    assert len(merged) == 21  # every tensor of the checkpoint: 2 layers of 9, the embeddings, the last norm, the head


# --- every kind of adapter onto a 16-bit base -------------------------------------------------------------------------


def _gpt2(folder: Path) -> Path:
    """Transposed linears (Conv1D), square ones among them, with biases, and a head that is tied to the embedding."""
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=259, n_embd=64, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def _tied(folder: Path) -> Path:
    return _llama(folder, tie_word_embeddings=True)


def _biased(folder: Path) -> Path:
    return _llama(folder, attention_bias=True)


def _llama(folder: Path, **options: Any) -> Path:
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        **options,
    )
    made = LlamaForCausalLM(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(folder)
    return folder


LINEAR = ["q_proj", "down_proj"]
# base, LoraConfig, whether PEFT's own merge is the measure (it folds the delta of one side of a tied pair into both)
KINDS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], bool]] = {
    "plain": (_llama, {}, True),
    "rank-stabilized": (_llama, {"use_rslora": True}, True),
    "ranks and alphas by pattern": (
        _llama,
        {"rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.down_proj": 2}, "alpha_pattern": {"self_attn.q_proj": 32}},
        True,
    ),
    "rank-stabilized by pattern": (_llama, {"use_rslora": True, "rank_pattern": {"q_proj": 9}}, True),
    "dora": (_llama, {"use_dora": True}, True),
    "head kept whole": (_llama, {"modules_to_save": ["lm_head"], "target_modules": LINEAR}, True),
    "norms kept whole": (_llama, {"modules_to_save": ["norm", "input_layernorm"], "target_modules": LINEAR}, True),
    "embedding and head": (_llama, {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]}, True),
    "embedding with dora": (_llama, {"target_modules": ["embed_tokens"], "use_dora": True}, True),
    "biases with deltas": (_biased, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, True),
    "biases of the adapted": (_biased, {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]}, True),
    "all biases": (_biased, {"bias": "all", "target_modules": ["q_proj"]}, True),
    "transposed": (_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}, True),
    "transposed with dora": (_gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}, True),
    "tied, only layers": (_tied, {}, True),
    "tied, delta of the embedding": (_tied, {"target_modules": [*LINEAR, "embed_tokens"]}, False),
    "tied, delta of the head": (_tied, {"target_modules": [*LINEAR, "lm_head"]}, False),
    "tied, head kept whole": (_tied, {"target_modules": LINEAR, "modules_to_save": ["lm_head"]}, False),
    "tied, embedding kept whole": (_tied, {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]}, False),
    "learnt rows by the end of a name": (
        _llama,
        {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [3, 7]}},
        True,
    ),
    "tied, learnt rows": (_tied, {"target_modules": LINEAR, "trainable_token_indices": [3, 7]}, True),
}


def _moved(made: PeftModel) -> PeftModel:
    """What is trained, moved somewhere: also what starts as a copy of the base."""
    torch.manual_seed(5)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return made


@pytest.mark.filterwarnings(
    "ignore:.*"
)  # peft warns of tied weights, of embeddings that it saves, and of fan_in_fan_out
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(tmp_path: Path, kind: str) -> None:
    """The merged folder, loaded as it is, has PEFT's weights to the bit, and the logits of the adapter on its base."""
    build, options, pefts = KINDS[kind]
    folder = build(tmp_path / "base")
    live = _peft(folder, options)
    live.save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    weights.merge(folder, tmp_path / "adapter", tmp_path / "merged", "16bit", FP32, NOTHING_QUANTIZED)
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32)
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        wanted, found = live(ids).logits, merged(ids).logits
        untrained = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)(ids).logits
        moved = (wanted - untrained).abs().max()
        assert moved > 0.01 and (found - wanted).abs().max() < 0.01 * moved
    if pefts:
        expected = live.merge_and_unload().state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())


def _peft(folder: Path, options: dict[str, Any]) -> PeftModel:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return _moved(get_peft_model(base, LoraConfig(**{**fields, **options}))).eval()


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("build", [_llama, _tied])
def test_resized_embeddings(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    folder = build(tmp_path / "base")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    base.resize_token_embeddings(264, mean_resizing=False)
    live = _moved(get_peft_model(base, LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=False))).eval()
    live.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    (tmp_path / "merged").mkdir()
    weights.merge(folder, tmp_path / "adapter", tmp_path / "merged", "16bit", FP32, NOTHING_QUANTIZED)
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32)
    assert merged.config.vocab_size == 264
    ids = torch.tensor([[3, 260, 263, 9]])
    with torch.inference_mode():
        assert torch.allclose(merged(ids).logits, live(ids).logits, atol=2e-3)


def test_an_embedding_resized_without_its_head_is_refused(tmp_path: Path) -> None:
    folder = _llama(tmp_path / "base")
    _peft(folder, {}).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    more = {"base_model.model.model.embed_tokens.weight": torch.zeros(264, 64)}
    save_file({**load_file(file), **more}, file)
    (tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match=r"embed_tokens.weight with 264 rows.*259, and lm_head.weight is unchanged"):
        weights.merge(folder, tmp_path / "adapter", tmp_path / "merged", "16bit", FP32, NOTHING_QUANTIZED)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_qalora": True}, "use_qalora cannot be merged"),
        ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens cannot be merged"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication cannot be merged"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"peft_type": "IA3"}, "type IA3"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(tiny_model: Path, tmp_path: Path, changes: Any, words: str) -> None:
    adapter = _adapter(tiny_model, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    if "peft_type" in changes:
        config = {"base_model_name_or_path": None, "target_modules": ["q_proj"], "feedforward_modules": []}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=words):
        Deltas(adapter)


def test_what_the_base_does_not_have_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    adapter = _adapter(tiny_model, tmp_path / "adapter")
    with pytest.raises(ModelError, match="that the base model does not have"):
        Deltas(adapter).check_all_used()
    other = _llama(tmp_path / "other")
    (tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match="was trained on another model"):
        weights.merge(other, adapter, tmp_path / "merged", "16bit", FP32, NOTHING_QUANTIZED)
    with pytest.raises(MissingArtifact, match="not an adapter"):
        Deltas(tmp_path)


# --- 4 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(256, 576), (100, 48), (67, 128), (33, 33), (5000, 64)])
def test_four_bit_is_bitsandbytes_to_the_bit(kind: str, nested: bool, dtype: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 0.05).bfloat16()
    weight[3] = 0
    how = Quantization(bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=dtype)
    whole = weight.to(getattr(torch, dtype))
    packed, state = quantize_4bit(whole, quant_type=kind, compress_statistics=nested, blocksize=64)
    seen = FourBit(weight, how.model_dump())
    rows = [seen.rows(begin, end) for begin, end in weights._blocks(weight, by_rows=True)]
    assert torch.equal(torch.cat(rows), dequantize_4bit(packed, state).reshape(shape))


def test_four_bit_at_every_bound_between_levels() -> None:
    """Values on both sides of each bound, and on it: fp32 neighbours of the midpoints."""
    from bitsandbytes.functional import get_4bit_type

    code = get_4bit_type("nf4", device="cpu")
    bounds = (code[1:] + code[:-1]) / 2
    near = [bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0)), torch.ones(19)]
    weight = torch.cat(near).view(1, 64)
    how = Quantization(bnb_4bit_use_double_quant=False, bnb_4bit_compute_dtype="float32")
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=False, blocksize=64)
    assert torch.equal(FourBit(weight, how.model_dump()).rows(0, 1), dequantize_4bit(packed, state))


def test_the_merged_model_says_what_the_live_one_says(tiny_model: Path, tmp_path: Path) -> None:
    adapter = _adapter(tiny_model, tmp_path / "adapter")
    _merge(tiny_model, adapter, tmp_path / "merged", "dequantized", Merge())
    live = load.load_reference(tiny_model, _recipe(tiny_model), detect(), adapter)
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype=torch.bfloat16)
    base = load.load_reference(tiny_model, _recipe(tiny_model), detect(), None)
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        p, q, b = (m(ids).logits.float().log_softmax(-1) for m in (live, merged, base))
    near, far = ((p.exp() * (p - other)).sum(-1).mean() for other in (q, b))
    assert near < 1e-3 and 100 * near < far


# --- files and memory -------------------------------------------------------------------------------------------------


def test_several_shards_hold_the_same_tensors(tiny_model: Path, tmp_path: Path) -> None:
    adapter = _adapter(tiny_model, tmp_path / "adapter")
    one = _merge(tiny_model, adapter, tmp_path / "one", "dequantized", Merge())
    many = _merge(tiny_model, adapter, tmp_path / "many", "dequantized", Merge(max_shard_bytes=40_000))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert one.keys() == many.keys() and all(torch.equal(one[n], many[n]) for n in one)
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "many"), dtype=torch.bfloat16)
    assert torch.equal(loaded.state_dict()["model.norm.weight"], one["model.norm.weight"])
    assert loaded.config.dtype == torch.bfloat16


def test_a_cut_off_shard_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    adapter = _adapter(tiny_model, tmp_path / "adapter")
    cut = shutil.copytree(tiny_model, tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[:-1000])
    (tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match="the file is truncated"):
        weights.merge(cut, adapter, tmp_path / "merged", "16bit", Merge(), NOTHING_QUANTIZED)


@contextmanager
def _peak_rss() -> Iterator[list[int]]:
    """The most that the process holds while the block runs, over what it held before; bytes, mapped files included."""

    def now() -> int:
        return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) << 10

    gc.collect()
    before, found, over = now(), [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            found[0] = max(found[0], now() - before)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_a_few_tensors_whatever_the_model(tiny_model: Path, tmp_path: Path) -> None:
    """Below 3 times the largest tensor and 300 MiB, all resident pages counted: 12 quantized tensors of 64 MiB, each with a delta."""
    adapter = _adapter(tiny_model, tmp_path / "adapter")
    big, note = shutil.copytree(tiny_model, tmp_path / "big"), dict(provenance.check_adapter(adapter, tiny_model))
    block, rows, width, count = torch.randn(64, 8192).bfloat16() * 0.02, 4096, 8192, 12
    names = [f"model.extra.{index}.proj" for index in range(count)]
    for index, name in enumerate(names):
        tensors = {f"{name}.weight": block.repeat(rows // 64, 1)}
        save_file(tensors, big / f"model-extra-{index}.safetensors", {"format": "pt"})
    pairs = load_file(adapter / "adapter_model.safetensors")
    for name in names:
        pairs[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, width)
        pairs[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 4)
    save_file(pairs, adapter / "adapter_model.safetensors")
    note["quantized"] = [*note["quantized"], *(f"{name}.weight" for name in names)]
    (tmp_path / "merged").mkdir()
    weights.merge(
        tiny_model, _adapter(tiny_model, tmp_path / "warm"), tmp_path / "merged", "dequantized", Merge(), note
    )
    tensor_bytes = rows * width * 2
    with _peak_rss() as peak:
        weights.merge(big, adapter, tmp_path / "merged", "dequantized", Merge(), note)
    assert peak[0] < 3 * tensor_bytes + (300 << 20) < count * tensor_bytes
    assert peak[0] > tensor_bytes  # the watcher has seen it


# --- whose adapter ----------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused(tiny_model: Path, other_model: Path, tmp_path: Path) -> None:
    adapter = _adapter(tiny_model, tmp_path / "adapter")
    with pytest.raises(ModelError, match="was trained on"):
        provenance.check_adapter(adapter, other_model)
    with pytest.raises(MissingArtifact, match="not an adapter"):
        provenance.check_adapter(tmp_path, tiny_model)


def test_an_adapter_is_not_folded_in_twice(tiny_model: Path, tmp_path: Path) -> None:
    adapter = _adapter(tiny_model, tmp_path / "adapter")
    merged = tmp_path / "merged"
    _merge(tiny_model, adapter, merged, "16bit", Merge())
    digest = provenance.adapter_sha256(adapter)
    provenance.write_merged(merged, tiny_model, "the base", "16bit", {digest: 1.0})
    with pytest.raises(ModelError, match=r"is already merged into .* the base that it was trained on, the base"):
        provenance.check_adapter(adapter, merged)
    again = tmp_path / "again"  # saved anew, with other metadata and in another order: the same adapter
    shutil.copytree(adapter, again)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(reversed(tensors.items())), again / "adapter_model.safetensors", {"saved": "anew"})
    assert provenance.adapter_sha256(again) == digest
    provenance.write_merged(tmp_path / "again", merged, "the merged one", "16bit", {"another": 1.0})
    assert [entry["base"] for entry in provenance.merged_into(again)] == ["the base", "the merged one"]
    other = _adapter(tiny_model, tmp_path / "other", r=2)
    provenance.check_not_merged(other, merged)
