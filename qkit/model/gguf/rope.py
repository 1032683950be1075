"""Scaled positions of a .gguf file, as a config.json says them. transformers leaves them out: a model of long rows then reads them wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError
from qkit.model.gguf.header import read_gguf
from qkit.model.gguf.llama_cpp import ROPE_FACTORS, rope_factors

if TYPE_CHECKING:
    import numpy as np


READ_BY_TRANSFORMERS = ("gpt-oss",)
LENGTHS = tuple(
    2**power for power in range(5, 21)
)  # that a model may have been trained on before its positions were scaled


def scaling(file: Path, theta: float) -> dict[str, Any]:
    """What to add to rope_parameters; nothing where positions are as they are. `theta`: the base of the frequencies.

    Raises:
        ModelError: they are scaled in a way that is not known here.
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
    """The file holds factors; a config.json says what they were made of."""
    import numpy as np

    factors = _factors(file)
    wanted = {"rope_theta": theta, "rope_type": "llama3", "factor": round(float(factors.max()), 4)}
    for length in LENGTHS:
        tried = {**wanted, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": length}
        if np.allclose(rope_factors(tried, 2 * len(factors)), factors, rtol=1e-4):
            return tried
    raise _unknown(file, f"by {ROPE_FACTORS}, which is not as Llama 3.1's is made")


def _factors(file: Path) -> np.ndarray[Any, Any]:
    from gguf import GGUFReader

    (found,) = (tensor.data for tensor in GGUFReader(str(file)).tensors if tensor.name == ROPE_FACTORS)
    factors: np.ndarray[Any, Any] = found
    return factors


def _unknown(file: Path, how: str) -> ModelError:
    return ModelError(
        f"{file}: its positions are scaled {how}, which is not read from a .gguf file; give model.source the folder or hub id that it was "
        "made from"
    )
