"""Bottleneck adapters do what PEFT's own adapters do: train, save, load, switch, unload; and compute what their formula says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from helpers.tiny_encoders import classifier
from helpers.tiny_models import config_of
from qkit.core.errors import MissingExtra, ModelError, RecipeError
from qkit.model import load
from qkit.model.adapters.bottleneck import places, tuner

IDS = torch.tensor([[1, 40, 41, 42, 2], [1, 50, 42, 44, 2]])
LABELS = torch.tensor([0, 1])


def _config(base: Any, placement: str = "houlsby", **fields: Any) -> Any:
    usual = {"reduction_factor": 4, "task_type": "SEQ_CLS", "init_weights": False}
    return tuner.register()(**{**usual, **places.for_peft(base, placement), **fields})


def _adapted(name: str = "bert", placement: str = "houlsby", **fields: Any) -> Any:
    """An encoder with adapters that change its outputs, in evaluation mode."""
    base = classifier(name)
    return get_peft_model(base, _config(base, placement, **fields)).eval()


@torch.no_grad()
def _logits(live: Any) -> torch.Tensor:
    logits: torch.Tensor = live(input_ids=IDS).logits
    return logits


def _trained(live: Any) -> set[str]:
    return {name for name, weight in live.named_parameters() if weight.requires_grad}


# --- what an adapter computes ---------------------------------------------------------------------------------------------


def _by_hand(adapter: Any, x: torch.Tensor, activation: Any, scaling: float) -> torch.Tensor:
    down, up = adapter.bottleneck_down["default"], adapter.bottleneck_up["default"]
    hidden = activation(x @ down.weight.T + down.bias)
    return scaling * (hidden @ up.weight.T + up.bias)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", functional.relu),
        ("gelu", functional.gelu),
        ("swish", functional.silu),
        ("silu", functional.silu),
        ("tanh", torch.tanh),
    ],
)
@torch.no_grad()
def test_the_sequential_form_by_hand(name: str, function: Any) -> None:
    layer = _adapted(non_linearity=name, scaling=0.5).base_model.model.bert.encoder.layer[0]
    x, residual = torch.randn(2, 5, 64), torch.randn(2, 5, 32)
    h = layer.output.dense.base_layer(x)
    h = h + _by_hand(layer.output.dense, h, function, 0.5)
    assert torch.allclose(layer.output(x, residual), layer.output.LayerNorm(h + residual), atol=1e-6)


@torch.no_grad()
def test_the_parallel_form_by_hand_in_a_bert() -> None:
    layer = _adapted("bert", "parallel", scaling=4.0).base_model.model.bert.encoder.layer[0]
    x, output = torch.randn(2, 5, 32), layer.output.base_layer
    mlp = output.dense(layer.intermediate(x))
    expected = output.LayerNorm(x + mlp + _by_hand(layer.output, x, functional.relu, 4.0))
    assert torch.allclose(layer.feed_forward_chunk(x), expected, atol=1e-6)


@torch.no_grad()
def test_the_parallel_form_by_hand_in_a_llama() -> None:
    base = AutoModelForCausalLM.from_config(config_of("llama")).eval()
    live = get_peft_model(base, _config(base, "parallel", scaling=4.0, task_type="CAUSAL_LM")).eval()
    mlp, x = live.base_model.model.model.layers[0].mlp, torch.randn(2, 5, 64)
    expected = mlp.base_layer(x) + _by_hand(mlp, x, functional.relu, 4.0)
    assert torch.allclose(mlp(x), expected, atol=1e-6)


@torch.no_grad()
def test_an_input_given_by_name() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = torch.nn.Linear(32, 16)
            self.in_features, self.out_features = 32, 16

        def forward(self, *, mask: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.matrix(hidden_states) * mask
            return output

    config = tuner.register()(target_modules=["block"], parallel=True, init_weights=False)
    block = get_peft_model(torch.nn.ModuleDict({"block": Block()}), config).base_model.model["block"]
    x = torch.randn(3, 32)
    changed = block(mask=torch.zeros(1), hidden_states=x)
    assert torch.allclose(changed, _by_hand(block, x, functional.relu, 1.0), atol=1e-6)


@torch.no_grad()
def test_of_a_tuple_the_first_output_changes() -> None:
    base = AutoModelForCausalLM.from_config(config_of("gpt_oss")).eval()
    live = get_peft_model(base, _config(base, "parallel", task_type="CAUSAL_LM")).eval()
    mlp, x = live.base_model.model.model.layers[0].mlp, torch.randn(2, 5, 64)
    (changed, scores), (unchanged, same_scores) = mlp(x), mlp.base_layer(x)
    assert torch.allclose(changed, unchanged + _by_hand(mlp, x, functional.relu, 1.0), atol=1e-6)
    assert torch.equal(scores, same_scores)


@torch.no_grad()
def test_active_together_each_adds_its_own() -> None:
    live = _adapted()
    live.add_adapter("second", _config(classifier("bert")))
    layer = live.base_model.model.bert.encoder.layer[0].output.dense
    x, outputs = torch.randn(3, 64), {}
    for names in ("default", "second", ["default", "second"], ["second", "default"]):
        layer.set_adapter(names)  # PEFT allows one at a time where a head is trained
        outputs[str(names)] = layer(x)
    both = outputs["default"] + outputs["second"] - layer.base_layer(x)
    assert torch.allclose(outputs["['default', 'second']"], both, atol=1e-6)
    assert torch.allclose(outputs["['second', 'default']"], both, atol=1e-6)


def test_dropout_acts_in_training_only() -> None:
    live = _adapted(dropout=0.5)
    layer, x = live.base_model.model.bert.encoder.layer[0].output.dense, torch.randn(3, 64)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


# --- training ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", places.ADAPTERS_PER_LAYER)
def test_only_adapters_and_head_have_a_gradient(placement: str) -> None:
    live = _adapted(placement=placement)
    live(input_ids=IDS, labels=LABELS).loss.backward()
    with_gradient = {name for name, weight in live.named_parameters() if weight.grad is not None}
    assert with_gradient == _trained(live)
    heads = {name for name in with_gradient if "modules_to_save" in name}
    assert len(heads) == 2 and len(with_gradient - heads) == 4 * 2 * places.ADAPTERS_PER_LAYER[placement]
    assert all(".bottleneck_" in name for name in with_gradient - heads)


def test_a_new_adapter_learns_from_the_first_step() -> None:
    live = _adapted(init_weights=True).train()
    live(input_ids=IDS, labels=LABELS).loss.backward()
    ups = [weight.grad for name, weight in live.named_parameters() if "bottleneck_up" in name]
    assert ups and all(grad is not None and grad.abs().sum() > 0 for grad in ups)


def test_it_learns() -> None:
    """Whether a token occurs, which the encoder with a trained head alone does not show as well."""
    torch.manual_seed(0)
    ids = torch.randint(10, 99, (64, 8))
    ids[::2, 3] = 5
    labels = (ids == 5).any(1).long()
    losses = {}
    for scaling in (0.0, 1.0):
        live = _adapted(init_weights=True, scaling=scaling)
        optimizer = torch.optim.AdamW([weight for weight in live.parameters() if weight.requires_grad], lr=1e-2)
        for _ in range(30):
            loss = live(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[scaling] = float(loss.detach())
    assert losses[1.0] < 0.1 < losses[0.0]


@pytest.mark.parametrize("placement", places.ADAPTERS_PER_LAYER)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(placement: str, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        base = classifier("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        live = get_peft_model(base, _config(base, placement)).train()
        live(input_ids=IDS, labels=LABELS).loss.backward()
        gradients.append([weight.grad for weight in live.parameters() if weight.requires_grad])
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(*gradients, strict=True))


# --- precision --------------------------------------------------------------------------------------------------------------


def _dtypes(live: Any) -> set[torch.dtype]:
    return {weight.dtype for name, weight in live.named_parameters() if "bottleneck_" in name}


@pytest.mark.parametrize("placement", places.ADAPTERS_PER_LAYER)
def test_adapters_in_fp32_on_a_model_in_bf16(placement: str) -> None:
    base = classifier("modernbert").bfloat16()
    before = _logits(base)
    live = get_peft_model(base, _config(base, placement, init_weights=True)).eval()
    assert _dtypes(live) == {torch.float32}
    assert torch.equal(_logits(live), before) and before.dtype == torch.bfloat16
    live(input_ids=IDS, labels=LABELS).loss.backward()


@pytest.mark.parametrize("placement", places.ADAPTERS_PER_LAYER)
def test_adapters_in_the_dtype_of_the_model(placement: str) -> None:
    """Of a module without a weight of its own, such as an MLP, its matrices' dtype."""
    base = classifier("modernbert").bfloat16()
    live = get_peft_model(base, _config(base, placement), autocast_adapter_dtype=False).eval()
    assert _dtypes(live) == {torch.bfloat16}
    assert torch.isfinite(_logits(live)).all()


@pytest.mark.parametrize("placement", places.ADAPTERS_PER_LAYER)
def test_autocast(placement: str) -> None:
    live = _adapted(placement=placement)
    exact = _logits(live)
    with torch.autocast("cpu", torch.bfloat16):
        loss = live(input_ids=IDS, labels=LABELS).loss
        rounded = _logits(live)
    loss.backward()
    assert _dtypes(live) == {torch.float32}
    assert not torch.equal(rounded.float(), exact) and torch.allclose(rounded.float(), exact, atol=0.1)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    classifier("bert", hidden_size=64, intermediate_size=128).bfloat16().save_pretrained(folder)
    return folder


def _in_4_bit(folder: Path) -> Any:
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["classifier"],
    )
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=options, dtype=torch.bfloat16, device_map="cpu"
    )
    load.leave_as_quantized(base)
    return base.eval()


@pytest.mark.parametrize("placement", places.ADAPTERS_PER_LAYER)
def test_a_base_in_4_bit(bert_folder: Path, tmp_path: Path, placement: str) -> None:
    base = _in_4_bit(bert_folder)
    assert type(base.bert.encoder.layer[0].output.dense).__name__ == "Linear4bit"
    before = _logits(base)
    live = get_peft_model(base, _config(base, placement, init_weights=True)).eval()
    assert torch.equal(_logits(live), before) and _dtypes(live) == {torch.float32}
    optimizer = torch.optim.SGD([weight for weight in live.parameters() if weight.requires_grad], lr=1.0)
    live(input_ids=IDS, labels=LABELS).loss.backward()
    optimizer.step()
    after = _logits(live)
    assert not torch.equal(after, before)
    live.save_pretrained(tmp_path)
    assert torch.equal(_logits(PeftModel.from_pretrained(_in_4_bit(bert_folder), tmp_path).eval()), after)


@pytest.mark.parametrize("placement", places.ADAPTERS_PER_LAYER)
def test_adapters_in_the_compute_dtype_of_a_base_in_4_bit(bert_folder: Path, placement: str) -> None:
    base = _in_4_bit(bert_folder)
    live = get_peft_model(base, _config(base, placement), autocast_adapter_dtype=False).eval()
    assert _dtypes(live) == {torch.bfloat16}
    assert torch.isfinite(_logits(live)).all()


# --- files, names, and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", places.ADAPTERS_PER_LAYER)
@pytest.mark.parametrize("lean", [False, True], ids=["", "low_cpu_mem_usage"])
def test_saved_and_loaded_under_another_name(tmp_path: Path, placement: str, lean: bool) -> None:
    live = _adapted(placement=placement, non_linearity="tanh", scaling=2.0)
    with torch.no_grad():
        live.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    live.save_pretrained(tmp_path)
    note = json.loads((tmp_path / "adapter_config.json").read_text())
    assert note["peft_type"] == "BOTTLENECK" and note["non_linearity"] == "tanh"
    loaded = PeftModel.from_pretrained(classifier("bert"), tmp_path, adapter_name="other", low_cpu_mem_usage=lean)
    assert torch.equal(_logits(loaded.eval()), _logits(live))
    assert not _trained(loaded)
    assert _trained(PeftModel.from_pretrained(classifier("bert"), tmp_path, is_trainable=True)) == _trained(live)


def test_its_config_is_a_config_of_peft(tmp_path: Path) -> None:
    assert tuner.register() is tuner.register()
    made = tuner.register()(target_modules=["b", "a"], reduction_factor=8)
    assert isinstance(made, PeftConfig)
    made.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert read == made and read.target_modules == {"a", "b"}


def test_status_as_peft_reports_it() -> None:
    status = _adapted().get_model_status()
    assert status.peft_types == {"default": "BOTTLENECK"} and status.num_adapter_layers == 5  # the head among them


def test_a_peft_that_cannot_save_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "tuner_class", lambda: object)
    with pytest.raises(MissingExtra, match=r"need peft>=0.21"):
        tuner.register()


def test_disabled_adapters_leave_the_base() -> None:
    before = _logits(classifier("bert"))
    for placement in places.ADAPTERS_PER_LAYER:
        live = _adapted(placement=placement)
        assert not torch.equal(_logits(live), before)
        with live.disable_adapter():
            assert torch.equal(_logits(live), before)
        assert not torch.equal(_logits(live), before)


def test_several_adapters_by_name() -> None:
    """Also of different placements, which share some modules, and forms."""
    alone = {}
    live = _adapted(placement="houlsby", modules_to_save=["classifier"])
    alone["default"] = _logits(live)
    for placement in ("pfeiffer", "parallel"):
        live.add_adapter(placement, _config(classifier("bert"), placement))
        live.set_adapter(placement)
        alone[placement] = _logits(live)
        assert all(f".{placement}." in name for name in _trained(live))
    assert not any(torch.equal(alone["default"], alone[placement]) for placement in ("pfeiffer", "parallel"))
    for name, expected in alone.items():
        live.set_adapter(name)
        assert torch.equal(_logits(live), expected)
    live.delete_adapter("pfeiffer")
    live.set_adapter("default")
    assert torch.equal(_logits(live), alone["default"])
    assert not any("pfeiffer" in name for name, _ in live.named_parameters())


def test_two_forms_on_one_module() -> None:
    base = AutoModelForCausalLM.from_config(config_of("llama")).eval()
    names = places.target_modules(base, "parallel")
    config = tuner.register()
    live = get_peft_model(base, config(target_modules=names, parallel=True, init_weights=False)).eval()
    live.add_adapter("second", config(target_modules=names, init_weights=False))
    mlp, x = live.base_model.model.model.layers[0].mlp, torch.randn(3, 64)
    alone = []
    for name in ("default", "second"):
        live.set_adapter(name)
        alone.append(mlp(x))
    live.base_model.set_adapter(["default", "second"])
    assert torch.allclose(mlp(x), alone[0] + alone[1] - mlp.base_layer(x), atol=1e-6)


def test_unloaded_it_is_the_base_again() -> None:
    before = classifier("bert")
    base = _adapted(placement="houlsby").unload()
    assert torch.equal(_logits(base), _logits(before))
    assert [*base.state_dict()] == [*before.state_dict()]


def test_it_cannot_be_merged() -> None:
    live = _adapted()
    for merge in (
        live.merge_and_unload,
        live.merge_adapter,
        live.base_model.model.bert.encoder.layer[0].output.dense.merge,
    ):
        with pytest.raises(ModelError, match="cannot be merged"):
            merge()
    live.unmerge_adapter()
    assert torch.equal(_logits(live), _logits(_same(live)))


def _same(live: Any) -> Any:
    """A new model with the adapters of another one."""
    base = classifier("bert")
    other = get_peft_model(base, _config(base)).eval()
    other.load_state_dict(live.state_dict())
    return other


def test_excluded_modules_have_no_adapter() -> None:
    live = _adapted(exclude_modules=["attention.output.dense"])
    assert live.targeted_module_names == places.target_modules(classifier("bert"), "pfeiffer")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"non_linearity": "rleu"}, "did you mean 'relu'"),
        ({"reduction_factor": 0}, "reduction_factor=0"),
        ({"reduction_factor": 1.5}, "whole number"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_settings_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tuner.register()(**fields)
