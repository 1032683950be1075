"""An ONNX graph in fp32 of any decoder with a key-value cache, traced by transformers' exporter: `python -m qkit.export._traced MODEL OUT`.

For architectures that onnxruntime-genai's builder does not know. What it makes has these names, `past` being 0 for a text that begins:

    input_ids, position_ids (where the model takes them) [rows, new], attention_mask [rows, past + new],
    past_key_values.N.key and .value [rows, heads, past, head size]  ->  logits, present.N.key and .value

A layer with a sliding window is given all keys and values as well: the mask hides those beyond the window.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import NotDeployable

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


ROWS, PAST, NEW = 2, 3, 4  # of what is traced; all above 1, which the tracer would take for fixed
STATEFUL = "it keeps something else than the keys and values of all tokens"
LAYER = re.compile(r"(input|output)\.past_key_values\.layers\.(\d+)\.(key|value)s")
NAMES = {"input": "past_key_values", "output": "present"}


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why no graph could be made of a model with this config.json, as far as transformers' source tells, which is read and not run."""
    found = find_spec("transformers")
    if found is None or found.submodule_search_locations is None:
        return None
    package, kind = Path(found.submodule_search_locations[0]), str(config.get("model_type", ""))
    if not (package / "exporters").is_dir():
        return "the transformers that is installed is too old to have it"
    beside = package / "models" / kind / f"modeling_{kind}.py"
    for source in [beside] if beside.is_file() else sorted(package.glob("models/*/modeling_*.py")):
        text = source.read_text(encoding="utf-8")
        _, named, rest = text.partition(f"\nclass {next(iter(config.get('architectures') or ('',)))}(")
        if named:
            cached = "past_key_values" in rest.partition("\nclass ")[0]
            return STATEFUL if not cached or "_is_stateful = True" in text else None
    return "transformers has no such class"


def write(model: Path, out: Path) -> None:
    """Make the folder `out` with the graph and its weights.

    Raises:
        NotDeployable: the exporter makes no graph of this architecture.
    """
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()
    program = _program(loaded)
    out.mkdir()
    program.save(out / "model.onnx", external_data=True)


def _program(model: PreTrainedModel) -> Any:
    """The traced model, rows and lengths left open, with the names that are usual for such graphs.

    Not optimized: ONNX Runtime does that as it opens a graph, and onnxscript's optimizer takes a norm's epsilon of 1e-8 for zero.
    """
    try:
        inputs, axes = _sample(model)
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        program = OnnxExporter().export(model, inputs, OnnxConfig(dynamic_shapes=axes, optimize=False))
    except (MemoryError, OSError):
        raise
    except Exception as error:  # of any kind: the tracer runs the model's own code
        raise NotDeployable(f"no graph could be made of {type(model).__name__}: {_reason(error)}.") from error
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        value.name = LAYER.sub(lambda found: f"{NAMES[found[1]]}.{found[2]}.{found[3]}", value.name)
    return program


def _reason(error: BaseException) -> str:
    """The first line of what it all began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")
    return line if isinstance(error, NotDeployable) else f"{type(error).__name__}: {line}"


def _sample(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model is traced with, and the axes that stay open; one that the model's code fixes is an error of the tracer's."""
    import torch
    from torch.export import Dim

    inputs: dict[str, Any] = {
        "input_ids": torch.ones(ROWS, NEW, dtype=torch.long),
        "attention_mask": torch.ones(ROWS, PAST + NEW, dtype=torch.long),
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(PAST, PAST + NEW).repeat(ROWS, 1)
    axes: dict[str, Any] = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
    cache = _filled_cache(model)
    axes["past_key_values"] = [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC}] * (2 * len(cache.layers))
    return {**inputs, "past_key_values": cache}, axes


def _filled_cache(model: PreTrainedModel) -> DynamicCache:
    """Keys and values of PAST tokens; made without the model's config, so that no layer forgets what is beyond its window."""
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.ones(ROWS, PAST, dtype=torch.long), past_key_values=cache, use_cache=True)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise NotDeployable(STATEFUL)
    return cache


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
