"""The formats of training data, and how a record of each becomes an example. "auto" recognises the format by its columns.

messages            messages (role, content; weight or train), tools, system
sharegpt            conversations (from, value), tools, system
tokenized           input_ids, labels, attention_mask
alpaca              instruction, input, output, history, tools, system
prompt_completion   prompt, completion: each text or a list of turns; tools, system
text                text

A conversation may also have chat_template_kwargs (an object), and columns named like variables of the chat template (enable_thinking).
The reasoning of an answer is a key of its turn or, where the answer is text, a separate column: reasoning_content, reasoning or thinking.
Names that nothing reads are noted.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from qkit.core.errors import listed, short
from qkit.plugins.example import NO_MORE, THINKING, Conversation, Example, Reads, RowError, Text
from qkit.recipe.schema import Data
from qkit.tasks._conversation.checks.validity import KWARGS, SYSTEM, check_empty, check_order, check_texts
from qkit.tasks._conversation.tokenized import View, tokenized_row
from qkit.tasks._conversation.turns import (
    Notes,
    Turn,
    listing,
    loaded,
    parsed,
    plain,
    shown,
    string,
    thought_of,
    tools_of,
    turns_of,
    without_fillers,
)

BESIDE_TURNS = ("tools", "system", KWARGS)
# Arguments of transformers' apply_chat_template that control rendering and tokenizing; they are not variables of a template.
RESERVED = {
    *(
        "conversation",
        "messages",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
    ),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "processor_kwargs"),
}
TRUTH = {
    "true": True,
    "false": False,
}  # text tables have no other way to write them, and a template treats any text as true
SWITCHED = TRUTH | {"1": True, "yes": True, "on": True, "0": False, "no": False, "off": False}


@dataclass(frozen=True)
class Form:
    """The columns of a format, and what makes an example of them."""

    needs: tuple[str, ...]
    takes: tuple[str, ...]
    build: Callable[[View, Notes], Example]


def recognised(record: Mapping[str, Any], section: Data) -> str:
    """The name of the format whose columns a record has.

    Raises:
        RowError: no format matches.
    """
    here = [column for column, value in record.items() if value is not None]
    for columns in (here, list(record)):
        for name, form in FORMS.items():
            if all(column_of(need, columns, section) is not None for need in form.needs):
                return name
    raise RowError(_not_recognised(record, section))


def example(
    record: Mapping[str, Any], format: str, section: Data, accepted: Any = None, reads: Reads = NO_MORE
) -> Example:
    """A record of that format ("auto": recognised) as an example, checked by the rules of `data.clean`.

    `accepted` answers become a conversation's `reference`. `reads`: what the model's template reads.

    Raises:
        RowError: it cannot be used, or violates a rule of data.clean that is not "keep".
    """
    name = format if format in FORMS else recognised(record, section)
    notes = Notes(section, reads)
    try:
        example = FORMS[name].build(_view(record, name, section), notes)
        if isinstance(example, Conversation):
            variables = variables_of(record, name, section, notes)
            example = replace(example, reference=accepted, variables=variables)
        note_columns(record, columns_taken(record, FORMS[name], section, reads), section, notes, example, accepted)
        return checked(replace(example, unread=tuple(notes.unread), ignored=tuple(notes.matched)), section)
    except RecursionError:
        raise RowError("is nested too deeply") from None
    except RowError as error:
        if error.rule == "empty" and section.clean.empty == "keep":
            raise RowError(str(error)) from None  # an empty row cannot be kept
        raise


def variables_of(record: Mapping[str, Any], name: str, section: Data, notes: Notes) -> dict[str, Any]:
    """The variables that a record passes to the template: chat_template_kwargs, and columns that the template reads.

    Raises:
        RowError: the two differ, or chat_template_kwargs has a reserved name.
    """
    theirs = column_of(KWARGS, list(record), section)
    read = theirs is not None and record[theirs] and not notes.left_out(theirs)
    given = _kwargs(record[theirs], theirs, notes) if read and theirs is not None else {}
    for key in given:
        if key not in notes.reads.variables:
            notes.add(f"{theirs}.{key}", given[key])
    for key, value in _variable_columns(record, name, section, notes):
        if key in given and given[key] != value:
            raise RowError(
                f"{key} is {shown(value)} in its column and {shown(given[key])} in {theirs}: keep only one of them"
            )
        given[key] = value
    return given


def _kwargs(value: Any, column: str, notes: Notes) -> dict[str, Any]:
    variables = parsed(value, column)
    if not isinstance(variables, Mapping):
        raise RowError(f"{column} is not an object: {shown(value)}")
    if reserved := RESERVED & variables.keys():
        raise RowError(
            f"{column} holds {', '.join(sorted(reserved))}, which a row cannot set: only variables of the template are allowed"
        )
    for key, item in variables.items():
        if key in notes.reads.switches and isinstance(item, str):
            raise RowError(
                f"{key} of {column} is the text {shown(item)}, but {key} is a switch of the chat template, which treats any text "
                "as true: write true or false, without quotes"
            )
    return {str(key): item for key, item in without_fillers(variables).items()}


def _variable_columns(record: Mapping[str, Any], name: str, section: Data, notes: Notes) -> Iterator[tuple[str, Any]]:
    """Columns that the template reads and the format does not."""
    taken = columns_taken(record, FORMS[name], section, notes.reads)
    for key in sorted(notes.reads.variables):
        theirs = column_of(key, list(record), section)
        if theirs is None and key in section.columns:
            raise RowError(missing_column(key, name, list(record), section))
        if theirs is None or theirs in taken or notes.left_out(theirs) or record[theirs] in (None, ""):
            continue
        value = without_fillers(record[theirs])
        if key == "documents":  # a list, as transformers has it; in a table often the text of one
            value = listing(value, theirs, "is not a list of documents")
        yield key, _switched(value, key, theirs, notes) if key in notes.reads.switches else _untexted(value)


def _switched(value: Any, key: str, column: str, notes: Notes) -> Any:
    """True or false for a variable that the template only tests for truth, however a table writes it."""
    text = str(int(value)) if isinstance(value, int | float) and value in (0, 1) else value
    if isinstance(text, str) and text.strip().lower() not in SWITCHED:
        raise RowError(
            f"{column} is {shown(value)}, but {key} is a switch of the chat template, which treats any text as true: write true or false"
        )
    return SWITCHED[text.strip().lower()] if isinstance(text, str) else value


def _untexted(value: Any) -> Any:
    """The value of a text field in a table: true, false, or the JSON of a list or an object."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parsed(value, "a variable")
        except RowError:  # a text that only begins like JSON
            return value
    return TRUTH.get(value.lower(), value) if isinstance(value, str) else value


def columns_taken(record: Mapping[str, Any], form: Form, section: Data, reads: Reads) -> set[str]:
    """The columns of a record that a format takes, by their own names."""
    by_name = {ours: column_of(ours, list(record), section) for ours in (*form.needs, *form.takes)}
    return {
        theirs
        for ours, theirs in by_name.items()
        if theirs is not None and (ours not in THINKING or _is_thought(record[theirs], ours, reads))
    }


def note_columns(
    record: Mapping[str, Any], taken: Set[str], section: Data, notes: Notes, example: Example, accepted: Any = None
) -> None:
    """Note the columns that neither the format (`taken` are its) nor the template nor the recipe reads."""
    names = [*(example.variables if isinstance(example, Conversation) else ()), section.group, section.weight]
    names += [section.stratify] if section.split is not None else []
    used = taken | {section.columns.get(name, name) for name in names if name is not None}
    used |= {"id"} if accepted is not None else set()
    label = section.columns.get(section.stratify or "", section.stratify)
    for column in record:
        notes.match(str(column))
        if column not in used or (column == label and _is_missed(example, record[column])):
            notes.add(str(column), record[column])


def _is_missed(example: Example, label: Any) -> bool:
    """Whether the label in data.stratify looks like the intended training target: the label of a text, or a boolean."""
    return isinstance(example, Text) or isinstance(label, bool)


def checked(example: Example, section: Data) -> Example:
    """An example that can be learnt from, with `data.system` before a conversation that has no system turn.

    Raises:
        RowError: a turn is empty, a character is invalid, or the turns are in an invalid order.
    """
    check_texts(example, section)
    if section.clean.empty != "keep":
        check_empty(example)
    if not isinstance(example, Conversation):
        return example
    check_order([message["role"] for message in example.messages])
    return _with_system(example, section.system) if section.system else example


def column_of(ours: str, columns: Sequence[str], section: Data) -> str | None:
    """The record's column for our name, if present. A column that is mapped to one of our names serves no other name."""
    if ours in section.columns:
        return theirs if (theirs := section.columns[ours]) in columns else None
    taken = any(theirs == ours and name in KNOWN for name, theirs in section.columns.items())
    return ours if ours in columns and not taken else None


def _view(record: Mapping[str, Any], name: str, section: Data) -> View:
    """The columns of a format, under our names, without those that are null."""
    form, columns = FORMS[name], list(record)
    by_name = {ours: column_of(ours, columns, section) for ours in (*form.needs, *form.takes)}
    for ours, theirs in by_name.items():
        if theirs is None and (ours in form.needs or ours in section.columns):
            raise RowError(missing_column(ours, name, columns, section))
    view = {ours: record[theirs] for ours, theirs in by_name.items() if theirs is not None}
    left_out = {ours for ours, theirs in by_name.items() if theirs in section.ignore}
    return {
        ours: value
        for ours, value in view.items()
        if ours in form.needs or (value is not None and ours not in left_out)
    }


def missing_column(ours: str, name: str, columns: Sequence[str], section: Data) -> str:
    theirs = section.columns.get(ours, ours)
    mapped = f" (data.columns maps {ours} to it)" if ours in section.columns else f", which the format {name} needs"
    close = difflib.get_close_matches(theirs, list(map(str, columns)), n=1)
    nearest = f"; did you mean {short(repr(close[0]))}?" if close else ""
    return f"has no column {short(repr(theirs))}{mapped}; it has the columns {listed(columns)}{nearest}"


def _not_recognised(record: Mapping[str, Any], section: Data) -> str:
    """Why no format matches: a column in data.columns is missing, or else which columns are expected."""
    columns = list(record)
    for ours, theirs in section.columns.items():
        if ours in KNOWN and theirs not in columns:
            return missing_column(ours, "auto", columns, section)
    wanted = ", or ".join(" and ".join(form.needs) for form in FORMS.values())
    return (
        f"has the columns {listed(columns)}; it must have {wanted}: "
        "map yours with data.columns, such as {prompt: question, completion: answer}"
    )


def unknown_column(section: Data, reads: Reads) -> str:
    """The error for the first name in data.columns that nothing reads and that would have no effect; "" if all are read."""
    known = sorted({*KNOWN, *reads.variables, *filter(None, (section.group, section.stratify, section.weight))})
    for ours, theirs in section.columns.items():
        if ours not in known:
            close = difflib.get_close_matches(ours, known, n=1)
            nearest = f", did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
            return (
                f"data.columns maps {short(repr(ours))} to {short(repr(theirs))}, but {short(repr(ours))} is neither a column of a format "
                f"nor a variable of the chat template{nearest}"
            )
    return ""


def _messages(view: View, notes: Notes) -> Conversation:
    return _conversation(turns_of(view["messages"], "messages", notes), view, notes)


def _sharegpt(view: View, notes: Notes) -> Conversation:
    return _conversation(turns_of(view["conversations"], "conversations", notes), view, notes)


def _prompt_completion(view: View, notes: Notes) -> Conversation:
    prompt = _text_or_turns(view["prompt"], "prompt", "user", notes)
    if isinstance(view["completion"], str):
        return _conversation([*prompt, _answer(view["completion"], view, notes)], view, notes)
    for name in THINKING:  # a list of turns has its reasoning in the turns
        notes.add(notes.path(name), view.get(name))
    return _conversation([*prompt, *_text_or_turns(view["completion"], "completion", "assistant", notes)], view, notes)


def _answer(text: str, view: View, notes: Notes) -> Turn:
    """The assistant's turn, with the reasoning that the record has in a separate column."""
    message, decided = plain("assistant", text)
    return {
        **message,
        **thought_of(
            {name: view[name] for name in THINKING if _is_thought(view.get(name), name, notes.reads)}, "the record"
        ),
    }, decided


def _is_thought(value: Any, name: str, reads: Reads) -> bool:
    """Whether the value is reasoning, and not the template's switch of the same name."""
    return isinstance(value, str) and not (name in reads.switches and value.strip().lower() in SWITCHED)


def _text_or_turns(value: Any, column: str, role: str, notes: Notes) -> list[Turn]:
    problem = f"is neither text nor a list of turns{loaded(value)}"
    return [plain(role, value)] if isinstance(value, str) else turns_of(value, column, notes, problem)


def _alpaca(view: View, notes: Notes) -> Conversation:
    questions = [string(view.get(column, ""), column) for column in ("instruction", "input")]
    prompt = plain("user", "\n\n".join(text for text in questions if text.strip()))
    answer = _answer(string(view["output"], "output"), view, notes)
    return _conversation([*_history(view.get("history", [])), prompt, answer], view, notes)


def _history(value: Any) -> Iterator[Turn]:
    """Earlier questions and their answers."""
    for number, pair in enumerate(listing(value, "history", "is not a list of pairs"), start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"pair {number} of history must be a question and an answer: {shown(pair)}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            yield plain(role, string(text, f"pair {number} of history"))


def _text(view: View, _: Notes) -> Text:
    return Text(string(view["text"], "text"))


def _conversation(spoken: Sequence[Turn], view: View, notes: Notes) -> Conversation:
    """A conversation of these turns, and of the record's system and tools columns."""
    system = string(view.get("system", ""), "system")
    turns = [plain("system", system), *spoken] if system.strip() else spoken
    trained = tuple(decided for _, decided in turns)
    return Conversation(
        messages=tuple(message for message, _ in turns),
        tools=tuple(tools_of(view.get("tools", []), notes)),
        trained=trained if any(decided is not None for decided in trained) else (),
    )


def _with_system(conversation: Conversation, system: str) -> Conversation:
    if conversation.messages[0]["role"] in SYSTEM:
        return conversation
    trained = (None, *conversation.trained) if conversation.trained else ()
    return replace(
        conversation, messages=({"role": "system", "content": system}, *conversation.messages), trained=trained
    )


FORMS = {  # in the order in which columns are tried
    "messages": Form(("messages",), BESIDE_TURNS, _messages),
    "sharegpt": Form(("conversations",), BESIDE_TURNS, _sharegpt),
    "tokenized": Form(("input_ids",), ("labels", "attention_mask"), tokenized_row),
    "alpaca": Form(("instruction", "output"), ("input", "history", *THINKING, *BESIDE_TURNS), _alpaca),
    "prompt_completion": Form(("prompt", "completion"), (*THINKING, *BESIDE_TURNS), _prompt_completion),
    "text": Form(("text",), (), _text),
}
KNOWN = {column for form in FORMS.values() for column in (*form.needs, *form.takes)}
