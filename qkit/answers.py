"""A model's own greedy answers to the held-out prompts, and which of them are right."""

from __future__ import annotations

from dataclasses import dataclass

from qkit import model, scoring
from qkit.run import Run, read_json
from qkit.runtime import Runtime
from qkit.scoring import HeldOut
from qkit.task import open_task


@dataclass(frozen=True)
class Answers:
    """One of each per held-out row: the tokens that were generated, their text, and whether the task has it right."""

    token_ids: tuple[list[int], ...]
    texts: tuple[str, ...]
    right: tuple[bool, ...]


def answered(run: Run, runtime: Runtime, held_out: HeldOut, what: str = "generate") -> Answers:
    """Ask the model that is open, as the run's recipe says; `what` names the progress bar."""
    section = run.recipe.evaluate
    stop = frozenset(read_json(run.need("data", "tokens.json"))["stop"])
    prompts = [row.prompt for row in held_out.rows]
    with run.progress.bar(what, len(prompts)) as bar:
        completions = runtime.generate(prompts, section.max_new_tokens, stop, section.batch_size, bar.advance)
    texts = model.tokenizer_of(run.recipe.model).batch_decode(completions, skip_special_tokens=True)
    right = scoring.grade(texts, held_out, open_task(run.recipe.task), section)
    return Answers(tuple(completions), tuple(texts), tuple(right))
