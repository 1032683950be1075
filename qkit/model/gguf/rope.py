"""Rotary scaling of a .gguf file, in the form of a config.json. transformers ignores it, which breaks long rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError
from qkit.model.gguf.header import read_gguf
from qkit.model.gguf.llama_cpp import ROPE_FACTORS, rope_factors

if TYPE_CHECKING:
    import numpy as np


READ_BY_TRANSFORMERS = ("gpt-oss",)
LENGTHS = tuple(2**power for power in range(5, 21))  # possible training lengths before scaling


def scaling(file: Path, theta: float) -> dict[str, Any]:
    """What to add to rope_parameters; empty if positions are not scaled. `theta`: the base of the frequencies.

    Raises:
        ModelError: the kind of scaling is unknown.
    """
    header, tensors = read_gguf(file)
    kind = header.get("general.architecture")
    if kind in READ_BY_TRANSFORMERS:
        return {}
    if ROPE_FACTORS in tensors:
        return _llama3(file, theta)
    named = header.get(f"{kind}.rope.scaling.type", "none")
    if named == "none" and not any(name.startswith("rope_factors") for name in tensors):
        return {}
    factor, length = (header.get(f"{kind}.rope.scaling.{key}") for key in ("factor", "original_context_length"))
    if named == "linear" and factor:
        return {"rope_type": "linear", "factor": factor}
    if named == "yarn" and factor and length:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    raise _unknown(file, f"by {named!r}" if named != "none" else "by factors for short and for long rows")


def _llama3(file: Path, theta: float) -> dict[str, Any]:
    """Recover the parameters of Llama 3.1's scaling from its factors: the file holds factors, a config.json holds parameters."""
    import numpy as np

    factors = _factors(file)
    wanted = {"rope_theta": theta, "rope_type": "llama3", "factor": round(float(factors.max()), 4)}
    for length in LENGTHS:
        tried = {**wanted, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": length}
        if np.allclose(rope_factors(tried, 2 * len(factors)), factors, rtol=1e-4):
            return tried
    raise _unknown(file, f"by {ROPE_FACTORS}, which does not follow Llama 3.1's formula")


def _factors(file: Path) -> np.ndarray[Any, Any]:
    from gguf import GGUFReader

    factors: np.ndarray[Any, Any]
    (factors,) = (tensor.data for tensor in GGUFReader(str(file)).tensors if tensor.name == ROPE_FACTORS)
    return factors


def _unknown(file: Path, method: str) -> ModelError:
    return ModelError(
        f"{file}: its positions are scaled {method}, which qkit cannot read from a .gguf file; set model.source to the folder or hub id that "
        "it was made from",
        source=file,
    )
