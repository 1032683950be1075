"""Loads models: the base, optionally in 4 bit, and the reference model (base + adapter as trained)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qkit.core.errors import ModelError
from qkit.core.files import read_json
from qkit.model import added_tokens, provenance, tokenizer
from qkit.model.adapters import new_heads, targets
from qkit.model.adapters import sums as adapter_sum
from qkit.model.adapters.bottleneck import tuner
from qkit.model.source import dequantize
from qkit.plugins.task import Losses, ModelHead, open_task, read_labels
from qkit.recipe import schema
from qkit.tensors import lora_deltas
from qkit.tensors.nf4_roundtrip import FourBit
from qkit.tensors.shards import tensor_specs

if TYPE_CHECKING:
    import torch
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel
    from transformers import PreTrainedModel

    from qkit.core.device import Device
    from qkit.recipe.labels import Head


log = logging.getLogger(__name__)
NO_SDPA = "scaled_dot_product_attention"  # in transformers' error for a model without this attention
HEAD_KEY = "pooled_head"  # in the config.json of a model with a head that pools (pooled_head.py)


def load_base(
    folder: Path, recipe: schema.Recipe, device: Device, labels: Sequence[str] = (), trained: bool = False
) -> PreTrainedModel:
    """Load the base model as training uses it: in 4 bit if the recipe says so, the rest in bf16, or as it is under a new head.

    `labels`: names by label id, for a task whose head is new; the head's first weights depend on the recipe's seed. `trained`: the folder holds
    what training made of all weights, which are in fp32.

    Raises:
        ModelError: some weights are missing from the folder.
    """
    head = open_task(recipe.task).HEAD
    options: dict[str, Any] = {
        "attn_implementation": recipe.model.attn_implementation,
        **_of_head(recipe, labels, trained),
    }
    if recipe.quantization.load_in_4bit:
        options["quantization_config"] = quantization_config(recipe.quantization, new_heads.names_of(folder, head))
    options |= {"device_map": device.device_map, "trust_remote_code": recipe.model.trust_remote_code}
    options["output_loading_info"] = True
    loaded, report = _loaded(_opener(folder, recipe), folder, options)
    if head.generates:
        _need_all_weights(folder, [name for name in report["missing_keys"] if name.endswith(".weight")])
    else:
        _need_all_weights(folder, report["missing_keys"], new_heads.of(loaded, folder))
        of_labels: Losses = cast(Losses, open_task(recipe.task))
        of_labels.add_to_head(loaded, folder, recipe)
    if head.generates:
        loaded.config.use_cache = False
    leave_as_quantized(loaded)
    if recipe.quantization.load_in_4bit and device.frees_through_malloc:
        _unmap_files(loaded)
    return loaded


def _of_head(recipe: schema.Recipe, labels: Sequence[str], trained: bool) -> dict[str, Any]:
    """The arguments of `from_pretrained` that depend on the task's head; the first weights of a new one depend on the recipe's seed."""
    import torch
    import transformers

    task = open_task(recipe.task)
    if task.HEAD.generates:
        # Not from its file, which transformers may reject; qkit sets decoding itself.
        return {"dtype": _dtype(recipe, trained), "generation_config": transformers.GenerationConfig()}
    transformers.set_seed(recipe.seed)
    dtype = "auto" if _stays_in_16_bit(recipe) else torch.float32
    return {"dtype": dtype, "pad_token_id": tokenizer.padding_of(recipe.model), **task.head_config(labels)}


def _dtype(recipe: schema.Recipe, trained: bool) -> Any:
    """The dtype of a language model. Where its own weights are trained, they start as the checkpoint has them; the trainer makes fp32 of those
    that it trains, and the others keep every bit."""
    import torch

    if recipe.method not in schema.WHOLE:
        return torch.bfloat16
    return "auto" if recipe.train.bf16 and not trained else torch.float32


def class_of(folder: Path, head: ModelHead) -> Any:
    """The class that opens a model folder with this head: one of transformers, or that of a head that pools."""
    import transformers

    if head.generates or HEAD_KEY not in read_json(folder / "config.json"):
        return getattr(transformers, head.auto_class)
    from qkit.model.pooled_head import PooledForSequenceClassification

    return PooledForSequenceClassification


def _opener(folder: Path, recipe: schema.Recipe) -> Callable[..., Any]:
    """What opens the base model, or a trained one, with the head that the recipe wants.

    Raises:
        ModelError: the base has a head that pools, and the recipe wants another one.
    """
    model_class = class_of(folder, open_task(recipe.task).HEAD)
    stored = {} if recipe.head.pooling is None else read_json(folder / "config.json").get(HEAD_KEY)
    if stored is None:
        return partial(_pooled, recipe.head)
    wanted = recipe.head.model_dump(exclude={"dropout"})
    if stored and any(stored[name] != value for name, value in wanted.items()):
        raise ModelError(
            f"{folder}: the model has a head of its own with {_listed(stored)}; the recipe's section head says {_listed(wanted)}: make "
            "them the same, or use the model that it was trained from",
            source=folder,
        )
    return partial(_with_dropout, model_class.from_pretrained, recipe.head)


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name != "dropout")


def _with_dropout(open_folder: Callable[..., Any], section: Head, folder: str, **options: Any) -> Any:
    """A model whose own head has the dropout of the recipe, and the report on its weights."""
    model, report = open_folder(folder, **options)
    set_dropout(model, section)
    return model, report


def set_dropout(model: PreTrainedModel, section: Head) -> None:
    """Set the dropout of the head, if the recipe has one.

    Configurations name it in many ways, and some have a name that their head does not read: it is set where the head has it.

    Raises:
        ModelError: the head has no dropout.
    """
    import torch

    if section.dropout is None:
        return
    body = f"{model.base_model_prefix}."
    modules = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Dropout) and not name.startswith(body)
    ]
    if not modules:
        raise ModelError(
            f"head.dropout={section.dropout}: the head of a {type(model).__name__} has no dropout; remove it, or where a text has one label "
            "set head.pooling, which gives the model a head that has"
        )
    for module in modules:
        module.p = section.dropout


def _pooled(section: Head, folder: str, **options: Any) -> Any:
    """The body of a model under a new head that pools; and the report on its weights."""
    from transformers import AutoConfig, AutoModel

    from qkit.model.pooled_head import PooledForSequenceClassification, without_pooler

    config = AutoConfig.from_pretrained(folder, trust_remote_code=options.get("trust_remote_code", False))
    body, report = AutoModel.from_pretrained(folder, **options, **without_pooler(config))
    default = getattr(config, "hidden_dropout_prob", 0.0)
    dropout = default if section.dropout is None else section.dropout
    setattr(body.config, HEAD_KEY, {**section.model_dump(), "dropout": dropout})
    model = PooledForSequenceClassification(body.config, body)
    for name in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "quantization_method"):
        if hasattr(body, name):
            setattr(model, name, getattr(body, name))
    return model, report


def _loaded(
    open_folder: Callable[..., Any], folder: Path, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The model, and transformers' report on its weights; with eager attention where the model has no other.

    Raises:
        ModelError: the shapes of the weights do not match.
    """
    loaded: tuple[PreTrainedModel, Mapping[str, Any]]
    try:
        loaded = open_folder(str(folder), **options)
    except ValueError as error:
        if options["attn_implementation"] != "sdpa" or NO_SDPA not in str(error):
            raise
        log.warning("transformers supports only eager attention for this model: %s", error)
        loaded = open_folder(str(folder), **{**options, "attn_implementation": "eager"})
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error) or "id2label" not in options:
            raise
        raise ModelError(
            f"{folder}: its weights do not have the shapes that config.json and {len(options['id2label'])} labels need; if it has a head for "
            "other labels, use the model that it was trained from",
            source=folder,
        ) from None
    return loaded


def _stays_in_16_bit(recipe: schema.Recipe) -> bool:
    """Whether a base under a new head keeps the dtype of its checkpoint: frozen, and computed under autocast. The head is fp32, and would be
    rounded as part of a whole 16-bit model."""
    return recipe.train.bf16 and recipe.method not in schema.WHOLE


def _need_all_weights(folder: Path, missing_keys: Collection[str], new: Sequence[str] = ()) -> None:
    """Raise ModelError if weights outside the modules `new` are missing: transformers would initialize them at random."""
    starts = tuple(f"{name}." for name in new)
    if missing := sorted(name for name in missing_keys if not name.startswith(starts)):
        raise ModelError(
            f"{folder}: the weights lack {missing[0]} and {len(missing) - 1} more, which would be initialized at random; create the folder "
            "again, or if the missing head is tied to the embedding, set tie_word_embeddings to true in config.json",
            source=folder,
        )


def _unmap_files(model: PreTrainedModel) -> None:
    """Copy the tensors that were not quantized: as loaded they are views, and one view keeps the whole 16-bit file mapped."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()


def leave_as_quantized(model: PreTrainedModel, also_packable: bool = True) -> None:
    """Keep bitsandbytes from repacking its 4-bit weights, in evaluation as in training.

    On a CPU with AVX512-BF16 it repacks them permanently at the first forward pass in evaluation mode without gradients. Widths that are not
    a multiple of the pack size fail then; state_dict, which saving an adapter calls, unpacks them incorrectly; and dequantizing reads them
    incorrectly. `also_packable` False: only the weights that it cannot pack.
    """
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit) and (also_packable or not _can_be_packed(module)):
            module.support_avx512bf16_for_cpu = False


def _can_be_packed(layer: Linear4bit) -> bool:
    """Whether the weight divides into bitsandbytes' packs of 32 rows of whole quantization blocks."""
    return bool(layer.out_features % 32 == 0 and layer.in_features % FourBit.BLOCK == 0)


def quantization_config(section: schema.Quantization, skipped: Sequence[str] = ()) -> Any:
    """The recipe's section as transformers' BitsAndBytesConfig. `skipped`: modules that stay as they are, such as a new head."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**section.model_dump(), llm_int8_skip_modules=list(skipped) or None)


def load_reference(folder: Path, recipe: schema.Recipe, device: Device, trained: Path | None) -> PreTrainedModel:
    """Load the reference model, as it was trained, for inference; without `trained`, the base alone.

    `trained`: an adapter, or a whole model.

    4-bit weights are dequantized once: the values are those that each 4-bit forward pass would compute again.

    Raises:
        MissingArtifact: `trained` was not made by qkit.
        ModelError: weights are missing, or the adapter was trained on another base.
    """
    import torch

    if trained is not None and provenance.is_whole(trained):
        provenance.check_adapter(trained, folder)
        whole = load_base(trained, recipe, device, read_labels(trained), trained=True)
        if open_task(recipe.task).HEAD.generates:
            whole.config.use_cache = True
        return whole.eval()
    base = load_base(folder, recipe, device, read_labels(trained) if trained else ())
    if recipe.quantization.load_in_4bit:
        dequantize(base)
        if not (open_task(recipe.task).HEAD.generates or recipe.train.bf16):
            torch.nn.Module.float(
                base
            )  # 4-bit layers take fp32 activations; transformers refuses its own `float` after quantization
    if trained is not None:
        base = _with_adapter(base, folder, trained, recipe.method)
    if open_task(recipe.task).HEAD.generates:
        base.config.use_cache = True
    return base.eval()


def _with_adapter(
    base: PreTrainedModel, folder: Path, adapter: Path, method: schema.Method
) -> PreTrainedModel | PeftModel:
    from peft import PeftModel

    provenance.check_adapter(adapter, folder)
    if adapter_sum.is_several(adapter):
        return adapter_sum.put_on(base, adapter)
    _resize(base, adapter)
    if method in schema.BOTTLENECKS:
        tuner.register()
    with targets.patterns_of_parameters():
        model = new_heads.with_token_types(PeftModel.from_pretrained(base, str(adapter)))
    if method == "peft":
        _in_full_precision(model, adapter)
    else:
        added_tokens.settle(model)
    return model


def _in_full_precision(model: PeftModel, adapter: Path) -> None:
    """Hold an adapter as it was saved. PEFT rounds what it loads into copies of 16-bit modules, such as norms that are trained."""
    import torch
    from peft import set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import load_file

    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        for part in (getattr(layer, name, None) for name in layer.adapter_layer_names):
            if isinstance(part, torch.nn.Module):
                part.float()
    set_peft_model_state_dict(model, load_file(adapter / lora_deltas.WEIGHTS))


def _resize(base: PreTrainedModel, adapter: Path) -> None:
    """Resize the embedding to that of the adapter, if the adapter has one."""
    spec = tensor_specs(adapter / lora_deltas.WEIGHTS).get(f"{lora_deltas.PREFIX}{added_tokens.names(base)[0]}.weight")
    if spec and spec["shape"][0] != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(spec["shape"][0], mean_resizing=False)


def scaled(model: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    """Apply the model family's scaling to the logits: Cohere and Granite scale them, Gemma 2 bounds them. Same shape."""
    config = model.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * (logits / cap).tanh()
    return logits
