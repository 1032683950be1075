"""A record as a pair of answers: columns `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` alone.

pair              prompt (text, or a list of turns); chosen and rejected: the answer as text, or as a list of one turn
implicit_prompt   chosen and rejected: whole conversations, which begin alike; a prompt beside them must be how they begin. A text whose turns
                  begin with "Human:" and "Assistant:", as those of hh-rlhf do, is a conversation as well
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qkit.core.errors import listed, nearest, short
from qkit.core.sequences import first_difference
from qkit.core.strict_json import decode
from qkit.plugins.example import THINKING, AnswerPair, Conversation, Reads, RowError
from qkit.recipe.schema import Data
from qkit.tasks._conversation import formats, turns
from qkit.tasks._conversation.known_names import known_names as names_of_conversations

PROMPT, CHOSEN, REJECTED = "prompt", "chosen", "rejected"
SIDES = (CHOSEN, REJECTED)
PAIR, IMPLICIT = "pair", "implicit_prompt"  # the names of the formats
NAMES = (PROMPT, *SIDES, *formats.BESIDE_TURNS)
SPOKEN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def format_of(record: Mapping[str, Any], section: Data) -> str | None:
    """The name of the format of a record; None if it has no pair."""
    if any(_column(side, record, section) is None for side in SIDES):
        return None
    return PAIR if _prompt(record, section) is not None else IMPLICIT


def unknown_column(section: Data, reads: Reads) -> str:
    """The error for the first name in data.columns that nothing reads; "" if all are read."""
    known = sorted({*NAMES, *reads.variables, *filter(None, (section.group, section.stratify))})
    for ours, theirs in section.columns.items():
        if ours not in known:
            return (
                f"data.columns maps {short(repr(ours))} to {short(repr(theirs))}, but {short(repr(ours))} is neither a column of a pair nor "
                f"a variable of the chat template{nearest(ours, known)}; there are {', '.join(known)}"
            )
    return ""


def known_names(name: str, reads: Reads) -> Iterator[str]:
    """The names that are read at the place of `name` in a record of pairs."""
    if "." in name:
        yield from names_of_conversations(name, "messages", reads)
    else:
        yield from (*NAMES, *reads.variables)


def pair_of(record: Mapping[str, Any], section: Data, reads: Reads) -> AnswerPair:
    """The two conversations of a record, each checked by the rules of data.clean.

    Raises:
        RowError: it has no pair, a side cannot be used, or the sides are the same or do not follow the same prompt.
    """
    values = {side: _value(side, record, section) for side in SIDES}
    prompt = _prompt(record, section)
    sides = {side: _side(side, values[side], prompt, record, section, reads) for side in SIDES}
    chosen, rejected = sides[CHOSEN], sides[REJECTED]
    _check_prompts(chosen, rejected)
    if chosen.messages[-1] == rejected.messages[-1]:
        raise RowError("has the same answer as chosen and as rejected: nothing can be preferred", "identical")
    unread = dict.fromkeys((*chosen.unread, *rejected.unread, *_beside(record, section)))
    return AnswerPair(
        chosen=replace(chosen, trained=()),
        rejected=replace(rejected, trained=()),
        unread=tuple(unread),
        ignored=tuple(dict.fromkeys((*chosen.ignored, *rejected.ignored))),
    )


# --- columns ----------------------------------------------------------------------------------------------------------


def _column(ours: str, record: Mapping[str, Any], section: Data) -> str | None:
    """The record's column for one of our names, or None."""
    theirs = section.columns.get(ours, ours)
    taken = ours not in section.columns and theirs in section.columns.values()
    return theirs if theirs in record and not taken else None


def _prompt(record: Mapping[str, Any], section: Data) -> Any:
    """The prompt of a record that has one beside its answers, else None."""
    column = _column(PROMPT, record, section)
    return None if column is None or record[column] in (None, "", []) else record[column]


def _value(side: str, record: Mapping[str, Any], section: Data) -> Any:
    """One answer as the record has it: text, or a list of turns.

    Raises:
        RowError: there is none.
    """
    column = _column(side, record, section)
    if column is None:
        theirs = section.columns.get(side, side)
        mapped = f" (data.columns maps {side} to it)" if side in section.columns else ""
        raise RowError(
            f"has no column {short(repr(theirs))}{mapped}, so it is no pair of answers; it has the columns {listed(record)}: map yours with "
            "data.columns, such as {prompt: question, chosen: better, rejected: worse}"
        )
    value = _turns_in(record[column])
    if value in (None, "", []):
        raise RowError(f"{side} is empty", "empty")
    return value


def _turns_in(value: Any) -> Any:
    """A value; the JSON text of a list of turns is decoded, as text tables hold it."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            decoded = decode(value)
        except ValueError:  # a text that only begins like JSON
            return value
        if isinstance(decoded, list) and all(isinstance(turn, Mapping) and _speaker(turn) for turn in decoded):
            return decoded
    return value


def _speaker(turn: Any) -> Any:
    return (turn.get("role") or turn.get("from")) if isinstance(turn, Mapping) else None


def _beside(record: Mapping[str, Any], section: Data) -> Iterator[str]:
    """Columns with reasoning, which belongs to one of two answers, and so into its turn."""
    columns = [section.columns.get(name, name) for name in THINKING]
    yield from (name for name in columns if isinstance(record.get(name), str) and name not in section.ignore)


# --- one side ---------------------------------------------------------------------------------------------------------


def _side(side: str, value: Any, prompt: Any, record: Mapping[str, Any], section: Data, reads: Reads) -> Conversation:
    """The conversation that ends with an answer."""
    whole = _whole(value, prompt)
    ours = "messages" if whole is not None else "completion"
    column = str(_column(side, record, section))
    others = {_column(name, record, section) for name in (*SIDES, *((PROMPT,) if whole is not None else ()))}
    kept = {name: item for name, item in record.items() if name not in others and name not in THINKING}
    mapped = {
        name: theirs for name, theirs in section.columns.items() if name not in (*SIDES, "messages", "completion")
    }
    given = section.model_copy(update={"columns": {**mapped, ours: column}})
    try:
        example = formats.example(
            {**kept, column: value if whole is None else whole},
            "prompt_completion" if whole is None else "messages",
            given,
            None,
            reads,
        )
        assert isinstance(example, Conversation)
        if whole is not None and prompt is not None:
            _check_beginning(prompt, example)
    except RowError as error:
        raise RowError(f"{side}: {error}", error.rule) from None
    return example


def _whole(value: Any, prompt: Any) -> list[Any] | None:
    """A whole conversation, prompt included; None for an answer alone.

    Raises:
        RowError: there is no prompt.
    """
    if isinstance(value, list):
        if value and SPEAKING.get(str(_speaker(value[0]))) != "assistant":
            return value
        spoken = None
    else:
        spoken = _spoken(value) if isinstance(value, str) and prompt is None else None
    if spoken is None and prompt is None:
        raise RowError(
            "has no prompt: neither a column prompt, nor turns of chosen and rejected before their answers; map yours with data.columns, such "
            "as {prompt: question}",
            "prompt",
        )
    return spoken


SPEAKING = turns.SPEAKERS


def _spoken(text: str) -> list[dict[str, str]] | None:
    """The turns of a text whose speakers are Human and Assistant; None for any other text."""
    _, *parts = SPOKEN.split(text)
    speakers, said = parts[::2], parts[1::2]
    if not text.lstrip("\n").startswith("Human:") or speakers[-1] != "Assistant":
        return None
    return [{"role": SPEAKERS[who], "content": what.strip()} for who, what in zip(speakers, said, strict=True)]


def _check_beginning(prompt: Any, conversation: Conversation) -> None:
    """Raise RowError if a prompt is not how a whole conversation begins. A text is its last question."""
    before = [message for message in conversation.messages[:-1] if message["role"] != "system"]
    if isinstance(prompt, str):
        same = bool(before) and before[-1]["content"].strip() == prompt.strip()
    else:
        said = [str(turn.get("content", turn.get("value"))).strip() for turn in prompt if isinstance(turn, Mapping)]
        same = [message["content"].strip() for message in conversation.messages[:-1]][-len(said) :] == said
    if not same:
        raise RowError("its turns before the answer are not the prompt that the record has beside them", "prompt")


def _check_prompts(chosen: Conversation, rejected: Conversation) -> None:
    """Raise RowError if the two differ before their last turn."""
    before: Sequence[Any] = chosen.messages[:-1]
    place = first_difference(before, rejected.messages[:-1])
    if place is not None:
        raise RowError(
            f"has no common prompt: chosen has {len(chosen.messages)} turns and rejected {len(rejected.messages)}, and they differ from turn "
            f"{place + 1} on, where only the last turn of each may",
            "prompt",
        )
