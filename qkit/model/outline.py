"""The sizes of a model whose family is not known here: transformers makes it without weights, and they are read off it.

Slow, since torch and transformers are imported for it, and only where arithmetic on config.json would be a guess.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from typing import Any

from qkit.model.shape import NEEDED, Outline

log = logging.getLogger(__name__)


def read(config: Mapping[str, Any]) -> Outline | None:
    """Of a config.json; None where transformers is not installed or does not know it, as with remote code."""
    return _read(json.dumps(config, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _read(text: str) -> Outline | None:
    config = json.loads(text)
    try:
        from transformers import AutoConfig

        known = AutoConfig.for_model(config.pop("model_type", ""), **config)
        made = _without_weights(known)
    except Exception as error:  # a config that its class cannot read raises whatever its code comes upon
        log.debug("no outline: %s", error)
        return None
    from qkit.model import targets

    found = targets.inventory_of(made)
    sizes = {key: getattr(known.get_text_config(), key, None) for key in (*NEEDED, "num_key_value_heads")}
    return Outline(
        found.linears,
        found.others,
        found.experts,
        found.routers,
        tuple((found.renamed or {}).items()),
        made.num_parameters(),
        not getattr(made, "_supports_sdpa", True),
        tuple((key, size) for key, size in sizes.items() if isinstance(size, int)),
    )


def _without_weights(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
