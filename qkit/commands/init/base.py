"""The base model of a first recipe, where the user names none; and what a named one needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qkit.core.device import Device
from qkit.core.errors import DataError, ModelError
from qkit.core.figures import gib
from qkit.plan import gpus
from qkit.plan import plan as plan_plan
from qkit.plugins.example import Conversation, Example
from qkit.plugins.first_recipe import Base, Chosen
from qkit.plugins.task import Task, open_task
from qkit.recipe import schema
from qkit.recipe.load import from_dict

ROOM = 0.9  # the share of the memory that training of a model which nobody chose may take
MARKERS = ("<|im_start|>", "<|im_end|>")  # of turns, in the template chatml


def base_for(task: str, device: Device, longest: int) -> Base:
    """The task's model for any machine; on a GPU the largest of its larger ones whose stages fit. `longest`: tokens of a row."""
    start = open_task(task).START
    for source in start.larger if device.has_gpu else ():
        if (peak := _peak_of(task, source, device, longest)) is not None:
            memory = f"training needs {gib(peak)} of the {gib(gpus.usable_bytes(device))} on {gpus.title(device)}"
            return Base(source, f"the largest of {len(start.larger)} sizes of which every stage fits: {memory}")
    return start.base


def _peak_of(task: str, source: str, device: Device, longest: int) -> int | None:
    """Bytes that training takes at its peak; None if it does not fit with room to spare, or if another stage does not."""
    data = {"train": [{"source": "rows.jsonl"}], "max_length": longest, "batch_tokens": max(2048, longest)}
    raw = {"task": task, "model": {"source": source}, "data": data, "export": {"formats": ["vllm"]}}
    stages = plan_plan.stages(from_dict({**raw, "bench": {"runtimes": []}}, (), "qkit init"), device)
    peak = next(stage.peak_bytes for stage in stages if stage.stage == "train")
    return peak if all(stage.fits for stage in stages) and peak <= ROOM * gpus.usable_bytes(device) else None


def named(source: str) -> Base:
    """A base model that the user names."""
    return Base(source, "named on the command line")


def section(base: Base, task: Task, examples: Sequence[Example]) -> dict[str, Chosen]:
    """The section `model`: the source, and a chat template where the model's own does not do for the conversations."""
    values: dict[str, Chosen] = {"source": (base.source, base.why)}
    if base.sha256:
        values["sha256"] = (base.sha256, "of the package that holds it")
    with_tools = any(isinstance(example, Conversation) and _has_tools(example) for example in examples)
    if task.HEAD.generates and (with_tools or base != task.START.base):
        values |= _template(base, with_tools)
    return values


def _has_tools(conversation: Conversation) -> bool:
    return bool(conversation.tools) or any(turn.get("tool_calls") for turn in conversation.messages)


def _template(base: Base, with_tools: bool) -> dict[str, Chosen]:
    """A template that ships with qkit, if the model has none, or none that shows tools; nothing if the model cannot be had."""
    from qkit.model.tokenizer import with_added_tokens

    try:
        tokenizer = with_added_tokens(schema.Model(source=base.source, sha256=base.sha256))
    except (ModelError, DataError, ModuleNotFoundError):
        return {}
    own = str(tokenizer.chat_template or "")
    if own and not (with_tools and "tool" not in own):
        return {}
    if not with_tools:
        return {"chat_template": ("plain", "the model has none; this one writes turns in plain words")}
    why = "it shows tools, which the model's own leaves out" if own else "the model has none; this one shows tools"
    lacking = [token for token in MARKERS if token not in tokenizer.get_vocab()]
    added = {"add_tokens": (lacking, "that the template writes; their embeddings are trained")} if lacking else {}
    return {"chat_template": ("chatml", why), **added}


def longest_row(raw: Mapping[str, Any]) -> int | None:
    """The most tokens that the model's config allows; None if it says nothing, or cannot be had."""
    from qkit.model.tokenizer import max_positions

    try:
        return max_positions(schema.Model(**raw["model"]))
    except (ModelError, DataError):
        return None
