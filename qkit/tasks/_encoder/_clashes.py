"""Values of a valid recipe that a task with labels cannot have: of training, of the method, and of the head."""

from __future__ import annotations

from collections.abc import Iterator

from qkit.plugins.task import ModelHead
from qkit.recipe.schema import WHOLE, Recipe


def clashes(recipe: Recipe, head: ModelHead) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Conflicts, as (key, message)."""
    yield from _of_train(recipe)
    yield from _of_method(recipe)
    yield from _of_head(recipe, head)


def _of_train(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    train, for_chats = recipe.train, f"is for conversations: for task={recipe.task}"
    if factor := train.label_smoothing_factor:
        key, text = "label_smoothing_factor", f"{factor:g} {for_chats} set loss.label_smoothing={factor:g}"
        yield ("train", key), f"train.{key}={text}"
    if train.loss_type != "nll":
        yield (
            ("train", "loss_type"),
            f"train.loss_type={train.loss_type} {for_chats} see the section loss",
        )


def _of_method(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What the method needs, or cannot have."""
    if recipe.method == "peft" and not isinstance(recipe.peft.get("peft_type"), str):
        yield ("peft",), "method=peft needs peft.peft_type, the kind of adapter, such as IA3 or VERA"
    if recipe.model.add_tokens and recipe.method not in ("lora", "full"):
        yield (
            ("model", "add_tokens"),
            f"model.add_tokens: method={recipe.method} does not train their embeddings; use method=lora or full, or remove it",
        )
    if recipe.method in WHOLE and recipe.quantization.load_in_4bit:
        yield (
            ("method",),
            f"method={recipe.method} saves a whole model, whose weights cannot be trained or saved in 4 bit: set "
            "quantization.load_in_4bit=false, or method=lora",
        )


def _of_head(recipe: Recipe, head: ModelHead) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Settings of the head that nothing reads, or that this head cannot have."""
    section = recipe.head
    if section.pooling is not None and head.peft_task_type != "SEQ_CLS":
        yield (
            ("head", "pooling"),
            f"head.pooling={section.pooling} makes one state of a text, and task={recipe.task} needs one for each token: remove it",
        )
    for name in ("layers", "activation"):
        if section.pooling is None and getattr(section, name) != type(section).model_fields[name].default:
            yield (
                ("head", name),
                f"head.{name}={getattr(section, name)} belongs to qkit's own head: set head.pooling, or remove it",
            )
