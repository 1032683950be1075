"""Several adapters at once: weight + the sum of weight * delta, in the merged weights and in the model that they are measured against."""

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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qkit.commands import combine, merge_any
from qkit.commands.combine import MergeRequest
from qkit.core.errors import ModelError, RecipeError
from qkit.core.progress import Progress
from qkit.merging import distances
from qkit.model.adapters import sums as adapter_sum

pytestmark = pytest.mark.slow

FP32 = ["merge.dtype=float32"]
TOKENS = torch.arange(3, 33)[None]
Q, UP = {"target_modules": ["q_proj"]}, {"target_modules": ["up_proj", "q_proj"]}


def _adapter(base: Path, out: Path, seed: int, **options: Any) -> Path:
    """A LoRA folder as PEFT alone saves it, every trained tensor of it random."""
    torch.manual_seed(seed)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": False, **options}
    held = get_peft_model(_loaded(base), LoraConfig(**fields))
    for parameter in held.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    held.save_pretrained(out, save_embedding_layers=False)
    return out


def _loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def _biased(folder: Path, **options: Any) -> Path:
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
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# The two adapters' options, and how the base differs.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "alike": (Q, Q, {}),
    "ranks and alphas": ({**Q, "r": 2, "lora_alpha": 3}, {**UP, "r": 8, "lora_alpha": 32}, {}),
    "rank-stabilized": ({**Q, "use_rslora": True}, {**UP, "r": 6}, {}),
    "by pattern": ({**UP, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 5}}, UP, {}),
    "other modules": (Q, {"target_modules": ["down_proj", "embed_tokens"]}, {}),
    "DoRA": ({**UP, "use_dora": True}, {**UP, "use_dora": True}, {}),
    "DoRA and plain": ({**Q, "use_dora": True}, UP, {}),
    "a head of its own": ({**Q, "modules_to_save": ["lm_head"]}, {**Q, "modules_to_save": ["lm_head", "norm"]}, {}),
    "a head, tied": ({**Q, "modules_to_save": ["lm_head"]}, Q, {"tie_word_embeddings": True}),
    "an embedding, tied": ({"target_modules": ["embed_tokens"]}, UP, {"tie_word_embeddings": True}),
    "learnt tokens": (
        {**Q, "trainable_token_indices": {"embed_tokens": [1, 5]}},
        {**Q, "trainable_token_indices": {"embed_tokens": [5, 9]}},
        {},
    ),
    "learnt tokens, and a head, tied": (
        {**Q, "trainable_token_indices": [5, 7]},
        {**Q, "modules_to_save": ["lm_head"]},
        {"tie_word_embeddings": True},
    ),
    "learnt tokens by name, and a changed head, tied": (
        {**Q, "trainable_token_indices": {"embed_tokens": [5, 7]}},
        {"target_modules": ["lm_head"]},
        {"tie_word_embeddings": True},
    ),
    "learnt tokens, and a changed embedding, tied": (
        {**Q, "trainable_token_indices": [5, 7]},
        {"target_modules": ["embed_tokens"]},
        {"tie_word_embeddings": True},
    ),
    "learnt tokens twice, tied": (
        {**Q, "trainable_token_indices": [5, 7]},
        {**Q, "trainable_token_indices": [7, 9]},
        {"tie_word_embeddings": True},
    ),
    "learnt biases": ({**UP, "bias": "lora_only"}, {**UP, "bias": "all"}, {"attention_bias": True}),
    "biases of deltas": ({**Q, "lora_bias": True}, Q, {"attention_bias": True}),
}


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`"
)  # peft: what is tied parts, which is what is asked for
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft takes the bias of a delta for a damaged matrix
@pytest.mark.parametrize("kind", PAIRS)
def test_the_sum_is_exact_in_weights_and_live(kind: str, tmp_path: Path, tiny_model: Path) -> None:
    *options, base = PAIRS[kind]
    folder = _biased(tmp_path / "base", **base) if base else tiny_model
    adapters = [_adapter(folder, tmp_path / f"adapter{n}", n, **how) for n, how in enumerate(options)]
    weights = (0.7, -1.3)
    merge_any.merge(MergeRequest(str(folder), adapters, tmp_path / "merged", weights, overrides=FP32), Progress())
    own = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    wanted = {name: tensor.clone() for name, tensor in own.items()}
    found = load_file(tmp_path / "merged" / "model.safetensors")
    if "lm_head.weight" not in own:  # one matrix for both, until an adapter changes one of them
        own["lm_head.weight"] = wanted["lm_head.weight"] = own["model.embed_tokens.weight"].clone()
        wanted["lm_head.weight"] = wanted["lm_head.weight"].clone()
        _add(wanted, own, folder, adapters, weights, untied=True)
    else:
        _add(wanted, own, folder, adapters, weights, untied=False)
    change = sum(((wanted[name] - own[name]) ** 2).sum() for name in found)
    off = sum(((found[name] - wanted[name]) ** 2).sum() for name in found)
    assert change > 0.1 and (off / change) ** 0.5 < 2e-6
    adapter_sum.write(tmp_path / "several", adapters, weights)
    with torch.no_grad():
        live = adapter_sum.put_on(_loaded(folder), tmp_path / "several")(TOKENS).logits
        merged = _loaded(tmp_path / "merged")(TOKENS).logits
        alone = _loaded(folder)(TOKENS).logits
    assert (live - merged).abs().max() < 1e-3 * (live - alone).abs().max()


def _add(wanted: Any, own: Any, folder: Path, adapters: list[Path], weights: Any, untied: bool) -> None:
    """weight * (what PEFT makes of the base with one adapter alone - the base)."""
    for adapter, weight in zip(adapters, weights, strict=True):
        base = _loaded(folder)
        learnt = json.loads((adapter / "adapter_config.json").read_text())["trainable_token_indices"]
        if untied and not learnt:  # rows that were learnt in a tied pair are in both
            base.config.tie_word_embeddings = False
            base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
        one = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
        for name in wanted:
            wanted[name] += weight * (one[name] - own[name])


@pytest.mark.parametrize("kind", ["alike", "ranks and alphas", "rank-stabilized", "by pattern", "other modules"])
def test_plain_ones_are_what_peft_does_with_both_active(kind: str, tmp_path: Path, tiny_model: Path) -> None:
    one, other, _ = PAIRS[kind]
    adapters = [_adapter(tiny_model, tmp_path / f"adapter{n}", n, **how) for n, how in enumerate((one, other))]
    merge_any.merge(
        MergeRequest(str(tiny_model), adapters, tmp_path / "merged", (1.0, 0.5), overrides=FP32), Progress()
    )
    both = PeftModel.from_pretrained(_loaded(tiny_model), str(adapters[0]), adapter_name="a")
    both.load_adapter(str(adapters[1]), adapter_name="b")
    for module in both.modules():
        if "b" in getattr(module, "lora_A", {}) or "b" in getattr(module, "lora_embedding_A", {}):
            module.scaling["b"] *= 0.5
    both.base_model.set_adapter(["a", "b"])
    adapter_sum.write(tmp_path / "several", adapters, (1.0, 0.5))
    with torch.no_grad():
        wanted = both(TOKENS).logits
        found = _loaded(tmp_path / "merged")(TOKENS).logits
        live = adapter_sum.put_on(_loaded(tiny_model), tmp_path / "several")(TOKENS).logits
        moved = (wanted - _loaded(tiny_model)(TOKENS).logits).abs().max()
    assert (found - wanted).abs().max() < 1e-4 * moved and (live - wanted).abs().max() < 1e-4 * moved


def test_the_default_keeps_both_and_pefts_linear_is_seen_not_to(
    tiny_model: Path, tmp_path: Path, rows_file: Path
) -> None:
    """Both against the same reference, which neither way of combining has made."""
    adapters = [_adapter(tiny_model, tmp_path / f"adapter{n}", n, **UP) for n in (1, 2)]

    def made(name: str, *more: str) -> dict[str, Any]:
        command = [
            sys.executable,
            "-m",
            "qkit",
            "merge",
            "--base",
            str(tiny_model),
            "--out",
            str(tmp_path / name),
            "--json",
            *more,
        ]
        command += [f"--adapter={adapter}" for adapter in adapters]
        done = subprocess.run([*command, "--data", str(rows_file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    exact, linear = made("exact"), made("linear", "--combine", "linear")
    kl = [table["candidates"][0]["parity"]["kl_mean"] for table in (exact, linear)]
    base = next(row["parity"]["kl_mean"] for row in exact["beside"] if row["name"] == "base")
    assert kl[0] < 0.02 * base and kl[1] > 0.2 * base
    assert "--combine linear: the combined change differs from the sum of weight * delta by" in " ".join(
        linear["notes"]
    )
    assert not any("--combine" in note for note in exact["notes"])


def test_how_far_a_combined_one_is_from_the_sum(tiny_model: Path, tmp_path: Path) -> None:
    adapters = [_adapter(tiny_model, tmp_path / f"adapter{n}", n, **UP) for n in (1, 2)]
    parts = list(zip(adapters, (0.7, 0.3), strict=True))
    far = {}
    for how in ("cat", "linear", "ties"):
        request = MergeRequest(str(tiny_model), adapters, tmp_path / "out", combine=how)
        combine.combine(request, (0.7, 0.3), tiny_model, tmp_path / how, 42)
        far[how] = distances.relative_difference(tmp_path / how, parts)
    assert far["cat"] < 1e-6
    one, other, both = (
        PeftModel.from_pretrained(_loaded(tiny_model), str(f)) for f in (*adapters, tmp_path / "linear")
    )
    size = difference = 0.0
    for name, module in one.named_modules():
        if hasattr(module, "get_delta_weight"):
            wanted = 0.7 * module.get_delta_weight("default") + 0.3 * other.get_submodule(name).get_delta_weight(
                "default"
            )
            size += float((wanted**2).sum())
            difference += float(((both.get_submodule(name).get_delta_weight("default") - wanted) ** 2).sum())
    assert far["linear"] == pytest.approx((difference / size) ** 0.5, rel=1e-4) and far["linear"] > 0.5
    assert far["ties"] > 0.1


def test_what_has_no_sum_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = _loaded(tiny_model)
    base.resize_token_embeddings(300, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(base, config).save_pretrained(tmp_path / "resized", save_embedding_layers=False)
    with pytest.raises(ModelError, match="resized embeddings, which cannot be summed"):
        merge_any.merge(MergeRequest(str(tiny_model), [tmp_path / "resized"], tmp_path / "out", (0.5,)), Progress())
    with pytest.raises(RecipeError, match="--combine tiess: unknown method"):
        merge_any.merge(
            MergeRequest(str(tiny_model), [tmp_path / "resized"], tmp_path / "out", (), "tiess"), Progress()
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_is_a_finite_number(weight: float, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"--weight {weight}: a weight must be a finite number"):
        merge_any.merge(MergeRequest(str(tiny_model), [tmp_path], tmp_path / "out", (weight,)), Progress())


def test_merged_values_that_are_no_finite_numbers_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    adapter, half = _adapter(tiny_model, tmp_path / "adapter", 1, **Q), ["merge.dtype=float16"]
    with pytest.raises(
        ModelError, match=r"model.layers.0.self_attn.q_proj.weight contains .* the largest float16 is 65504"
    ):
        merge_any.merge(MergeRequest(str(tiny_model), [adapter], tmp_path / "out", (1e7,), overrides=half), Progress())
    bad = shutil.copytree(tiny_model, tmp_path / "bad")
    held = load_file(bad / "model.safetensors")
    held["model.norm.weight"][3] = float("nan")
    save_file(held, bad / "model.safetensors", metadata={"format": "pt"})
    for weights in ((), (0.5,)):
        with pytest.raises(ModelError, match=r"model.norm.weight of the base contains NaN"):
            merge_any.merge(MergeRequest(str(bad), [adapter], tmp_path / "out", weights, overrides=half), Progress())
    assert not (tmp_path / "out").exists()
