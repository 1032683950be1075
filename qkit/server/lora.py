"""LoRA adapters that vLLM serves with their base: which ones it supports, and its options for an adapter folder.

The rules are vLLM 0.32's; tests/server/test_deploy.py asks the installed one whether they still hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.chat.template import OTHERS
from qkit.core.errors import NotDeployable
from qkit.model.adapters import targets
from qkit.model.config import from_config
from qkit.model.provenance import check_adapter
from qkit.recipe.schema import WHOLE, Recipe

# The values of --max-lora-rank (vllm/config/lora.py, MaxLoRARanks). A server serves adapters of any rank up to its own.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Keys of adapter_config.json that vLLM refuses when set (vllm/lora/peft_helper.py, PEFTHelper._validate_features).
REFUSED = (
    *("modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens"),
    *("layer_replication", "use_bdlora", "use_qalora"),
)
EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "tok_embeddings"}
)  # vLLM serves adapters of all linear layers, but not of embeddings
ROWS = "trainable_token_indices"  # rows of an embedding (vllm/lora/utils.py, parse_fine_tuned_lora_name)
# vLLM refuses what peft writes for target_parameters of experts unless it runs with --enable-mixed-moe-lora-format and each adapter is marked
# as one of that kind (vllm/lora/model_manager.py, _validate_moe_lora_format). Its kernels for them need a GPU, and there are none for routers.
NO_PARAMETERS = "qkit starts vLLM for adapters of modules only"


def refusal(recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """Why vLLM cannot serve the adapter that this recipe trains, or None if it can. `config`: the base's config.json.

    Raises:
        ModelError: the recipe names modules that the base does not have, or the base's shape is unknown.
    """
    if recipe.model.add_tokens:
        return (
            'model.add_tokens trains rows of the embedding, and vLLM refuses adapters that contain them ("is unsupported LoRA weight"): '
            "serve the merged model (export.formats: vllm), or train without added tokens (model.chat_template=plain)"
        )
    if recipe.method in WHOLE:
        return f"method={recipe.method} trains the weights themselves, so there is no adapter: use vllm"
    if reason := _other_kind(recipe):
        return f"{reason}: serve the merged model (export.formats: vllm)"
    rank = recipe.lora.r * (2 if recipe.lora.takes_part_of_base else 1)
    if rank > RANKS[-1]:
        saved = "" if rank == recipe.lora.r else f" (with {recipe.lora.init_lora_weights} it is saved with rank {rank})"
        return (
            f"lora.r={recipe.lora.r}{saved} is more than vLLM supports (--max-lora-rank is {', '.join(map(str, RANKS))}): "
            "lower it, or serve the merged model (export.formats: vllm)"
        )
    if parameters := [t.matrix for t in targets.planned(recipe.lora, from_config(config, "the base")) if t.parameter]:
        return (
            f"the adapter changes {parameters[0].name} and {len(parameters) - 1} more parameters, and {NO_PARAMETERS}: serve the merged "
            "model (export.formats: vllm), or train other modules (lora.target_modules)"
        )
    return None


def _other_kind(recipe: Recipe) -> str:
    """Why what the recipe trains is no plain LoRA on 16-bit weights; "" if it is."""
    if recipe.method == "peft":
        return f"vLLM serves LoRA only, and method=peft trains {recipe.peft.get('peft_type')}"
    if recipe.lora.use_dora:
        return "vLLM does not serve DoRA (lora.use_dora) unmerged"
    if recipe.lora.init_lora_weights == "loftq":
        return "with lora.init_lora_weights=loftq the adapter makes up for what 4 bits lose, and vLLM serves it on 16-bit weights"
    return ""


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """What vLLM does not support in an adapter_config.json."""
    problems = [f"it has {key}" for key in (*REFUSED, ROWS) if config.get(key)]
    if parameters := config.get("target_parameters"):
        problems.append(f"it adapts the parameters {', '.join(sorted(parameters))}, and {NO_PARAMETERS}")
    modules = config.get("target_modules") or []
    names = [] if isinstance(modules, str) else [str(module).rpartition(".")[2] for module in modules]
    if embedded := sorted(EMBEDDINGS.intersection(names)):
        problems.append(f"it adapts {', '.join(embedded)}, and vLLM serves adapters of linear layers only")
    if (rank := _highest_rank(config)) > RANKS[-1]:
        problems.append(f"its rank is {rank}, and the highest is {RANKS[-1]}")
    return problems


def rank_for(config: Mapping[str, Any]) -> int:
    """The smallest --max-lora-rank for an adapter_config.json.

    Raises:
        NotDeployable: vLLM does not serve such an adapter.
    """
    if problems := unsupported(config):
        raise NotDeployable(
            f"vLLM does not serve this adapter: {'; '.join(problems)}. Serve the merged model (export.formats: vllm)"
        )
    return next(rank for rank in RANKS if rank >= _highest_rank(config))


def _highest_rank(config: Mapping[str, Any]) -> int:
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def is_adapter(folder: Path) -> bool:
    """Whether a folder contains an adapter instead of a whole model."""
    return (folder / "adapter_config.json").is_file()


def options(folder: Path, name: str) -> dict[str, str]:
    """vLLM's options for an adapter, served as `name` on its base. Stop tokens and chat template are the adapter's.

    Raises:
        ModelError: the folder of its base contains another model now.
    """
    base = Path(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
    note = check_adapter(folder, base)
    named = {
        "model": str(base),
        "served-model-name": f"{name}-base",
        "lora-modules": f"{name}={folder}",
        "max-lora-rank": str(note["max_lora_rank"]),
        "generation-config": str(folder),
    }
    if (folder / OTHERS).is_dir():  # --chat-template takes only one template
        return {**named, "tokenizer": str(folder)}
    template = folder / "chat_template.jinja"
    return {**named, "chat-template": str(template)} if template.is_file() else named
