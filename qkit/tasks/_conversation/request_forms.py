"""What users send that rows seldom hold as it is sent: text in parts, an earlier answer with its calls and their results, nulls.

Each is made of a held-out conversation, in the form of OpenAI's API, and is what training reads as a record as well: so training's own
prompt for it is at hand, to be held against a server's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qkit.chat.conversation import text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NEXT = {"role": "user", "content": "And now?"}
CALL_ID = "call00000"  # nine letters and digits, as Mistral's templates want it


@dataclass(frozen=True)
class RequestForm:
    """One way to write a request. `description`: what is special in it."""

    description: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None


def forms(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Iterator[RequestForm]:
    """The forms that a conversation is tried in. `messages`: as OpenAI's API has them."""
    given = tools or None  # written as null
    system = [] if messages[0]["role"] in ("system", "developer") else ["system", "developer"]
    yield RequestForm("text in parts", [{**turn, "content": _parts(turn)} for turn in messages], given)
    yield RequestForm(
        "a question in two parts", [*messages[:-1], {**messages[-1], "content": _parts(messages[-1], NEXT)}], given
    )
    yield RequestForm("an earlier call and its result", [*messages, *_called(tools), NEXT], given)
    answer = {"role": "assistant", "content": "So.", "reasoning": "It is so.", "tool_calls": []}
    yield RequestForm("an earlier answer with its thinking", [*messages, answer, NEXT], given)
    for role in system:
        yield RequestForm(f"a {role} turn in parts", [{"role": role, "content": _parts(NEXT, NEXT)}, *messages], given)


def _parts(*turns: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text_of(turn.get("content"))} for turn in turns]


def _called(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    name = tools[0]["function"]["name"] if tools else "look"
    call = {"id": CALL_ID, "type": "function", "function": {"name": name, "arguments": '{"b": 1, "a": null}'}}
    result = {"role": "tool", "tool_call_id": CALL_ID, "content": [{"type": "text", "text": "3"}]}
    return [{"role": "assistant", "content": None, "tool_calls": [call]}, result]


def trained(tokenizer: PreTrainedTokenizerBase, form: RequestForm, variables: Mapping[str, Any]) -> list[int] | None:
    """The ids that training makes of a record with these turns; None where it leaves such a record out."""
    from qkit.chat import template
    from qkit.plugins.example import RowError
    from qkit.recipe.schema import Data
    from qkit.tasks._conversation.turns import Notes, tools_of, turns_of

    notes = Notes(Data())
    try:
        turns = [turn for turn, _ in turns_of(list(form.messages), "messages", notes)]
        tools = tuple(tools_of(form.tools, notes))
        text = template.render(tokenizer, turns, tools, answered=False, variables=variables)
    except (RowError, template.TemplateRefusal):
        return None
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
