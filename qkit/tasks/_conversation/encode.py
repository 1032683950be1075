"""Examples to rows of token ids: rendered, tokenized, and marked where they carry loss.

Which tokens carry loss is found by rendering and comparing token ids: a turn of the assistant begins where the ids of the prompt it would be
asked with end. No marker in the template is needed. A turn that the template later writes differently (thinking that is dropped from
earlier turns) gets a row of its own, with the prompt that a server would send.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qkit.chat import conversation as chat_conversation
from qkit.chat.template import Messages, Renderer, TemplateRefusal
from qkit.plugins.task import Conversation, Example, RowError, Text, Tokens
from qkit.recipe.schema import Data

IGNORED = -100  # torch's cross_entropy skips these labels


@dataclass(frozen=True)
class Row:
    """One row to learn from. `input_ids`, `labels`: [tokens]; `start`: where the last completion begins.

    `messages`: those before the answer, they and `tools` as they are once they were sent to a server; `variables`: what the template is
    given beside them; `reply`: the turn that answers, `answer` what it says, `reference` how a prediction that is right reads; `text`: the
    whole conversation as rendered; `turns`: the messages that carry loss. `whole_tokens`: its length before anything was cut; `continues`:
    a piece of a text, and not its first; `findings`: (check, what was seen).
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    start: int
    messages: Messages = ()
    tools: Sequence[Any] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    reply: Mapping[str, Any] = field(default_factory=dict)
    answer: str = ""
    reference: str = ""
    text: str = ""
    turns: tuple[int, ...] = ()
    whole_tokens: int = 0
    continues: bool = False
    findings: tuple[tuple[str, str], ...] = ()

    @property
    def labelled(self) -> int:
        """Tokens that carry loss."""
        return sum(label != IGNORED for label in self.labels)


class Refused(RowError):
    """A row that cannot be learnt from once it is rendered; `rule` is the check that it fails, `row` the whole row where there is one."""

    def __init__(self, message: str, rule: str, row: Row | None = None):
        super().__init__(message, rule)
        self.row = row


@dataclass(frozen=True)
class Draft:
    """A conversation as text: the whole, and the prompt of each turn to learn. The last turn to learn ends it."""

    conversation: Conversation
    whole: str
    prompts: Mapping[int, str]

    @property
    def last(self) -> int:
        return max(self.prompts)

    @property
    def texts(self) -> list[str]:
        return [self.whole, *self.prompts.values()]


def tokenize(reader: Renderer, examples: Sequence[Example | RowError], how: Data) -> list[list[Row] | RowError]:
    """The rows of each example, or why there is none; all texts are tokenized in one call."""
    drafted = [_drafted(reader, example, how) for example in examples]
    texts = [text for drafts in drafted if isinstance(drafts, list) for draft in drafts for text in draft.texts]
    ids = iter(reader.encode(texts))
    return [_made(reader, example, drafts, ids, how) for example, drafts in zip(examples, drafted, strict=True)]


def _drafted(reader: Renderer, example: Example | RowError, how: Data) -> list[Draft] | RowError | None:
    """A conversation's drafts; None for what is no conversation."""
    if isinstance(example, RowError):
        return example
    if not isinstance(example, Conversation):
        return None
    try:
        return list(drafts(reader, example, how.loss))
    except RowError as error:
        return error


def _made(
    reader: Renderer,
    example: Example | RowError,
    drafts: list[Draft] | RowError | None,
    ids: Iterator[list[int]],
    how: Data,
) -> list[Row] | RowError:
    if isinstance(drafts, RowError):
        return drafts
    try:
        if isinstance(example, Text):
            return _text_rows(reader, example, how)
        if isinstance(example, Tokens):
            return [_cut_tokens(_passed_through(example), how)]
        assert drafts is not None
        given = [[next(ids) for _ in draft.texts] for draft in drafts]  # all are taken before any row may be refused
        rows = [_conversation_row(reader, draft, encoded, how) for draft, encoded in zip(drafts, given, strict=True)]
        return _unrolled(rows) if len(rows) > 1 else rows
    except RowError as error:
        return error


def _unrolled(rows: list[Row]) -> list[Row]:
    """Rows of one conversation, with a word on why there are several."""
    earlier = ", ".join(str(row.turns[-1] + 1) for row in rows[1:] if row.turns)
    found = ("prefix_stable", f"its turns {earlier} read differently at its end")
    return [replace(rows[0], findings=(*rows[0].findings, found)), *rows[1:]]


# --- conversations ----------------------------------------------------------------------------------------------------


def learnt_turns(example: Conversation, loss: str) -> list[int]:
    """The messages that carry loss: what the record says, else what data.loss does."""
    marks = example.trained or (None,) * len(example.messages)
    assistant = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
    by_default = assistant[-1:] if loss == "completion" else assistant
    return [i for i in assistant if marks[i] or (marks[i] is None and i in by_default)]


def drafts(reader: Renderer, example: Conversation, loss: str) -> Iterator[Draft]:
    """The rows that a conversation makes: one, and one more for each turn that its end does not continue as it was.

    Raises:
        Refused: no turn is to be learnt, or the template does not take the conversation.
    """
    reader, turns = reader.meeting(example.tools), learnt_turns(example, loss)
    if not turns:
        raise Refused("has no turn that may be learnt: every assistant turn is marked not to be trained", "loss_tokens")
    try:
        while turns:
            draft = _draft(reader, example, turns)
            yield draft
            turns = [turn for turn in turns if turn not in draft.prompts]
    except TemplateRefusal as error:
        raise Refused(f"is refused by the chat template: {error}", "template") from None


def _draft(reader: Renderer, example: Conversation, turns: Sequence[int]) -> Draft:
    last = turns[-1]
    messages, tools, variables = example.messages, example.tools, example.variables
    whole = reader.through_end(reader.render(messages[: last + 1], tools, True, variables))
    prompts = {turn: reader.render(messages[:turn], tools, False, variables) for turn in turns}
    if not whole.startswith(prompts[last]):
        raise Refused(
            "is written by the chat template, once answered, in another way than the prompt it would be asked with, first at "
            f"{_first_difference(prompts[last], whole)!r}: a server would send what training never saw",
            "generation_prompt",
        )
    kept = {
        turn: prompts[turn] for turn in turns if turn == last or _stays(reader, example, turn, prompts[turn], whole)
    }
    return Draft(example, whole, kept)


def _stays(reader: Renderer, example: Conversation, turn: int, prompt: str, whole: str) -> bool:
    """Whether a turn reads, further on in the conversation, as it did when it was the last one."""
    if not whole.startswith(prompt):
        return False
    answered = reader.render(example.messages[: turn + 1], example.tools, True, example.variables)
    return whole.startswith(reader.through_end(answered))


def _first_difference(left: str, right: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return left[same : same + 30]


def _conversation_row(reader: Renderer, draft: Draft, encoded: list[list[int]], how: Data) -> Row:
    reader = reader.meeting(draft.conversation.tools)
    row = marked(reader, draft, encoded, how.loss)
    if len(row.input_ids) <= how.max_length:
        return row
    if how.too_long == "truncate_prompt":
        return _without_oldest_turns(reader, draft, row, how)
    if how.too_long == "truncate_completion":
        return cut_end(row, how.max_length)
    raise too_long(row, how)


def marked(reader: Renderer, draft: Draft, encoded: list[list[int]], loss: str) -> Row:
    """The row of a draft whose texts are `encoded`: the whole, then the prompt of each turn."""
    whole, prompts = encoded[0], dict(zip(draft.prompts, encoded[1:], strict=True))
    findings = []
    last = prompts[draft.last]
    if whole[: len(last)] != last:
        # the server sends the prompt alone: its last tokens are not those of the whole
        findings.append(("joins", f"the tokens change where the answer joins its prompt, {_seam(reader, last)}"))
        whole = last + reader.encode([draft.whole[len(draft.prompts[draft.last]) :]])[0]
    labels = list(whole) if loss == "all" else [IGNORED] * len(whole)
    turns = []
    for turn, prompt in prompts.items():
        if whole[: len(prompt)] != prompt:
            findings.append(
                ("joins", f"the tokens of turn {turn + 1} change where it joins its prompt: it is not learnt here")
            )
            continue
        end = _end_of_turn(whole, len(prompt), reader.end)
        labels[len(prompt) : end] = whole[len(prompt) : end]
        turns.append(turn)
    labels[:1] = [IGNORED]  # nothing comes before it that could predict it
    messages = draft.conversation.messages
    return Row(
        input_ids=whole,
        labels=labels,
        start=max(len(last), 1),
        messages=tuple(map(chat_conversation.sent, messages[: draft.last])),
        tools=tuple(chat_conversation.tools_sent(draft.conversation.tools)),
        variables=draft.conversation.variables,
        reply=messages[draft.last],
        answer=_answer(reader, messages[draft.last], draft),
        reference=reader.tokenizer.decode(whole[len(last) :], skip_special_tokens=True),  # as answers.py does
        text=draft.whole,
        turns=tuple(turns),
        whole_tokens=len(whole),
        findings=tuple(findings),
    )


def _answer(reader: Renderer, message: Mapping[str, Any], draft: Draft) -> str:
    """What the last turn says; for one that only calls tools, or speaks in parts, all of it as the template writes it."""
    content = message.get("content")
    return (
        content
        if content and isinstance(content, str)
        else draft.whole[len(draft.prompts[draft.last]) :].removesuffix(reader.ending)
    )


def _seam(reader: Renderer, prompt: Sequence[int]) -> str:
    return f"after {reader.tokenizer.decode(prompt[-3:])!r}"


def _end_of_turn(ids: Sequence[int], begin: int, end: int | None) -> int:
    """One past the token that ends the turn which begins at `begin`."""
    try:
        return ids.index(end, begin) + 1
    except ValueError:
        return len(ids)


# --- length -----------------------------------------------------------------------------------------------------------


def too_long(row: Row, how: Data) -> Refused:
    return Refused(f"has {row.whole_tokens} tokens, data.max_length is {how.max_length}", "length", row)


def _without_oldest_turns(reader: Renderer, draft: Draft, row: Row, how: Data) -> Row:
    """The row of the same turns to learn without the oldest exchanges; a system turn stays."""
    for cut, shorter in _shortened(draft.conversation, draft.last):
        again = _draft(reader, shorter, [turn - cut for turn in draft.prompts if turn > cut])
        made = marked(reader, again, reader.encode(again.texts), how.loss)
        if len(made.input_ids) <= how.max_length:
            gone = row.whole_tokens - len(made.input_ids)
            found = ("prompt_cut", f"its oldest turns are cut: {gone} of {row.whole_tokens} tokens")
            return replace(made, whole_tokens=row.whole_tokens, findings=(*made.findings, found))
    raise Refused(
        f"has {row.whole_tokens} tokens, and its last question and answer alone are more than data.max_length={how.max_length}",
        "length",
        row,
    )


def _shortened(example: Conversation, last: int) -> Iterator[tuple[int, Conversation]]:
    """How many turns are cut, and the conversation up to `last` without them: its system turn, then from ever later user turns on."""
    head = sum(message["role"] in ("system", "developer") for message in example.messages[:1])
    for begin in range(head + 1, last):
        if example.messages[begin]["role"] == "user":
            messages = example.messages[:head] + example.messages[begin : last + 1]
            yield begin - head, replace(example, messages=messages, trained=())


def cut_end(row: Row, max_length: int) -> Row:
    """The first `max_length` tokens of a row.

    Raises:
        Refused: no answer would be left.
    """
    kept = replace(row, input_ids=row.input_ids[:max_length], labels=row.labels[:max_length])
    if row.start >= max_length or not kept.labelled:
        raise Refused(f"has {row.start} tokens before its answer, data.max_length is {max_length}", "length", row)
    cut = row.whole_tokens - max_length
    found = (
        "answer_cut",
        f"the end of its answer is cut: {cut} of {row.whole_tokens} tokens, and with them the end of the turn",
    )
    return replace(kept, findings=(*row.findings, found))


# --- text and ready-made tokens ---------------------------------------------------------------------------------------


def _text_rows(reader: Renderer, example: Text, how: Data) -> list[Row]:
    """A text, begun and ended as the tokenizer does; in pieces when data.too_long=split says so."""
    tokenizer = reader.tokenizer
    ids: list[int] = tokenizer(example.text, return_attention_mask=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    row = Row(ids, [IGNORED, *ids[1:]], start=1, whole_tokens=len(ids))
    if not row.labelled:
        raise Refused("is one token long: there is nothing to predict", "loss_tokens")
    if len(ids) <= how.max_length:
        return [row]
    if how.too_long == "split":
        return list(pieces(row, how.max_length))
    if how.too_long == "truncate_completion":
        return [cut_end(row, how.max_length)]
    raise too_long(row, how)


def pieces(row: Row, max_length: int) -> Iterator[Row]:
    """A row in pieces. Each begins with the last token of the one before, as context, so that every token is learnt exactly once."""
    for begin in range(0, len(row.input_ids) - 1, max_length - 1):
        ids = row.input_ids[begin : begin + max_length]
        labels = [IGNORED, *row.labels[begin + 1 : begin + max_length]]
        yield replace(row, input_ids=ids, labels=labels, whole_tokens=len(ids), continues=begin > 0)


def _passed_through(example: Tokens) -> Row:
    """Somebody else's tokens, as they are; the label of the first one is never used."""
    labels = [IGNORED, *example.labels[1:]]
    start = next((i for i in range(len(labels) - 1, 0, -1) if labels[i] != IGNORED and labels[i - 1] == IGNORED), 1)
    row = Row(example.input_ids, labels, start=start, whole_tokens=len(labels))
    if not row.labelled:
        raise Refused("has no token that carries loss: every label is -100", "loss_tokens")
    return row


def _cut_tokens(row: Row, how: Data) -> Row:
    if len(row.input_ids) <= how.max_length:
        return row
    if how.too_long == "truncate_completion":
        return cut_end(row, how.max_length)
    raise too_long(row, how)
