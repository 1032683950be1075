"""How a LoRA adapter starts, beside at zero: with a part of the base (PiSSA, OLoRA), with what 4 bits lose of it (LoftQ), along what it reads
(EVA), or from the weights of another adapter.

PiSSA and OLoRA take their part out of the base, whose weights are then others. They are held in fp32, where nothing of that is rounded: the
adapter less its start, of twice the rank, is the same change of the base as it was, and that is what is saved.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError, RecipeError
from qkit.model.adapters import earlier
from qkit.recipe.schema import Lora
from qkit.tensors.lora_deltas import FACTOR_KEYS, PREFIX, WEIGHTS
from qkit.tensors.shards import read, shards, tensor_specs

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    Batches = Sequence[Mapping[str, torch.Tensor]]

ADAPTER = "default"  # PEFT's name of the one adapter of a model
START = "start.safetensors"  # beside the checkpoints: the factors that were taken out of the base
DOWN, UP = FACTOR_KEYS[0].down, FACTOR_KEYS[0].up


def fields(section: Lora) -> dict[str, Any]:
    """The fields of LoraConfig that do not depend on the model. PEFT's own start is at zero if the adapter starts otherwise."""
    given = section.model_dump(exclude={"target_modules", "target_parameters", "init_from", "loraplus_lr_ratio"})
    if section.takes_part_of_base or section.init_lora_weights == "loftq":
        return {**given, "init_lora_weights": True}
    if section.init_lora_weights != "eva":
        return given
    from peft import EvaConfig

    return {**given, "eva_config": EvaConfig(rho=1.0)}  # each module keeps the rank that the recipe says


def put(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """The base with a new adapter, which does not have its first weights yet."""
    from peft import get_peft_model

    with warnings.catch_warnings():  # about memory that EVA could save; the adapter is small
        warnings.filterwarnings("ignore", "lora with eva initialization used with low_cpu_mem_usage=False")
        model: PeftModel = get_peft_model(base, config)
    return model


def is_plain(section: Lora) -> bool:
    """Whether PEFT's configuration alone says how the adapter starts."""
    return section.init_from is None and section.init_lora_weights in (True, "gaussian", "orthogonal")


def begin(model: PeftModel, section: Lora, folder: Path, kept: Path, batches: Callable[[], Batches]) -> None:
    """Give a new adapter its first weights, in place; nothing if its configuration has.

    `folder`: of the base. `kept`: where the start is kept for training that resumes. `batches`: makes ids and masks of training rows.

    Raises:
        ModelError: the checkpoint of the base lacks a weight by the name that the model has for it.
        RecipeError: the adapter that lora.init_from names has other tensors.
    """
    if not is_plain(section) and section.init_from is None:
        _need_linear(model, section)
    if section.init_from is not None:
        earlier.take(model, section)
    elif section.takes_part_of_base:
        _part(model, str(section.init_lora_weights), kept / START)
    elif section.init_lora_weights == "loftq":
        _make_up(model, folder)
    elif section.init_lora_weights == "eva":
        _along(model, batches())


def _layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """The linear modules with an adapter, by name in the base model."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            yield name.removeprefix(PREFIX), module


def _need_linear(model: PeftModel, section: Lora) -> None:
    """Raise RecipeError if the adapter changes an embedding, which starts at zero only."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_embedding_A:
            raise RecipeError(
                f"lora.init_lora_weights={section.init_lora_weights} is for linear modules, and {name.removeprefix(PREFIX)} is an embedding: "
                "take it out of lora.target_modules, or remove the start"
            )


def widen(model: PeftModel) -> None:
    """Hold the base weights that have an adapter in fp32."""
    for _, layer in _layers(model):
        layer.get_base_layer().weight.data = layer.get_base_layer().weight.data.float()


# --- a part of the base -------------------------------------------------------------------------------------------------


def _part(model: PeftModel, name: str, file: Path) -> None:
    """Move the leading part of each base weight into its adapter. A training that resumes takes the same part again."""
    from safetensors.torch import load_file, save_file

    taken = load_file(file) if file.is_file() else {}
    start: dict[str, torch.Tensor] = {}
    widen(model)
    for module_name, layer in _layers(model):
        base, keys = layer.get_base_layer().weight, (f"{module_name}{DOWN}", f"{module_name}{UP}")
        factors = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        if taken:
            for key, factor in zip(keys, factors, strict=True):
                factor.data = taken[key].to(factor.device)
            down, up = factors[0].data.float(), factors[1].data.float()
            base.data -= (layer.scaling[ADAPTER] * up) @ down  # in PEFT's order, to the last bit
            continue
        layer.olora_init(ADAPTER) if name == "olora" else layer.pissa_init(ADAPTER, name)
        start |= {key: factor.data.contiguous().cpu() for key, factor in zip(keys, factors, strict=True)}
    if start:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".part")
        save_file(start, partial)
        partial.replace(file)


def subtract_start(adapter: Path, file: Path) -> None:
    """Make a saved adapter one of the base as it was: append the negated start in `file` to its factors, in place."""
    import torch
    from safetensors.torch import load_file, save_file

    start, tensors = load_file(file), load_file(adapter / WEIGHTS)
    for name, first in start.items():
        now = tensors[f"{PREFIX}{name}"]
        parts = [now, first if name.endswith(DOWN) else -first]
        tensors[f"{PREFIX}{name}"] = torch.cat([part.float() for part in parts], dim=0 if name.endswith(DOWN) else 1)
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    config_file = adapter / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    times = math.sqrt(2) if config.get("use_rslora") else 2  # the scaling stays: alpha / r, or alpha / sqrt(r)
    config |= {"r": 2 * config["r"], "lora_alpha": times * config["lora_alpha"]}
    config["rank_pattern"] = {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()}
    config["alpha_pattern"] = {key: times * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


# --- what 4 bits lose ---------------------------------------------------------------------------------------------------


def _make_up(model: PeftModel, folder: Path) -> None:
    """Start each adapter as the best low-rank approximation of what quantizing its weight lost.

    PEFT has this for CUDA only, and for factors that are not scaled afterwards.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit

    stored = {name for shard in shards(folder) for name in tensor_specs(shard)}
    for name, layer in _layers(model):
        if f"{name}.weight" not in stored:
            raise ModelError(
                f"lora.init_lora_weights=loftq: the checkpoint in {folder} has no {name}.weight; save the model with `save_pretrained` once "
                "and use that folder, or remove it",
                source=folder,
            )
        ((_, weight),) = read(folder, [f"{name}.weight"])
        base = layer.get_base_layer().weight
        held = dequantize_4bit(base.data, base.quant_state).float()
        left, sizes, right = torch.linalg.svd(weight.to(held.device).float() - held, full_matrices=False)
        rank, roots = layer.r[ADAPTER], (sizes / layer.scaling[ADAPTER]).sqrt()
        layer.lora_A[ADAPTER].weight.data = (roots[:rank, None] * right[:rank]).contiguous()
        layer.lora_B[ADAPTER].weight.data = (left[:, :rank] * roots[:rank]).contiguous()


# --- along what a module reads ------------------------------------------------------------------------------------------


def _along(model: PeftModel, batches: Batches) -> None:
    """Start each adapter along the directions in which its inputs vary most, over the training rows."""
    from peft import initialize_lora_eva_weights

    initialize_lora_eva_weights(model, list(batches), prepare_layer_inputs_fn=_tokens, show_progress_bar=False)
    config = model.peft_config[ADAPTER]
    config.init_lora_weights, config.eva_config = True, None  # what is saved is an ordinary adapter


def _tokens(given: Any, places: torch.Tensor, name: str) -> torch.Tensor:
    """What a module reads at the `places` [n, 2] that are not padding: [n, width]. A pooler reads one state of each row already."""
    states: torch.Tensor = given[0] if isinstance(given, tuple | list) else given
    return states.contiguous() if states.ndim == 2 else states[places.T.unbind()]
