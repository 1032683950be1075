"""An ordinary model folder in 16 bit, for transformers, vLLM and whatever else reads safetensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import NotDeployable
from qkit.export.folder import beside_weights, link_weights, start
from qkit.plugins.exporter import Job
from qkit.recipe.schema import Recipe
from qkit.tensors.shard_writer import model_specs, write_model
from qkit.tensors.shards import Spec, read

if TYPE_CHECKING:
    import torch


VARIANTS = {"": "bfloat16", "fp16": "float16, for devices without bfloat16"}
QUANTIZED: frozenset[str] = frozenset()
RUNTIME = "transformers"
DTYPES = {"": ("BF16", "bfloat16"), "fp16": ("F16", "float16")}  # as the format and as config.json call them
FLOATS = {"BF16", "F16", "F32"}
LARGEST = 65504.0  # of float16


def export(job: Job, out: Path, variant: str) -> None:
    """Make `out` from the merged model, one tensor at a time.

    Raises:
        NotDeployable: there is no such variant, or a weight is too large for float16.
    """
    start(out, "safetensors", variant, VARIANTS)
    stored, name = DTYPES[variant]
    before = model_specs(job.merged)
    specs = {tensor: _stored_as(spec, stored) for tensor, spec in before.items()}
    if all(spec["dtype"] == before[tensor]["dtype"] for tensor, spec in specs.items()):
        link_weights(job.merged, out)
    else:
        tensors = ((tensor, [weight]) for tensor, weight in _checked(job.merged, specs))
        write_model(out, specs, tensors, job.recipe.merge.max_shard_bytes)
    beside_weights(job.merged, out, dtype=name)


def unsupported(variant: str, recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """Whether weights fit float16 is seen when they are there."""
    return None


def _stored_as(spec: Spec, dtype: str) -> Spec:
    """Floating-point tensors change their dtype; others stay what they are."""
    return {"dtype": dtype if spec["dtype"] in FLOATS else spec["dtype"], "shape": spec["shape"]}


def _checked(folder: Path, specs: Mapping[str, Spec]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in order; none that float16 would turn into infinity."""
    for name, tensor in read(folder, list(specs)):
        if specs[name]["dtype"] == "F16" and not (largest := float(tensor.abs().max())) <= LARGEST:
            raise NotDeployable(
                f"safetensors-fp16: {name} holds {largest:g}, and float16 ends at {LARGEST:g}; "
                "use the format safetensors (bfloat16)"
            )
        yield name, tensor
