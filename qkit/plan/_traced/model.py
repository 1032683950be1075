"""Builds the model that a recipe trains, without its weights: on torch's meta device, then with fake tensors in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError
from qkit.model import added_tokens
from qkit.model.adapters import methods, new_heads, starts
from qkit.model.load import HEAD_KEY, set_dropout
from qkit.plan._traced import kernels
from qkit.plan._traced.head import NewHead
from qkit.plugins.task import open_task
from qkit.recipe.labels import Head
from qkit.recipe.schema import WHOLE, Recipe

if TYPE_CHECKING:
    import torch

NO_SDPA = "scaled_dot_product_attention"  # in transformers' error for a model without this attention


def weights_dtype(recipe: Recipe, head: NewHead) -> str:
    """The dtype of the base model in training: that of its checkpoint if it is frozen and training computes in bf16, else fp32."""
    if open_task(recipe.task).HEAD.generates:  # as load.py has it: the checkpoint's where its own weights are trained
        return "float32" if not recipe.train.bf16 else head.dtype if recipe.method in WHOLE else "bfloat16"
    return head.dtype if recipe.train.bf16 and recipe.method not in WHOLE else "float32"


def built(recipe: Recipe, head: NewHead, layers: int | None = None) -> Any:
    """The model as the trainer has it, on the meta device: with what recipe.method trains, in fp32, and 4-bit layers if the recipe says so.

    `layers`: how many of its layers it has; None: all.

    Raises:
        ModelError: transformers has no such model with this head, or the method has no place in it.
    """
    model = _bare(recipe, head, layers)
    set_dropout(model, recipe.head)
    generates = open_task(recipe.task).HEAD.generates
    new = () if generates else new_heads.of(model, head.folder)
    if recipe.quantization.load_in_4bit:
        kernels.quantize(model, added_tokens.names(model)[1:] if generates else new, recipe.quantization)
    rows = len(set(recipe.model.add_tokens))
    size = int(model.config.get_text_config().vocab_size)
    trained = methods.with_method(model, new, recipe, range(size - rows, size))
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if recipe.method == "lora" and recipe.lora.takes_part_of_base:
        starts.widen(trained)
    return trained


def with_fakes(model: Any) -> Any:
    """The same model with fake tensors on the CPU; called inside a FakeTensorMode. A tensor that two modules share stays shared."""
    import torch

    fakes: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> Any:
        key = id(tensor)
        if key not in fakes:
            data = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            fakes[key] = torch.nn.Parameter(data, requires_grad=tensor.requires_grad) if is_parameter else data
        return fakes[key]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)
    return model


def layers_of(recipe: Recipe, head: NewHead) -> int | None:
    """The number of layers, if the config does not tell some of them from others; else None."""
    text = _config(recipe, head).get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    kinds = getattr(text, "layer_types", None) or ()
    return layers if isinstance(layers, int) and len(set(kinds)) < 2 else None


def _bare(recipe: Recipe, head: NewHead, layers: int | None) -> Any:
    """The base model and its new head; with eager attention if it has no other."""
    import torch
    import transformers

    config, section = _config(recipe, head), recipe.head
    if layers is not None:
        _shorten(config.get_text_config(), layers)
    pools = section.pooling is not None or hasattr(config, HEAD_KEY)
    model_class = _pooled_class() if pools else getattr(transformers, open_task(recipe.task).HEAD.auto_class)
    build = model_class._from_config if pools else model_class.from_config
    options = {
        "dtype": getattr(torch, weights_dtype(recipe, head)),
        **({} if pools else {"trust_remote_code": recipe.model.trust_remote_code}),
        "attn_implementation": recipe.model.attn_implementation,
    }
    try:
        with torch.device("meta"):
            try:
                return build(config, **options)
            except ValueError as error:
                if recipe.model.attn_implementation != "sdpa" or NO_SDPA not in str(error):
                    raise
                return build(config, **{**options, "attn_implementation": "eager"})
    except (ValueError, ImportError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        message = f"{head.source}: transformers cannot build {model_class.__name__} of this model: {reason}"
        raise ModelError(message, source=head.source) from error


def _config(recipe: Recipe, head: NewHead) -> Any:
    """The model's config with the labels, a padding token, and a row of the embedding for each added token."""
    import transformers

    if head.folder is not None:
        config = transformers.AutoConfig.from_pretrained(
            str(head.folder), trust_remote_code=recipe.model.trust_remote_code
        )
    else:
        settings = head.settings
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    names = [f"label {number}" for number in range(head.labels)]
    for key, value in open_task(recipe.task).head_config(names).items():
        setattr(config, key, value)
    _set_head(config, recipe.head)
    text = config.get_text_config()
    config.pad_token_id = text.pad_token_id = text.pad_token_id or 0
    text.vocab_size += len(set(recipe.model.add_tokens))
    return config


def _shorten(config: Any, layers: int) -> None:
    """Leave so many layers."""
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config.num_hidden_layers = layers


def _set_head(config: Any, section: Head) -> None:
    """Put a head that pools into the config, if the recipe wants one."""
    if section.pooling is not None and not hasattr(config, HEAD_KEY):
        default = getattr(config, "hidden_dropout_prob", 0.0)
        dropout = default if section.dropout is None else section.dropout
        setattr(config, HEAD_KEY, {**section.model_dump(), "dropout": dropout})


def _pooled_class() -> Any:
    from qkit.model.pooled_head import PooledForSequenceClassification

    return PooledForSequenceClassification
