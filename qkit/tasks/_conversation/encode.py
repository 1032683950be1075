"""Encodes examples as rows of token ids and labels.

Labels come from rendering and comparing token ids: a turn of the assistant begins where the ids of its prompt end, so templates need no
markers. A turn that the template later writes differently (for example without its reasoning) becomes a separate row, with the prompt that
a server would send.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from qkit.chat import conversation as chat_conversation
from qkit.chat.template import Renderer, TemplateRefusal
from qkit.core.batching import IGNORED
from qkit.core.sequences import first_difference
from qkit.plugins.example import Conversation, Example, RowError, Text, Tokens
from qkit.recipe.schema import Data
from qkit.tasks._conversation.rows import EncodedRow, Finding, Refused
from qkit.tasks._conversation.too_long import cut_end, pieces, too_long


@dataclass(frozen=True)
class Draft:
    """A conversation as text: the whole, which ends with the last turn to train on, and the prompt of each turn to train on."""

    conversation: Conversation
    whole: str
    prompts: Mapping[int, str]

    @property
    def last(self) -> int:
        return max(self.prompts)

    @property
    def texts(self) -> list[str]:
        return [self.whole, *self.prompts.values()]


@dataclass(frozen=True)
class Result:
    """What became of one example: the rows it makes, or the error that says why it makes none."""

    rows: Sequence[EncodedRow] = ()
    error: RowError | None = None


@dataclass(frozen=True)
class Drafted:
    """An example before its texts are tokenized: the drafts of a conversation (other examples have none), or why it makes no row."""

    example: Example | RowError
    drafts: Sequence[Draft] = ()
    error: RowError | None = None

    @property
    def texts(self) -> list[str]:
        return [text for draft in self.drafts for text in draft.texts]


def tokenize(renderer: Renderer, examples: Sequence[Example | RowError], section: Data) -> list[Result]:
    """One result for each example; all texts are tokenized in one call, which is much faster than one call each."""
    drafted = [_drafted(renderer, example, section) for example in examples]
    ids = renderer.encode([text for item in drafted for text in item.texts])
    ends = list(accumulate(len(item.texts) for item in drafted))
    begins = [0, *ends]
    return [
        _encoded(renderer, item, ids[begin:end], section)
        for item, begin, end in zip(drafted, begins, ends, strict=False)
    ]


def _drafted(renderer: Renderer, example: Example | RowError, section: Data) -> Drafted:
    if isinstance(example, RowError):
        return Drafted(example, error=example)
    if not isinstance(example, Conversation):
        return Drafted(example)
    try:
        return Drafted(example, list(drafts(renderer, example, section.loss)))
    except RowError as error:
        return Drafted(example, error=error)


def _encoded(renderer: Renderer, drafted: Drafted, ids: Sequence[list[int]], section: Data) -> Result:
    """`ids`: of the drafts' texts, in their order."""
    if drafted.error is not None:
        return Result(error=drafted.error)
    example = drafted.example
    try:
        if isinstance(example, Text):
            return Result(_text_rows(renderer, example, section))
        if isinstance(example, Tokens):
            return Result([_fitted_tokens(_from_tokens(example), section)])
        return Result(_conversation_rows(renderer, drafted.drafts, ids, section))
    except RowError as error:
        return Result(error=error)


# --- conversations ----------------------------------------------------------------------------------------------------


def learnt_turns(example: Conversation, loss: str) -> list[int]:
    """Indices of the messages that carry loss: by the marks of the record, else by data.loss."""
    marks = example.trained or (None,) * len(example.messages)
    assistant = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
    by_default = assistant[-1:] if loss == "completion" else assistant
    return [i for i in assistant if marks[i] or (marks[i] is None and i in by_default)]


def drafts(renderer: Renderer, example: Conversation, loss: str) -> Iterator[Draft]:
    """The rows of a conversation: one, and another for each turn that the template writes differently in the whole conversation.

    Raises:
        Refused: there is no turn to train on, or the template rejects the conversation.
    """
    renderer, turns = renderer.meeting(example.tools), learnt_turns(example, loss)
    if not turns:
        raise Refused("has no turn to train on: every assistant turn is marked as not trained", "loss_tokens")
    try:
        while turns:
            draft = _draft(renderer, example, turns)
            yield draft
            turns = [turn for turn in turns if turn not in draft.prompts]
    except TemplateRefusal as error:
        raise Refused(f"is rejected by the chat template: {error}", "template") from None


def _draft(renderer: Renderer, example: Conversation, turns: Sequence[int]) -> Draft:
    last = turns[-1]
    messages, tools, variables = example.messages, example.tools, example.variables
    whole = renderer.through_end(renderer.render(messages[: last + 1], tools, True, variables))
    prompts = {turn: renderer.render(messages[:turn], tools, False, variables) for turn in turns}
    if not whole.startswith(prompts[last]):
        raise Refused(
            "does not begin with its prompt once the chat template writes the answer; the first difference is at "
            f"{prompts[last][first_difference(prompts[last], whole) :][:30]!r}: a server would send a prompt that training never saw",
            "generation_prompt",
        )
    kept = {
        turn: prompts[turn] for turn in turns if turn == last or _stays(renderer, example, turn, prompts[turn], whole)
    }
    return Draft(example, whole, kept)


def _stays(renderer: Renderer, example: Conversation, turn: int, prompt: str, whole: str) -> bool:
    """Whether the template writes a turn in the whole conversation as it did when the turn was the last one."""
    if not whole.startswith(prompt):
        return False
    answered = renderer.render(example.messages[: turn + 1], example.tools, True, example.variables)
    return whole.startswith(renderer.through_end(answered))


def _conversation_rows(
    renderer: Renderer, drafts: Sequence[Draft], ids: Sequence[list[int]], section: Data
) -> list[EncodedRow]:
    """One row for each draft; the first one notes why there are several."""
    rows, begin = [], 0
    for draft in drafts:
        end = begin + len(draft.texts)
        rows.append(_conversation_row(renderer, draft, ids[begin:end], section))
        begin = end
    if len(rows) == 1:
        return rows
    earlier = ", ".join(str(row.turns[-1] + 1) for row in rows[1:] if row.turns)
    finding = ("prefix_stable", f"the template writes its turns {earlier} differently at the end of the conversation")
    return [replace(rows[0], findings=(*rows[0].findings, finding)), *rows[1:]]


def _conversation_row(renderer: Renderer, draft: Draft, ids: Sequence[list[int]], section: Data) -> EncodedRow:
    renderer = renderer.meeting(draft.conversation.tools)
    row = label_row(renderer, draft, ids, section.loss)
    if len(row.input_ids) <= section.max_length:
        return row
    if section.too_long == "truncate_prompt":
        return _without_oldest_turns(renderer, draft, row, section)
    if section.too_long == "truncate_completion":
        return cut_end(row, section.max_length)
    raise too_long(row, section)


def label_row(renderer: Renderer, draft: Draft, ids: Sequence[list[int]], loss: str) -> EncodedRow:
    """The row of a draft. `ids`: of the whole, then of the prompt of each turn."""
    prompts = dict(zip(draft.prompts, ids[1:], strict=True))
    last_prompt = prompts[draft.last]
    input_ids, seam = _joined_as_served(renderer, draft, ids[0], last_prompt)
    labels, turns, unlearnt = _labels(input_ids, prompts, renderer.end, loss)
    messages = draft.conversation.messages
    return EncodedRow(
        input_ids=input_ids,
        labels=labels,
        start=max(len(last_prompt), 1),
        messages=tuple(map(chat_conversation.sent, messages[: draft.last])),
        tools=tuple(chat_conversation.tools_sent(draft.conversation.tools)),
        variables=draft.conversation.variables,
        reply=messages[draft.last],
        answer=_answer(renderer, messages[draft.last], draft),
        reference=renderer.tokenizer.decode(
            input_ids[len(last_prompt) :], skip_special_tokens=True
        ),  # as answers.py does
        text=draft.whole,
        turns=tuple(turns),
        whole_tokens=len(input_ids),
        findings=(*seam, *unlearnt),
    )


def _joined_as_served(
    renderer: Renderer, draft: Draft, whole: list[int], prompt: list[int]
) -> tuple[list[int], list[Finding]]:
    """The ids of a row that begins with its prompt's ids.

    A server tokenizes the prompt alone. Where a token of the whole text spans the seam, the answer is tokenized on its own as well.
    """
    if whole[: len(prompt)] == prompt:
        return whole, []
    answer = renderer.encode([draft.whole[len(draft.prompts[draft.last]) :]])[0]
    seam = renderer.tokenizer.decode(prompt[-3:])
    return prompt + answer, [("joins", f"the tokens change where the answer follows its prompt, after {seam!r}")]


def _labels(
    input_ids: list[int], prompts: Mapping[int, list[int]], end_token: int | None, loss: str
) -> tuple[list[int], list[int], list[Finding]]:
    """The labels of a row, the turns that carry loss, and the turns that cannot: their prompt has other tokens in this row."""
    labels = list(input_ids) if loss == "all" else [IGNORED] * len(input_ids)
    turns, unlearnt = [], []
    for turn, prompt in prompts.items():
        begin = len(prompt)
        if input_ids[:begin] != prompt:
            message = f"the tokens change where turn {turn + 1} follows its prompt: this row does not train on it"
            unlearnt.append(("joins", message))
            continue
        end = _end_of_turn(input_ids, begin, end_token)
        labels[begin:end] = input_ids[begin:end]
        turns.append(turn)
    labels[:1] = [IGNORED]  # no token comes before the first one that could predict it
    return labels, turns, unlearnt


def _answer(renderer: Renderer, message: Mapping[str, Any], draft: Draft) -> str:
    """The text of the last turn; if it only calls tools, or has its text in parts, the whole turn as the template writes it."""
    content = message.get("content")
    return (
        content
        if content and isinstance(content, str)
        else draft.whole[len(draft.prompts[draft.last]) :].removesuffix(renderer.ending)
    )


def _end_of_turn(ids: Sequence[int], begin: int, end: int | None) -> int:
    """One past the token that ends the turn which begins at `begin`."""
    try:
        return ids.index(end, begin) + 1
    except ValueError:
        return len(ids)


# --- length -----------------------------------------------------------------------------------------------------------


def _without_oldest_turns(renderer: Renderer, draft: Draft, row: EncodedRow, section: Data) -> EncodedRow:
    """The row without its oldest exchanges, but with its system turn."""
    for cut, shorter in shortened(draft.conversation, draft.last):
        again = _draft(renderer, shorter, [turn - cut for turn in draft.prompts if turn > cut])
        fewer = label_row(renderer, again, renderer.encode(again.texts), section.loss)
        if len(fewer.input_ids) <= section.max_length:
            gone = row.whole_tokens - len(fewer.input_ids)
            finding = ("prompt_cut", f"its oldest turns are removed: {gone} of {row.whole_tokens} tokens")
            return replace(fewer, whole_tokens=row.whole_tokens, findings=(*fewer.findings, finding))
    raise Refused(
        f"has {row.whole_tokens} tokens; even its last question and answer alone exceed data.max_length={section.max_length}",
        "length",
        row,
    )


def shortened(example: Conversation, last: int) -> Iterator[tuple[int, Conversation]]:
    """Ever shorter conversations up to `last`, which begin at later user turns but keep the system turn; with the number of turns removed."""
    head = sum(message["role"] in ("system", "developer") for message in example.messages[:1])
    for begin in range(head + 1, last):
        if example.messages[begin]["role"] == "user":
            messages = example.messages[:head] + example.messages[begin : last + 1]
            yield begin - head, replace(example, messages=messages, trained=())


# --- text and ready-made tokens ---------------------------------------------------------------------------------------


def _text_rows(renderer: Renderer, example: Text, section: Data) -> list[EncodedRow]:
    """A text with the tokenizer's begin and end tokens; in pieces if data.too_long=split."""
    tokenizer = renderer.tokenizer
    ids: list[int] = tokenizer(example.text, return_attention_mask=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    row = EncodedRow(ids, [IGNORED, *ids[1:]], start=1, whole_tokens=len(ids))
    if not row.labelled:
        raise Refused("is only one token long: there is nothing to predict", "loss_tokens")
    if len(ids) <= section.max_length:
        return [row]
    if section.too_long == "split":
        return list(pieces(row, section.max_length))
    if section.too_long == "truncate_completion":
        return [cut_end(row, section.max_length)]
    raise too_long(row, section)


def _from_tokens(example: Tokens) -> EncodedRow:
    """Tokens from elsewhere, unchanged; the label of the first one is never used."""
    labels = [IGNORED, *example.labels[1:]]
    start = next((i for i in range(len(labels) - 1, 0, -1) if labels[i] != IGNORED and labels[i - 1] == IGNORED), 1)
    row = EncodedRow(example.input_ids, labels, start=start, whole_tokens=len(labels))
    if not row.labelled:
        raise Refused(f"has no token that carries loss: every label is {IGNORED}", "loss_tokens")
    return row


def _fitted_tokens(row: EncodedRow, section: Data) -> EncodedRow:
    if len(row.input_ids) <= section.max_length:
        return row
    if section.too_long == "truncate_completion":
        return cut_end(row, section.max_length)
    raise too_long(row, section)
