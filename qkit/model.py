"""The base model: where its files are, its tokenizer, and loading it in 4 bit, in 16 bit, or with an adapter on it."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit import (
    added_tokens,
    deltas,
    gguf_rope,
    gguf_tokenizer,
    older_forms,
    prequantized,
    provenance,
    recipe,
    several,
    targets,
    template,
)
from qkit.errors import ModelError
from qkit.four_bit import FourBit
from qkit.reach import reaching_hub
from qkit.source import HubId, cache_dir, locate, sha256_of
from qkit.tensor_files import SHARDS, tensor_specs

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qkit.device import Device

log = logging.getLogger(__name__)
NO_SDPA = "scaled_dot_product_attention"  # in what transformers says of a model that has no such attention


CONVERSION = 2  # of .gguf files: what the cache holds of an earlier one is made anew
# What stands beside the weights, in folders too; a licence goes on with what is made of them, as most ask for.
TEXTS = ("*.json", "*.jinja", "tokenizer*", "*.model", "*.tiktoken", "*.txt", "*.py")
LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
COMPANIONS = (*TEXTS, *LICENCES)


def resolve(model: recipe.Model) -> Path:
    """A local folder that `from_pretrained` takes, downloaded from the hub or converted from .gguf if need be; of a quantized model one
    in 16 bit, with model.add_tokens one whose tokenizer and weights have them.

    Raises:
        ModelError: there is no such model, it cannot be had, not be dequantized, or not be given these tokens.
    """
    folder = _resolved(model, (*COMPANIONS, SHARDS))
    if kind := prequantized.of_folder(folder):
        folder = _dequantized(folder, kind, model.trust_remote_code)
    if not model.add_tokens:
        return folder
    target = cache_dir() / "models" / f"tokens-{added_tokens.key(folder, model.add_tokens)[:24]}"
    return _kept(target, lambda out: added_tokens.prepare(folder, model.add_tokens, model.trust_remote_code, out))


def _dequantized(folder: Path, kind: str, trust_remote_code: bool) -> Path:
    """The model in 16 bit, dequantized once and kept in the cache."""
    target = cache_dir() / "models" / f"plain-{added_tokens.key(folder, ())[:24]}"
    return _kept(target, lambda out: prequantized.dequantize(folder, kind, trust_remote_code, out))


def companions(model: recipe.Model) -> Path:
    """The folder of the model as it comes; from the hub only what stands beside the weights is fetched.

    Raises:
        ModelError: as `resolve`.
    """
    return _resolved(model, COMPANIONS)


def _resolved(model: recipe.Model, wanted: Sequence[str]) -> Path:
    found = locate(model.source, sha256=model.sha256, kind=ModelError)
    if isinstance(found, HubId):
        return _from_hub(found.name, model.revision, wanted)
    if found.suffix == ".gguf":
        return _from_gguf(found)
    if not (found / "config.json").is_file():
        raise ModelError(f"{found}: holds no config.json, so it is not a model folder (nor a .gguf file)")
    return found


def _from_hub(name: str, revision: str | None, wanted: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    remedy = "check the name and the network, `hf auth login` for gated models, or give model.source a local folder"
    with reaching_hub(ModelError, f"{name}: could not be fetched from the hub", remedy):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted)))


def _from_gguf(file: Path) -> Path:
    """The model of a .gguf file as a safetensors folder in bf16, converted once and kept in the cache."""
    target = cache_dir() / "models" / f"{file.stem}-{sha256_of(file)[:12]}-{CONVERSION}"
    return _kept(target, lambda out: _convert_gguf(file, out))


def _kept(target: Path, make: Callable[[Path], None]) -> Path:
    """The folder `target` of the cache; where there is none, `make` fills a temporary one that takes its name when it is whole."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as temporary:
        make(Path(temporary) / "model")
        if not target.exists():  # another process may have been faster
            (Path(temporary) / "model").rename(target)
    return target


def _convert_gguf(file: Path, out: Path) -> None:
    """Weights as transformers reads them; the tokenizer, what ends an answer and scaled positions, which it does not, as llama.cpp does."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    tokenizer = gguf_tokenizer.build(file)
    try:
        config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"{file}: transformers cannot read it ({str(error).splitlines()[0]}); give model.source the folder or hub id that the file was "
            "made from"
        ) from None
    if rope := getattr(config, "rope_parameters", None):
        config.rope_parameters = {**rope, **gguf_rope.scaling(file, rope["rope_theta"])}
    loaded = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        config=config,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    stops = gguf_tokenizer.Header(file).stops
    for section in (loaded.config, loaded.generation_config):
        section.bos_token_id, section.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
        section.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    loaded.save_pretrained(out)
    tokenizer.save_pretrained(out)
    older_forms.settle(out)


def tokenizer_of(model: recipe.Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe's model."""
    return load_tokenizer(companions(model), model)


def load_tokenizer(folder: Path, section: recipe.Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with the tokens and the chat template that the recipe's model section names.

    Raises:
        ModelError: it has none, has no chat template, or lacks the tokens that the template writes.
    """
    tokenizer = added_tokens.bare_tokenizer(folder, section.trust_remote_code)
    own = added_tokens.markers(tokenizer)
    added_tokens.add(tokenizer, section.add_tokens)
    template.choose(tokenizer, section.chat_template, folder)
    if section.chat_template in template.named():
        added_tokens.begin_as_texts_do(tokenizer)
    if section.chat_template is not None:
        added_tokens.check_markers(tokenizer, section.chat_template, own)
    return tokenizer


def vocabulary(section: recipe.Model, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many token ids the model has an embedding for, those of model.add_tokens included."""
    known, rows = 1 + max(tokenizer.get_vocab().values()), int(_config(section).get("vocab_size") or 0)
    return max(rows, known) if section.add_tokens else rows or known


def named_tokens(section: recipe.Model) -> dict[str, int]:
    """Ids that the model's config names, by their keys there; of a list, the largest."""
    found = {
        key: value for key, value in _config(section).items() if key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    flat = {key: max(value, default=None) if isinstance(value, list) else value for key, value in found.items()}
    return {key: int(value) for key, value in flat.items() if value is not None}


def max_positions(section: recipe.Model) -> int | None:
    """The most tokens that the model's config says it takes."""
    found = _config(section).get("max_position_embeddings")
    return int(found) if found else None


def _config(section: recipe.Model) -> dict[str, Any]:
    """The config of the text model; models for several media keep it one level down."""
    file = companions(section) / "config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {**found, **found.get("text_config", {})}


def load_base(folder: Path, how: recipe.Recipe, device: Device) -> PreTrainedModel:
    """The base model as training sees it: in 4 bit when the recipe says so, the rest in bf16.

    Raises:
        ModelError: the folder lacks some of its weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": how.model.attn_implementation}
    options["generation_config"] = GenerationConfig()  # its file may be one that the library refuses; decoding is ours
    if how.quantization.load_in_4bit:
        options["quantization_config"] = quantization_config(how.quantization)
    options |= {"device_map": device.device_map, "trust_remote_code": how.model.trust_remote_code}
    options["output_loading_info"] = True
    loaded: PreTrainedModel
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(str(folder), **options)
    except ValueError as error:
        if how.model.attn_implementation != "sdpa" or NO_SDPA not in str(error):
            raise
        log.warning("transformers computes this model's attention in no other way than eager: %s", error)
        eager = {**options, "attn_implementation": "eager"}
        loaded, report = AutoModelForCausalLM.from_pretrained(str(folder), **eager)
    _need_whole(folder, report["missing_keys"])
    loaded.config.use_cache = False
    leave_as_quantized(loaded)
    if how.quantization.load_in_4bit and device.gives_back:
        _let_go_of_files(loaded)
    return loaded


def _need_whole(folder: Path, lacking: Collection[str]) -> None:
    """Raises ModelError when weights are lacking, which transformers makes up."""
    if missing := sorted(name for name in lacking if name.endswith(".weight")):
        raise ModelError(
            f"{folder}: its weights lack {missing[0]} and {len(missing) - 1} more, which would be made up with random numbers; make the folder "
            "again, or where a head is lacking that is the embedding once more set tie_word_embeddings to true in its config.json"
        )


def _let_go_of_files(model: PreTrainedModel) -> None:
    """Copy what was not quantized. As it was read, it is a view of its file, and one view keeps the whole 16-bit file mapped."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()


def leave_as_quantized(model: PreTrainedModel, also_packable: bool = True) -> None:
    """Have bitsandbytes compute with its 4-bit weights as they were quantized, in evaluation as in training.

    On a CPU with AVX512-BF16 it would pack them anew, for good, at their first forward in evaluation without gradients: widths that are no
    multiple of a pack's fail there, a state_dict (saving an adapter is enough) turns them back wrongly, and dequantizing reads them wrongly.
    `also_packable` False: only those that it cannot pack.
    """
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit) and (also_packable or not _can_be_packed(module)):
            module.support_avx512bf16_for_cpu = False


def _can_be_packed(layer: Linear4bit) -> bool:
    """Whether bitsandbytes' packs, 32 rows of whole quantization blocks, hold its weight."""
    return bool(layer.out_features % 32 == 0 and layer.in_features % FourBit.BLOCK == 0)


def quantization_config(section: recipe.Quantization) -> Any:
    """The section as transformers' BitsAndBytesConfig."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**section.model_dump())


def load_live(folder: Path, how: recipe.Recipe, device: Device, adapter: Path | None) -> PreTrainedModel:
    """The model as it was trained: the 4-bit base with the adapter on it, or the base alone; for inference.

    The 4-bit weights are dequantized once: the same numbers that every 4-bit forward would unpack again for each token.
    """
    base = load_base(folder, how, device)
    if how.quantization.load_in_4bit:
        dequantize(base)
    if adapter is not None:
        base = _with_adapter(base, folder, adapter)
    base.config.use_cache = True
    return base.eval()


def _with_adapter(base: PreTrainedModel, folder: Path, adapter: Path) -> PreTrainedModel | PeftModel:
    from peft import PeftModel

    provenance.check_adapter(adapter, folder)
    if several.is_several(adapter):
        return several.put_on(base, adapter)
    _resize(base, adapter)
    with targets.patterns_of_parameters():
        live = PeftModel.from_pretrained(base, str(adapter))
    added_tokens.settle(live)
    return live


def _resize(base: PreTrainedModel, adapter: Path) -> None:
    """Give the embedding as many rows as the adapter's own has, where it holds one."""
    held = tensor_specs(adapter / deltas.WEIGHTS).get(f"{deltas.PREFIX}{added_tokens.names(base)[0]}.weight")
    if held and held["shape"][0] != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(held["shape"][0], mean_resizing=False)


def dequantize(model: PreTrainedModel) -> None:
    """Put an ordinary bf16 Linear in the place of every 4-bit one; of a model that was loaded by `load_base`, so that none is packed anew."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state).to(torch.bfloat16)
            plain = torch.nn.Linear(
                module.in_features, module.out_features, bias=False, device="meta", dtype=torch.bfloat16
            )
            plain.weight = torch.nn.Parameter(weight, requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(name, plain)


def quantized_names(model: PreTrainedModel) -> list[str]:
    """Names of the weights that are held in 4 bit, as the checkpoint names them."""
    from bitsandbytes.nn import Linear4bit

    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)]
