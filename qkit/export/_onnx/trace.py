"""Traces an ONNX graph in fp32 of any decoder with a key-value cache: `python -m qkit.export._onnx.trace MODEL OUT`.

For architectures that onnxruntime-genai's builder does not support; transformers' exporter does the work. The graph has these inputs and
outputs, where `past` is 0 at the start of a text:

    input_ids, position_ids (where the model takes them) [rows, new], attention_mask [rows, past + new],
    past_key_values.N.key and .value [rows, heads, past, head size]  ->  logits, present.N.key and .value

A layer with a sliding window receives all keys and values too; the mask hides those beyond the window.
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


ROWS, PAST, NEW = 2, 3, 4  # sizes of the traced inputs; all above 1, which the tracer would take for a constant
STATEFUL = "its cache holds something other than the keys and values of all tokens"
LAYER = re.compile(r"(input|output)\.past_key_values\.layers\.(\d+)\.(key|value)s")
NAMES = {"input": "past_key_values", "output": "present"}


def refusal(config: Mapping[str, Any]) -> str | None:
    """Return why no graph can be traced of a model with this config.json; None if it can, or if transformers is not installed.

    transformers states nowhere which models have an ordinary cache, and importing a model's module loads torch, which `qkit plan` must not.
    So the source is read as text: the model's class must take `past_key_values`, and its module must not set `_is_stateful`. A model that
    passes but cannot be traced is refused by `write`. tests/export/test_onnx_traced.py checks the pinned version.
    """
    spec = find_spec("transformers")
    if spec is None or spec.submodule_search_locations is None:
        return None
    package, model_type = Path(spec.submodule_search_locations[0]), str(config.get("model_type", ""))
    if not (package / "exporters").is_dir():
        return "the installed version of transformers has no ONNX exporter"
    architecture = next(iter(config.get("architectures") or ("",)))
    usual = package / "models" / model_type / f"modeling_{model_type}.py"
    for source in [usual] if usual.is_file() else sorted(package.glob("models/*/modeling_*.py")):
        text = source.read_text(encoding="utf-8")
        _, class_line, rest = text.partition(f"\nclass {architecture}(")
        if class_line:
            cached = "past_key_values" in rest.partition("\nclass ")[0]
            return STATEFUL if not cached or "_is_stateful = True" in text else None
    return "transformers has no such class"


def write(model: Path, out: Path) -> None:
    """Make the folder `out` with the graph and its weights.

    Raises:
        NotDeployable: the exporter cannot trace this architecture.
    """
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()
    program = _program(loaded)
    out.mkdir()
    program.save(out / "model.onnx", external_data=True)


def _program(model: PreTrainedModel) -> Any:
    """Return the traced model with dynamic rows and lengths, its inputs and outputs named as in the module's docstring.

    Not optimized: ONNX Runtime optimizes a graph when it opens it, and onnxscript's optimizer takes a norm's epsilon of 1e-8 for zero.
    """
    try:
        inputs, axes = _sample(model)
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        program = OnnxExporter().export(model, inputs, OnnxConfig(dynamic_shapes=axes, optimize=False))
    except (MemoryError, OSError):
        raise
    except Exception as error:  # of any type: the tracer runs the model's own code
        raise NotDeployable(f"{type(model).__name__} cannot be traced: {reason(error)}.") from error
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        value.name = LAYER.sub(lambda match: f"{NAMES[match[1]]}.{match[2]}.{match[3]}", value.name)
    return program


def reason(error: BaseException) -> str:
    """Return the first line of the root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")
    return line if isinstance(error, NotDeployable) else f"{type(error).__name__}: {line}"


def _sample(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the inputs to trace with, and their dynamic axes; the tracer raises if the model's code fixes one of them."""
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
    """Return keys and values of PAST tokens. Without the model's config, no layer drops tokens beyond its window."""
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
