"""Which methods of training conversations have, and what each cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from qkit.recipe.schema import Recipe

METHODS = ("lora", "full", "peft")
# Kinds of PEFT that are no change of a weight: the artifacts of a conversation are made of merged models.
UNMERGEABLE = {
    "PROMPT_TUNING": "it learns a prompt",
    "P_TUNING": "it learns a prompt",
    "PREFIX_TUNING": "it learns keys and values before the text",
    "LILY": "its change depends on the input",
    "SHADOW": "its change depends on the input",
}

Problems = Iterator[tuple[tuple[str | int, ...], str]]


def clashes(recipe: Recipe) -> Problems:
    """What the method needs, or cannot have."""
    if recipe.method not in METHODS:
        yield (
            ("method",),
            f"method={recipe.method} is for tasks with labels, and task={recipe.task} has none: use one of {', '.join(METHODS)}",
        )
    if recipe.method == "full" and recipe.quantization.load_in_4bit:
        yield (
            ("method",),
            "method=full saves a whole model, whose weights cannot be trained or saved in 4 bit: set "
            "quantization.load_in_4bit=false, or method=lora",
        )
    if recipe.method == "peft":
        yield from _of_any_adapter(recipe)
    if recipe.method != "full":
        yield from _of_frozen_weights(recipe)


def _of_frozen_weights(recipe: Recipe) -> Problems:
    """Settings of method=full, of a recipe that trains an adapter on frozen weights."""
    if recipe.layers != type(recipe.layers)():
        yield (
            ("layers",),
            f"layers divides the weights that method=full trains, and method={recipe.method} trains none: remove it",
        )
    if recipe.train.trainable:
        yield (
            ("train", "trainable"),
            f"train.trainable names weights that method=full trains, and method={recipe.method} trains none: remove it",
        )
    if not recipe.train.bf16:
        yield (
            ("train", "bf16"),
            "train.bf16=false: an adapter for conversations is trained in bf16 on 16-bit or 4-bit weights; remove it, or set method=full",
        )


def _of_any_adapter(recipe: Recipe) -> Problems:
    """Kinds of PEFT that cannot be merged, and settings that another method has."""
    kind, start = recipe.peft.get("peft_type"), str(recipe.peft.get("init_lora_weights", ""))
    if not isinstance(kind, str):
        yield ("peft",), "method=peft needs peft.peft_type, the kind of adapter, such as IA3 or VERA"
        return
    if kind in UNMERGEABLE:
        yield (
            ("peft", "peft_type"),
            f"peft.peft_type={kind}: {UNMERGEABLE[kind]}, which no weight can take up; artifacts are made of a merged model, so use IA3, or "
            "method=lora",
        )
    if start.startswith(("pissa", "olora", "corda", "loftq", "eva", "lora_ga")):
        yield (
            ("peft", "init_lora_weights"),
            f"peft.init_lora_weights={start} changes the base or reads data, which is done for method=lora with lora.init_lora_weights={start}",
        )
    if recipe.model.add_tokens:
        yield (
            ("model", "add_tokens"),
            "model.add_tokens: method=peft does not train their embeddings; use method=lora or full, or remove it",
        )
    if recipe.lora.init_from is not None:
        yield (
            ("lora", "init_from"),
            f"lora.init_from goes on with LoRA, and method=peft trains {kind}: remove one of the two",
        )
