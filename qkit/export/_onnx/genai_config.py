"""Completes an ONNX folder: the merged model's own files, and a genai_config.json that agrees with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.core.files import read_json, write_json
from qkit.model.provenance import NOTE
from qkit.tensors.companions import copy_companions

FILE = "genai_config.json"  # marks a folder that onnxruntime-genai opens


def complete(merged: Path, out: Path) -> None:
    """Copy the merged model's companion files over those that the builder saved, and set where onnxruntime-genai stops.

    The stop tokens are those of the generation config. A folder without genai_config.json, of a traced graph, gets the companion files only.
    """
    copy_companions(merged, out, but=(NOTE,) if (out / NOTE).exists() else ())
    if not (out / FILE).exists():
        return
    config = read_json(out / FILE)
    if (out / "generation_config.json").exists():
        stop = read_json(out / "generation_config.json").get("eos_token_id")
        config["model"]["eos_token_id"] = config["model"]["eos_token_id"] if stop is None else stop
    config["model"] |= ids_with_embedding(config["model"])
    # The CPU; a user adds the providers of a machine
    config["model"]["decoder"]["session_options"]["provider_options"] = []
    write_json(out / FILE, config)


def ids_with_embedding(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stop and padding ids of a genai_config's `model` section without ids that the embedding has no row for.

    onnxruntime-genai looks up every id that is named.
    """
    rows, stop = model["vocab_size"], model["eos_token_id"]
    stops = [number for number in (stop if isinstance(stop, list) else [stop]) if number < rows]
    pad = model.get("pad_token_id")
    padding = {"pad_token_id": stops[0]} if stops and pad is not None and pad >= rows else {}
    return {"eos_token_id": stops if isinstance(stop, list) or not stops else stops[0], **padding}
