"""A plain model folder in 16 bits, for transformers, vLLM and other programs that read safetensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.export.folder import check_float16, create, link_weights, write_companions
from qkit.plugins.exporter import Job
from qkit.recipe.schema import Recipe
from qkit.tensors.shard_writer import model_specs, write_model
from qkit.tensors.shards import Spec, read

if TYPE_CHECKING:
    import torch


VARIANTS = {"": "bfloat16", "fp16": "float16, for devices without bfloat16"}
QUANTIZED: frozenset[str] = frozenset()
RUNTIME = "transformers"
DTYPES = {"": ("BF16", "bfloat16"), "fp16": ("F16", "float16")}  # names in safetensors and in config.json
FLOATS = {"BF16", "F16", "F32"}


def export(job: Job, out: Path, variant: str) -> None:
    """Make `out` from the merged model, one tensor at a time.

    Raises:
        NotDeployable: there is no such variant, or a weight is too large for float16.
    """
    create(out, "safetensors", variant, VARIANTS)
    stored, name = DTYPES[variant]
    merged_specs = model_specs(job.merged)
    specs = {tensor: _stored_as(spec, stored) for tensor, spec in merged_specs.items()}
    if all(spec["dtype"] == merged_specs[tensor]["dtype"] for tensor, spec in specs.items()):
        link_weights(job.merged, out)
    else:
        tensors = ((tensor, [weight]) for tensor, weight in _checked(job.merged, specs))
        write_model(out, specs, tensors, job.recipe.merge.max_shard_bytes)
    write_companions(job.merged, out, dtype=name)


def unsupported(variant: str, recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """No reason is known in advance: whether the weights fit float16 is checked while they are written."""
    return None


def _stored_as(spec: Spec, dtype: str) -> Spec:
    """Floating-point tensors change their dtype; others keep theirs."""
    return {"dtype": dtype if spec["dtype"] in FLOATS else spec["dtype"], "shape": spec["shape"]}


def _checked(folder: Path, specs: Mapping[str, Spec]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in order, after checking that float16 can hold them."""
    for name, tensor in read(folder, list(specs)):
        if specs[name]["dtype"] == "F16":
            check_float16(name, float(tensor.abs().max()), "safetensors-fp16", "use the format safetensors (bfloat16)")
        yield name, tensor
