"""Where bottleneck adapters go in each kind of model, and that they are counted before the model is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from helpers.tiny_encoders import ENCODERS, classifier
from helpers.tiny_models import ARCHITECTURES, MORE, config_of, weightless
from qkit.core.errors import ModelError, RecipeError
from qkit.model.adapters.bottleneck import places, tuner

IDS = torch.tensor([[1, 40, 41, 42, 2], [1, 50, 42, 44, 2]])
UNPLACED = {"hrm_text", "granitemoe"}  # two stacks of layers; experts under a name of its own
# DeBERTa's module scripts functions when it is imported
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def _causal(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(name)).eval()


def _check(base: Any, placement: str, hidden: int, layers: int) -> None:
    """Adapters as planned, none of which changes an output before it is trained, and all of which do with random weights."""
    fields = places.for_peft(base, placement)
    with torch.no_grad():
        before = base(input_ids=IDS).logits
        live = get_peft_model(base, tuner.register()(reduction_factor=4, **fields)).eval()
        after = live(input_ids=IDS).logits
        assert torch.equal(after, before)
        assert live.get_nb_trainable_parameters()[0] == places.planned_parameters(placement, layers, hidden, 4)
        for name, weight in live.named_parameters():
            if "bottleneck_" in name:
                weight.copy_(torch.randn_like(weight))
        assert not torch.allclose(live(input_ids=IDS).logits, before)


@pytest.mark.parametrize("placement", places.ADAPTERS_PER_LAYER)
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_with_new_adapters_is_the_encoder(name: str, placement: str) -> None:
    _check(classifier(name), placement, hidden=32, layers=2)


@pytest.mark.parametrize("placement", places.ADAPTERS_PER_LAYER)
@pytest.mark.parametrize("name", sorted({*ARCHITECTURES, *MORE} - UNPLACED))
def test_a_decoder_with_new_adapters_is_the_decoder(name: str, placement: str) -> None:
    _check(_causal(name), placement, hidden=64, layers=2)


@pytest.mark.parametrize(
    ("name", "placement", "first"),
    [
        ("bert", "houlsby", ["bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.0.output.dense"]),
        ("bert", "pfeiffer", ["bert.encoder.layer.0.output.dense"]),
        ("bert", "parallel", ["bert.encoder.layer.0.output"]),
        ("modernbert", "houlsby", ["model.layers.0.attn.Wo", "model.layers.0.mlp.Wo"]),
        ("distilbert", "parallel", ["distilbert.transformer.layer.0.ffn"]),
    ],
)
def test_names(name: str, placement: str, first: list[str]) -> None:
    names = places.target_modules(classifier(name), placement)
    assert names == [*first, *(one.replace(".0.", ".1.") for one in first)]


def test_layers_with_and_without_experts() -> None:
    base = AutoModelForCausalLM.from_config(config_of("qwen3_moe", mlp_only_layers=[0]))
    ends = [name.partition("layers.")[2] for name in places.target_modules(base, "pfeiffer")]
    assert ends == ["0.mlp.down_proj", "1.mlp"]


def test_many_layers_are_named_one_by_one() -> None:
    """PEFT shortens long lists of names: the short ones must select the same modules, not the attention's of the same name."""
    base = classifier("bert", num_hidden_layers=24)
    live = get_peft_model(base, tuner.register()(**places.for_peft(base, "pfeiffer")))
    assert live.targeted_module_names == [f"bert.encoder.layer.{number}.output.dense" for number in range(24)]


def test_an_unknown_kind_of_layer() -> None:
    sizes = {"vocab_size": 99, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    with pytest.raises(
        ModelError, match=r"T5ForConditionalGeneration.*unknown kind. Set target_modules to the modules"
    ):
        places.target_modules(T5ForConditionalGeneration(T5Config(**sizes)), "houlsby")


def test_layers_of_several_kinds() -> None:
    base = classifier("bert")
    base.bert.encoder.layer[1].output = torch.nn.Identity()
    with pytest.raises(ModelError, match=r"bert.encoder.layer.1 is of another kind"):
        places.target_modules(base, "pfeiffer")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("hrm_text", "it has several stacks of layers"), ("granitemoe", "its layers are of an unknown kind")],
)
def test_decoders_whose_modules_must_be_named(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        places.target_modules(weightless(name), "pfeiffer")


def test_an_unknown_placement() -> None:
    with pytest.raises(RecipeError, match="did you mean 'houlsby'"):
        places.target_modules(classifier("bert"), "houlsbi")
    with pytest.raises(RecipeError, match="none of houlsby, pfeiffer, parallel"):
        places.planned_parameters("x", 1, 1, 1)


def test_parameters_by_hand() -> None:
    assert places.parameters(768, 16) == 768 * 48 + 48 + 48 * 768 + 768
    assert places.parameters(8, 16) == 8 + 1 + 8 + 8  # never without a hidden layer
    assert places.planned_parameters("houlsby", 12, 768, 16) == 24 * places.parameters(768, 16)


def test_a_module_of_unknown_width() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    config = tuner.register()(target_modules=["0"])
    with pytest.raises(ModelError, match=r"0: the width of this module \(Block\) is unknown"):
        get_peft_model(torch.nn.Sequential(Block()), config)
    assert AutoConfig.for_model("gpt2", n_embd=48).hidden_size == 48  # the name that widths are read by
