"""How pairs of answers, and rated answers, are told by their columns, and what their first recipe starts with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qkit.plugins.first_recipe import CERTAIN, ONLY, Chosen, Size, Suggestion, Table
from qkit.tasks._conversation._first_recipe import START, of_conversations, settings
from qkit.tasks._preference.rated import LABEL, TRUTH
from qkit.tasks._preference.reading import PROMPT, SIDES
from qkit.tasks._preference.recipes import RATE_OF_AN_ADAPTER

PROMPTS = (PROMPT, "question", "query", "instruction", "input")
RATINGS = (LABEL, "desirable", "liked", "rating", "feedback", "thumbs_up", "good")


def of_pairs(table: Table) -> Suggestion | None:
    """A chosen and a rejected answer, with their prompt beside them or in them."""
    sides = {side: table.named((side,)) for side in SIDES}
    names = {side: column.name for side, column in sides.items() if column is not None}
    if len(names) < len(SIDES):
        return None
    prompt = table.named(PROMPTS)
    columns = {**({PROMPT: prompt.name} if prompt else {}), **names}
    return Suggestion(ONLY, f"{' and '.join(names.values())} are two answers to one prompt", columns)


def of_ratings(table: Table) -> Suggestion | None:
    """A conversation, and whether its answer is good."""
    label = table.named(RATINGS)
    if label is None or len(label.counts) != 2 or not all(value.lower() in TRUTH for value in label.counts):
        return None
    rest = [{name: value for name, value in record.items() if name != label.name} for record in table.records]
    conversation = of_conversations(Table(rest))
    if conversation is None or conversation.sure < CERTAIN or conversation.data:
        return None
    why = f"{conversation.why}; {label.name} says whether the answer is good"
    return Suggestion(ONLY, why, {**conversation.columns, LABEL: label.name})


def compared_settings(size: Size) -> Mapping[str, Mapping[str, Chosen]]:
    """Those of conversations, with one pass and a rate for small changes."""
    usual = settings(size)
    rate = (RATE_OF_AN_ADAPTER, "low: a trained model is changed a little")
    epochs = (1, f"for about {size.rows:,} training rows; more passes drift from the model that it began with")
    return {**usual, "train": {**usual["train"], "learning_rate": rate, "num_train_epochs": epochs}}


COMPARED = replace(START, settings=compared_settings)
