"""One .gguf file for llama.cpp and Ollama, written tensor by tensor, and a Modelfile beside it."""

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
from qkit.export._gguf.served import otherwise
from qkit.export._gguf.tokenizer import SENTENCEPIECE, add_tokenizer, placed_stops, unwritten
from qkit.export.folder import beside_weights, note, start
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
    "q8_0": "8 bit, blocks of 32",
    "q4_0": "4 bit, blocks of 32; embeddings and head in 8 bit",
}
QUANTIZED = frozenset({"q8_0", "q4_0"})
RUNTIME = "transformers"
# What a distance measured with transformers leaves out, by variant; measured on a 135M Llama with llama.cpp itself.
REMARKS = {
    "q8_0": "weights are unpacked to be measured; llama.cpp also rounds activations to 8 bit: a 135M model was at 0.0025 here and 0.0071 there",
    "q4_0": (
        "its weights are unpacked to be measured, and llama.cpp also rounds activations to 8 bit; of a 135M model it was six times as far as "
        "llama.cpp's own Q4_K_M (KL 0.69 and 0.11) for 13 % fewer bytes: `llama-quantize model.gguf model-q4_k_m.gguf Q4_K_M` makes that of "
        "gguf-f16"
    ),
}
FILE = "model.gguf"


ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> GGUF's
# transformers 5.19 (integrations/ggml.py) does not read attention.key_length of these, and takes their config's own default.
READ_HEAD_DIM = {"qwen3": 128}
TYPES = {
    "f16": ("F16", "F16"),
    "q8_0": ("Q8_0", "Q8_0"),
    "q4_0": ("Q4_0", "Q8_0"),
}  # of the layers, of embeddings and head
FILE_TYPES = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
LARGEST = 65504.0  # of float16


def export(job: Job, out: Path, variant: str) -> None:
    """Make `out` from the merged model.

    Raises:
        NotDeployable: there is no such variant, or GGUF has no form for this architecture, tokenizer or scaling of positions.
    """
    start(out, "gguf", variant, VARIANTS)
    config = json.loads((job.merged / "config.json").read_text(encoding="utf-8"))
    if reason := _unknown(config) or unwritten(job.merged):
        raise NotDeployable(f"gguf-{variant}: {reason}")
    import gguf

    with closing(gguf.GGUFWriter(str(out / FILE), ARCHITECTURES[config["model_type"]])) as writer:
        _sizes(writer, config)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[variant]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, job.merged, int(config["vocab_size"]))
        _tensors(writer, job.merged, config, variant)
    beside_weights(job.merged, out)
    write_modelfile(out, FILE)
    _say(job, out, variant)


def _say(job: Job, out: Path, variant: str) -> None:
    """What llama.cpp does otherwise than training did: into qkit.json, from where the model card takes it, and to the user."""
    texts, (_, unstopped) = otherwise(job.rows, job.merged, out / FILE), placed_stops(job.merged)
    note(out, served_otherwise=texts, unstopped=unstopped)
    if texts and texts["differ"]:
        share = texts["differ"] / texts["rows"]
        why = ", ".join(texts["because"]) or "its own patterns"
        job.notify(
            f"gguf-{variant}: llama.cpp reads {share:.1%} of {texts['rows']:,} rows in other tokens than training ({why})"
        )
    if unstopped:
        job.notify(
            f"gguf-{variant}: llama.cpp does not stop at the tokens {unstopped}: a header has room for three; the Modelfile has all"
        )


def unsupported(variant: str, recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """Architectures, scalings of positions and, where the model's folder or .gguf file is at hand, tokenizers that are not written."""
    source = Path(recipe.model.source)
    if source.suffix == ".gguf" and source.is_file():
        kind = header.read_gguf(source)[0].get("tokenizer.ggml.model")
        return _unknown(config) or (None if kind == "gpt2" else SENTENCEPIECE)
    return _unknown(config) or (unwritten(source) if source.is_dir() else None)


def _unknown(config: Mapping[str, Any]) -> str | None:
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        return f"the architecture {kind!r} is not written by this version; it writes {', '.join(ARCHITECTURES)}"
    if (scaling := older_forms.rope(config).get("rope_type", "default")) not in ("default", "llama3"):
        return f"positions scaled by {scaling!r} are not written by this version"
    head, usual = model_config.from_config(config, "the model").head_dim, READ_HEAD_DIM.get(str(kind))
    if usual and head != usual:
        return f"transformers, which opens a GGUF to verify it, reads every {kind} with heads of {usual}, and these have {head}"
    return None


def _sizes(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """The model's sizes, by GGUF's names."""
    sizes = model_config.from_config(config, "the merged model")
    limits = [size for size in (sizes.positions, sizes.window if sizes.windowed else None) if size]
    writer.add_context_length(
        min(limits)
    )  # llama.cpp looks back on all of them: no further than the model's own window
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
    """The list of all tensors, which the format has first, then one after the other."""
    import numpy as np
    from gguf.quants import quant_shape_to_byte_shape

    names, specs = _names(merged, config), model_specs(merged)
    types = {name: _type(names[name], specs[name], variant) for name in names}
    factors = _rope_factors(config)
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
    """numpy says of a full disk only that nothing was written."""
    try:
        writer.write_tensor_data(stored)
    except OSError as error:
        raise OSError(error.errno or errno.ENOSPC, error.strerror or os.strerror(errno.ENOSPC)) from error


def _names(merged: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """transformers' names and GGUF's, in the order of the shards.

    Raises:
        NotDeployable: GGUF has no name for a tensor.
    """
    import gguf

    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config["model_type"]])
    known = gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"]))
    wanted = [
        name for name in model_specs(merged) if not (name == "lm_head.weight" and config.get("tie_word_embeddings"))
    ]
    found = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in wanted}
    if strange := [name for name, target in found.items() if target is None]:
        raise NotDeployable(f"gguf: the format has no name for {strange[0]} and {len(strange) - 1} more")
    return found


def _type(target: str, spec: Spec, variant: str) -> GGMLQuantizationType:
    """Norms and biases stay in 32 bit, as llama.cpp wants them; rows that no block divides are float16."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(spec["shape"]) < 2:
        return GGMLQuantizationType.F32
    layers, ends = TYPES[variant]
    wanted = GGMLQuantizationType[layers if target.startswith("blk.") else ends]
    return wanted if spec["shape"][-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def _stored(
    name: str, tensor: torch.Tensor, kind: GGMLQuantizationType, config: Mapping[str, Any]
) -> np.ndarray[Any, Any]:
    """The tensor as the file holds it."""
    import numpy as np
    from gguf.quants import quantize

    values = tensor.float().numpy()
    if config["model_type"] in ("llama", "mistral"):
        heads = int(config["num_attention_heads"])
        if ".q_proj." in name:
            values = _interleaved(values, heads)
        elif ".k_proj." in name:
            values = _interleaved(values, int(config.get("num_key_value_heads") or heads))
    if kind.name == "F16" and not (largest := float(np.abs(values).max())) <= LARGEST:
        raise NotDeployable(f"gguf: {name} holds {largest:g}, and float16 ends at {LARGEST:g}")
    stored: np.ndarray[Any, Any] = quantize(np.ascontiguousarray(values), kind)
    return stored.view(np.uint8)


def _interleaved(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp rotates neighbours where transformers rotates the halves of a head: the rows of query and key change places."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _rope_factors(config: Mapping[str, Any]) -> np.ndarray[Any, Any] | None:
    """By what Llama 3.1's scaling divides each frequency of the positions; None where nothing is scaled."""
    rope = older_forms.rope(config)
    if rope.get("rope_type", "default") != "llama3":
        return None
    return rope_factors(rope, model_config.from_config(config, "the merged model").head_dim)
