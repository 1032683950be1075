"""One .gguf file for llama.cpp and Ollama, written tensor by tensor, and a Modelfile."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import NotDeployable
from qkit.export._gguf.modelfile import write_modelfile
from qkit.export._gguf.served import token_differences
from qkit.export._gguf.tokenizer import SENTENCEPIECE, add_tokenizer, placed_stops, unwritten
from qkit.export.folder import check_float16, create, note, write_companions
from qkit.model import config as model_config
from qkit.model import older_forms
from qkit.model.gguf import header
from qkit.model.gguf.llama_cpp import ROPE_FACTORS, rope_factors
from qkit.plugins.exporter import Job
from qkit.recipe.schema import Recipe
from qkit.tensors.shard_writer import model_specs
from qkit.tensors.shards import Spec, read

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter


VARIANTS = {
    "f16": "matrices in float16",
    "q8_0": "8 bits, blocks of 32",
    "q4_0": "4 bits, blocks of 32; embeddings and head in 8 bits",
}
QUANTIZED = frozenset({"q8_0", "q4_0"})
RUNTIME = "transformers"
# What the distance measured with transformers does not include, by variant; measured on a 135M Llama with llama.cpp itself.
REMARKS = {
    "q8_0": (
        "measured with dequantized weights; llama.cpp also rounds activations to 8 bits: the KL divergence of a 135M model was 0.0025 measured "
        "so, and 0.0071 in llama.cpp"
    ),
    "q4_0": (
        "measured with dequantized weights; llama.cpp also rounds activations to 8 bits. On a 135M model the KL divergence was six times that "
        "of llama.cpp's own Q4_K_M (0.69 and 0.11), with 13% fewer bytes. To make Q4_K_M from gguf-f16: `llama-quantize model.gguf "
        "model-q4_k_m.gguf Q4_K_M`"
    ),
}
FILE = "model.gguf"


ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> GGUF's
# transformers 5.19 (integrations/ggml.py) does not read attention.key_length of these, and uses the default of their config.
READ_HEAD_DIM = {"qwen3": 128}
# Of the layers; of embeddings and head
TYPES = {"f16": ("F16", "F16"), "q8_0": ("Q8_0", "Q8_0"), "q4_0": ("Q4_0", "Q8_0")}
FILE_TYPES = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}


def export(job: Job, out: Path, variant: str) -> None:
    """Make `out` from the merged model.

    Raises:
        NotDeployable: there is no such variant, or qkit cannot write this architecture, tokenizer or RoPE scaling as GGUF.
    """
    create(out, "gguf", variant, VARIANTS)
    config = json.loads((job.merged / "config.json").read_text(encoding="utf-8"))
    if reason := _unsupported_config(config) or unwritten(job.merged):
        raise NotDeployable(f"gguf-{variant}: {reason}", export_format=f"gguf-{variant}")
    import gguf

    with closing(gguf.GGUFWriter(str(out / FILE), ARCHITECTURES[config["model_type"]])) as writer:
        _sizes(writer, config)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[variant]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, job.merged, int(config["vocab_size"]))
        _tensors(writer, job.merged, config, variant)
    write_companions(job.merged, out)
    write_modelfile(out, FILE)
    _report_differences(job, out, variant)


def _report_differences(job: Job, out: Path, variant: str) -> None:
    """Record in qkit.json, for the model card, where llama.cpp tokenizes or stops differently than in training; tell the user."""
    texts, (_, unstopped) = token_differences(job.rows, job.merged, out / FILE), placed_stops(job.merged)
    note(out, served_otherwise=texts, unstopped=unstopped)
    if texts and texts["differ"]:
        share = texts["differ"] / texts["rows"]
        cause = ", ".join(texts["because"]) or "its own patterns"
        job.notify(
            f"gguf-{variant}: llama.cpp tokenizes {share:.1%} of {texts['rows']:,} rows differently than in training ({cause})"
        )
    if unstopped:
        job.notify(
            f"gguf-{variant}: llama.cpp does not stop at the tokens {unstopped}: a GGUF header holds three stop tokens; the Modelfile has all"
        )


def unsupported(variant: str, recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """Check architecture and RoPE scaling, and the tokenizer if the model is a local folder or .gguf file."""
    source = Path(recipe.model.source)
    if source.suffix == ".gguf" and source.is_file():
        kind = header.read_gguf(source)[0].get("tokenizer.ggml.model")
        return _unsupported_config(config) or (None if kind == "gpt2" else SENTENCEPIECE)
    return _unsupported_config(config) or (unwritten(source) if source.is_dir() else None)


def _unsupported_config(config: Mapping[str, Any]) -> str | None:
    """Return why no GGUF can be written of a model with this config.json, or None."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        return f"the architecture {kind!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
    if (scaling := older_forms.rope(config).get("rope_type", "default")) not in ("default", "llama3"):
        return f"the RoPE scaling {scaling!r} is not supported"
    head_dim, read_head_dim = model_config.from_config(config, "the model").head_dim, READ_HEAD_DIM.get(str(kind))
    if read_head_dim and head_dim != read_head_dim:
        return f"transformers, which verifies a GGUF, reads every {kind} with head_dim {read_head_dim}, and this model has {head_dim}"
    return None


def _sizes(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """Write the model's sizes into the header."""
    sizes = model_config.from_config(config, "the merged model")
    limits = [size for size in (sizes.positions, sizes.window if sizes.windowed else None) if size]
    # llama.cpp attends to the whole context, so it must not exceed the model's attention window
    writer.add_context_length(min(limits))
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(sizes.intermediate)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_vocab_size(sizes.vocabulary)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(older_forms.rope(config)["rope_theta"]))
    writer.add_rope_dimension_count(sizes.head_dim)


# --- tensors ----------------------------------------------------------------------------------------------------------


def _tensors(writer: GGUFWriter, merged: Path, config: Mapping[str, Any], variant: str) -> None:
    """Write the list of all tensors, which comes first in the file, and then each tensor."""
    import numpy as np
    from gguf.quants import quant_shape_to_byte_shape

    names, specs = _names(merged, config), model_specs(merged)
    types = {name: _type(names[name], specs[name], variant) for name in names}
    factors = rope_scaling(config)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for name, target in names.items():
        stored = quant_shape_to_byte_shape(specs[name]["shape"], types[name])
        writer.add_tensor_info(target, stored, np.dtype(np.uint8), int(np.prod(stored)), types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        _write(writer, factors)
    for name, tensor in read(merged, list(names)):
        _write(writer, _stored(name, tensor, types[name], config))


def _write(writer: GGUFWriter, stored: np.ndarray[Any, Any]) -> None:
    """Write a tensor. On a full disk numpy raises an OSError without a number; give it one."""
    try:
        writer.write_tensor_data(stored)
    except OSError as error:
        raise OSError(error.errno or errno.ENOSPC, error.strerror or os.strerror(errno.ENOSPC)) from error


def _names(merged: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Map transformers' tensor names to GGUF's, in the order of the shards.

    Raises:
        NotDeployable: GGUF has no name for a tensor.
    """
    import gguf

    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config["model_type"]])
    known = gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"]))
    tensors = [
        name for name in model_specs(merged) if not (name == "lm_head.weight" and config.get("tie_word_embeddings"))
    ]
    names = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensors}
    if unnamed := [name for name, target in names.items() if target is None]:
        raise NotDeployable(f"gguf: the format has no name for the tensor {unnamed[0]} and {len(unnamed) - 1} more")
    return names


def _type(target: str, spec: Spec, variant: str) -> GGMLQuantizationType:
    """Return the type of a tensor. llama.cpp expects norms and biases in 32 bits; rows that cannot be divided into blocks are float16."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(spec["shape"]) < 2:
        return GGMLQuantizationType.F32
    layers, ends = TYPES[variant]
    kind = GGMLQuantizationType[layers if target.startswith("blk.") else ends]
    return kind if spec["shape"][-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _stored(
    name: str, tensor: torch.Tensor, kind: GGMLQuantizationType, config: Mapping[str, Any]
) -> np.ndarray[Any, Any]:
    """Return a tensor as the file stores it.

    Raises:
        NotDeployable: float16 cannot hold one of its values.
    """
    import numpy as np
    from gguf.quants import quantize

    values = tensor.float().numpy()
    if config["model_type"] in ("llama", "mistral"):
        heads = int(config["num_attention_heads"])
        if ".q_proj." in name:
            values = _interleaved(values, heads)
        elif ".k_proj." in name:
            values = _interleaved(values, int(config.get("num_key_value_heads") or heads))
    if kind.name == "F16":
        check_float16(name, float(np.abs(values).max()), "gguf", "use the format safetensors (bfloat16)")
    stored: np.ndarray[Any, Any] = quantize(np.ascontiguousarray(values), kind)
    return stored.view(np.uint8)


def _interleaved(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorder the rows of a query or key matrix: llama.cpp rotates adjacent pairs, and transformers the two halves of a head."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def rope_scaling(config: Mapping[str, Any]) -> np.ndarray[Any, Any] | None:
    """Return the divisors of Llama 3.1's RoPE scaling, [head_dim / 2]; None if the model does not scale RoPE."""
    rope = older_forms.rope(config)
    if rope.get("rope_type", "default") != "llama3":
        return None
    return rope_factors(rope, model_config.from_config(config, "the merged model").head_dim)
