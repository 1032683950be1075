"""Greedy answers to prompts, by a recipe's settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.plugins.runtime import Generates, TokenRow
from qkit.plugins.task import Prediction
from qkit.recipe.schema import Evaluate, Recipe


@dataclass(frozen=True)
class Answerer:
    """`stop`: the tokens that end an answer; `tokenizer`: that of training."""

    tokenizer: Any
    stop: frozenset[int]
    section: Evaluate

    def predict(
        self, runtime: Generates, rows: Sequence[TokenRow], advance: Callable[[int], None] = lambda _: None
    ) -> list[Prediction]:
        """The answer to each row's prompt, with its token ids."""
        section, prompts = self.section, [row.prompt for row in rows]
        answers = runtime.generate(prompts, section.max_new_tokens, self.stop, section.batch_size, advance)
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [Prediction(text, {"token_ids": list(ids)}) for text, ids in zip(texts, answers, strict=True)]


def open_answerer(recipe: Recipe, data: Path) -> Answerer:
    """Load the tokenizer of the recipe's model. `data`: the folder that holds tokens.json."""
    from qkit.model import tokenizer

    stop = json.loads((data / "tokens.json").read_text(encoding="utf-8"))["stop"]
    return Answerer(tokenizer.tokenizer_of(recipe.model), frozenset(stop), recipe.evaluate)
