"""The mask on the surface formats of eight families: golden files, rewritten with QKIT_UPDATE_GOLDEN=1, show what is learnt in brackets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.data_traps.models import FAMILIES, TEMPLATES, Tiny, build, tokenizer_of
from helpers.data_traps.prepared import prepare_rows
from qkit.chat.template import Renderer, renderer, special_tokens
from qkit.core.batching import IGNORED
from qkit.plugins.example import Conversation
from qkit.recipe.schema import Data
from qkit.tasks._conversation.checks import of_rows
from qkit.tasks._conversation.checks.of_rows import spans
from qkit.tasks._conversation.encode import tokenize
from qkit.tasks._conversation.rows import EncodedRow

TOOL = {
    "type": "function",
    "function": {"name": "temperature", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "temperature", "arguments": {"city": "Bern"}}}
SPOKEN = Conversation(
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A model.", "reasoning_content": "They ask for a name."},
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four.", "reasoning_content": "Add them."},
    )
)
CALLING = Conversation(
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it cold in Bern?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "-3"},
        {"role": "assistant", "content": "Yes, -3 degrees."},
        {"role": "user", "content": "Thanks!"},
        {"role": "assistant", "content": "You are welcome."},
    ),
    tools=(TOOL,),
)
CONVERSATIONS = {"spoken": SPOKEN, "calling": CALLING}
ENDS = {
    "chatml": "<|im_end|>",
    "llama2": "</s>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "phi": "<|end|>",
    "qwen3": "<|im_end|>",
    "deepseek": "<｜end▁of▁sentence｜>",
}


@pytest.fixture(scope="session")
def readers() -> dict[str, Renderer]:
    return {name: renderer(tokenizer_of(model)) for name, model in FAMILIES.items()}


def golden(reader: Renderer) -> Iterator[str]:
    """Every conversation under every data.loss, as text."""
    facts = of_rows.facts(reader, len(reader.tokenizer))
    for name, conversation in CONVERSATIONS.items():
        for loss in ("completion", "assistant", "all"):
            yield f"=== {name}, data.loss={loss}"
            [result] = tokenize(reader, [conversation], Data(loss=loss))
            if result.error is not None:
                yield f"--- left out ({result.error.rule}): {result.error}"
                continue
            for row in result.rows:
                yield bracketed(reader, row)
                found = of_rows.examine(reader, facts, row, loss, closely=True)
                yield from (f"--- {check}: {words}" for check, words in found)


def bracketed(reader: Renderer, row: EncodedRow) -> str:
    decode = reader.tokenizer.decode
    text, at = "", 0
    for begin, end in spans(row.labels):
        text += f"{decode(row.input_ids[at:begin])}⟦{decode(row.input_ids[begin:end])}⟧"
        at = end
    return text + decode(row.input_ids[at:])


@pytest.mark.parametrize("family", FAMILIES)
def test_masks(family: str, readers: dict[str, Renderer]) -> None:
    file = TEMPLATES / f"{family}.golden.txt"
    made = "\n".join(golden(readers[family])) + "\n"
    if os.environ.get("QKIT_UPDATE_GOLDEN"):
        file.write_text(made, encoding="utf-8")
    assert made == file.read_text(encoding="utf-8")


def taken(reader: Renderer, loss: str) -> Iterator[tuple[Conversation, list[EncodedRow]]]:
    """The conversations that a family takes, with their rows."""
    for conversation in CONVERSATIONS.values():
        [result] = tokenize(reader, [conversation], Data(loss=loss))
        if result.error is None:
            yield conversation, list(result.rows)


@pytest.mark.parametrize("loss", ["completion", "assistant", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_begins_with_the_prompt_that_a_server_sends(family: str, loss: str, readers: dict[str, Renderer]) -> None:
    reader = readers[family]
    rows = [row for _, made in taken(reader, loss) for row in made]
    assert rows
    for row in rows:
        prompt = reader.tokenizer.apply_chat_template(
            list(row.messages),
            tools=list(row.tools) or None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        assert list(row.input_ids[: row.start]) == prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_is_learnt_once(family: str, readers: dict[str, Renderer]) -> None:
    for conversation, rows in taken(readers[family], "assistant"):
        turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        assert sorted(turn for row in rows for turn in row.turns) == turns
        assert [len(spans(row.labels)) for row in rows] == [len(row.turns) for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_ends_with_the_token_that_ends_the_turn(family: str, readers: dict[str, Renderer]) -> None:
    reader = readers[family]
    tokens = special_tokens(reader, None, len(reader.tokenizer))
    end = reader.tokenizer.convert_tokens_to_ids(ENDS[family])
    assert tokens["end_of_turn"] == end and end in tokens["stop"] and tokens["pad"] not in tokens["stop"]
    for _, rows in taken(reader, "completion"):
        assert [(row.input_ids[-1], row.labels[-1]) for row in rows] == [(end, end)] * len(rows)


MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_markers_in_a_template_give_the_same_mask() -> None:
    tokenizer = tokenizer_of(Tiny(MARKED))
    [result] = tokenize(renderer(tokenizer), [SPOKEN], Data(loss="assistant"))
    [row] = result.rows
    marked: Any = tokenizer.apply_chat_template(
        list(SPOKEN.messages), return_dict=True, tokenize=True, return_assistant_tokens_mask=True
    )
    length = len(row.input_ids)
    assert marked["input_ids"][:length] == list(row.input_ids)
    assert marked["assistant_masks"][:length] == [int(label != IGNORED) for label in row.labels]
    assert not any(marked["assistant_masks"][length:])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_wrong_with_a_plain_question(family: str, tmp_path: Path) -> None:
    """A family that is set up right makes no check fire."""
    model = build(FAMILIES[family], tmp_path / "model")
    train = [{"prompt": f"Question {word}?", "completion": f"Answer {word}."} for word in ("one", "two", "three")]
    made = prepare_rows(model, tmp_path / "made", train, [{"prompt": "Which?", "completion": "This one."}])
    assert made.suspicious == {}
