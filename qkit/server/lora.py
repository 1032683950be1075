"""An adapter that vLLM serves beside its base: what vLLM takes, and how it is started on such a folder.

The rules are vLLM 0.32's; tests/server/test_deploy.py asks the installed one whether they still hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.chat.template import OTHERS
from qkit.core.errors import NotDeployable
from qkit.model import targets
from qkit.model.config import from_config
from qkit.model.provenance import check_adapter
from qkit.recipe.schema import Recipe

# An adapter of any rank up to its server's --max-lora-rank is served; that option takes these (vllm/config/lora.py, MaxLoRARanks).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Keys of adapter_config.json that are refused when set (vllm/lora/peft_helper.py, PEFTHelper._validate_features).
REFUSED = (
    *("modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens"),
    *("layer_replication", "use_bdlora", "use_qalora"),
)
EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "tok_embeddings"}
)  # all linear layers are served; of embeddings no rows are
ROWS = "trainable_token_indices"  # rows of an embedding (vllm/lora/utils.py, parse_fine_tuned_lora_name)
# vLLM refuses what peft writes for target_parameters of experts unless it is started with --enable-mixed-moe-lora-format and told of each
# adapter that it is of that kind (vllm/lora/model_manager.py, _validate_moe_lora_format). Its kernels for them are a GPU's; routers have none.
NO_PARAMETERS = "vLLM is started here on adapters of modules alone"


def refusal(recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """Why vLLM could not serve the adapter that this recipe trains beside its base, or None. `config`: the base's config.json.

    Raises:
        ModelError: the recipe names what the base does not have, or no shape can be had of it.
    """
    if recipe.model.add_tokens:
        return (
            'model.add_tokens has rows of the embedding learnt, and vLLM takes no adapter that holds any ("is unsupported LoRA weight"): '
            "serve the merged model (export.formats: vllm), or train without added tokens (model.chat_template=plain)"
        )
    if recipe.lora.r > RANKS[-1]:
        return (
            f"lora.r={recipe.lora.r} is more than vLLM takes (--max-lora-rank is {', '.join(map(str, RANKS))}): "
            "lower it, or serve the merged model (export.formats: vllm)"
        )
    if parameters := [t.matrix for t in targets.planned(recipe.lora, from_config(config, "the base")) if t.parameter]:
        return (
            f"the adapter changes {parameters[0].name} and {len(parameters) - 1} more parameters, and {NO_PARAMETERS}: serve the merged "
            "model (export.formats: vllm), or train other modules (lora.target_modules)"
        )
    return None


def unserved(config: Mapping[str, Any]) -> list[str]:
    """What in an adapter_config.json vLLM does not serve."""
    wrong = [f"it has {key}" for key in (*REFUSED, ROWS) if config.get(key)]
    if parameters := config.get("target_parameters"):
        wrong.append(f"it adapts the parameters {', '.join(sorted(parameters))}, and {NO_PARAMETERS}")
    modules = config.get("target_modules") or []
    names = [] if isinstance(modules, str) else [str(module).rpartition(".")[2] for module in modules]
    if embedded := sorted(EMBEDDINGS.intersection(names)):
        wrong.append(f"it adapts {', '.join(embedded)}, and only linear layers are served")
    if (rank := _highest_rank(config)) > RANKS[-1]:
        wrong.append(f"its rank is {rank}, the highest is {RANKS[-1]}")
    return wrong


def rank_for(config: Mapping[str, Any]) -> int:
    """The smallest --max-lora-rank that an adapter_config.json can be served with.

    Raises:
        NotDeployable: vLLM refuses such an adapter.
    """
    if wrong := unserved(config):
        raise NotDeployable(
            f"vLLM does not serve this adapter: {'; '.join(wrong)}. Serve the merged model (export.formats: vllm)"
        )
    return next(rank for rank in RANKS if rank >= _highest_rank(config))


def _highest_rank(config: Mapping[str, Any]) -> int:
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and not a whole model."""
    return (folder / "adapter_config.json").is_file()


def options(folder: Path, name: str) -> dict[str, str]:
    """vLLM's options for the base with this adapter on it, which is served as `name`; stop tokens and template are the adapter's.

    Raises:
        ModelError: what lies where its base was is another model.
    """
    base = Path(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
    note = check_adapter(folder, base)
    made = {
        "model": str(base),
        "served-model-name": f"{name}-base",
        "lora-modules": f"{name}={folder}",
        "max-lora-rank": str(note["max_lora_rank"]),
        "generation-config": str(folder),
    }
    if (folder / OTHERS).is_dir():  # --chat-template takes one, for every conversation
        return {**made, "tokenizer": str(folder)}
    template = folder / "chat_template.jinja"
    return {**made, "chat-template": str(template)} if template.is_file() else made
