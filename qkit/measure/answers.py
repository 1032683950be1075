"""Generates and grades a model's greedy answers to the held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass

from qkit.core.files import read_json
from qkit.measure import scores
from qkit.measure.held_out import HeldOut
from qkit.model import tokenizer
from qkit.plugins.runtime import Runtime
from qkit.plugins.task import open_task
from qkit.run.directory import Run


@dataclass(frozen=True)
class Answers:
    """For each held-out row: the generated tokens, their text, and whether the task counts the answer as right."""

    token_ids: tuple[list[int], ...]
    texts: tuple[str, ...]
    right: tuple[bool, ...]


def answered(run: Run, runtime: Runtime, held_out: HeldOut, what: str = "generate") -> Answers:
    """Generate answers to the held-out prompts with an open model and grade them, by the recipe's settings. `what`: progress bar label."""
    section = run.recipe.evaluate
    stop = frozenset(read_json(run.need("data", "tokens.json"))["stop"])
    task = open_task(run.recipe.task)
    with run.progress.bar(what, len(held_out.rows)) as bar:
        completions = task.predict(runtime, held_out.rows, stop, section, bar.advance)
    texts = tokenizer.tokenizer_of(run.recipe.model).batch_decode(completions, skip_special_tokens=True)
    right = scores.grade(texts, held_out, task, section)
    return Answers(tuple(map(list, completions)), tuple(texts), tuple(right))
