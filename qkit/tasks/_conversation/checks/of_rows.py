"""Checks of every row once it is tokenized. They look at the finished row only, independently of the code that made it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qkit.chat.conversation import Parted, goes_through_parts, text_of, texts_in
from qkit.chat.template import ASKED, Renderer, TemplateRefusal, compact
from qkit.core.batching import IGNORED
from qkit.core.strict_json import Rounded
from qkit.plugins.example import THINKING
from qkit.tasks._conversation.rows import EncodedRow, Finding

PROBE, SAID, CALLED = "qkit_probe_1729", "qkit_said_1729", "qkit_called_1729"  # a tool, a text, a call's argument
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": PROBE, "description": "d", "parameters": {"type": "object", "properties": {}}},
}
PROBE_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call00000", "type": "function", "function": {"name": PROBE, "arguments": {"x": CALLED}}}],
}


SECOND = {**PROBE_TOOL, "function": {**PROBE_TOOL["function"], "name": SAID}}
FIRST_MARK = 1_729_000_001  # numbers that no other text of a row holds


Findings = Iterator[Finding]


@dataclass(frozen=True)
class Facts:
    """What probes show that template, tokenizer and model do. `openings`: special tokens that begin a turn; `vocabulary`: its size.

    `offering`: what they do where a conversation offers tools; a template may do something else then, or be another one.
    """

    writes_system: bool
    writes_tools: bool
    writes_calls: bool
    expects_bos: bool
    bos: int | None
    stops: frozenset[int]
    openings: frozenset[int]
    vocabulary: int
    offering: Facts | None = None


def facts(renderer: Renderer, vocabulary: int) -> Facts:
    """Probe a template with marked conversations. `vocabulary`: rows of the model's embedding."""
    return replace(_facts(renderer, vocabulary, ()), offering=_facts(renderer, vocabulary, (PROBE_TOOL,)))


def _facts(renderer: Renderer, vocabulary: int, tools: Sequence[Any]) -> Facts:
    renderer = renderer.meeting(tools)
    tokenizer = renderer.tokenizer
    plain: list[int] = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    user = renderer.encode([_asked(renderer, tools)])[0]
    stops = frozenset({renderer.end, eos} - {None})
    return Facts(
        writes_system=_writes(renderer, SAID, [{"role": "system", "content": SAID}, ASKED], tools),
        writes_tools=all(_writes(renderer, mark, [ASKED], [PROBE_TOOL, SECOND]) for mark in (PROBE, SAID)),
        writes_calls=_writes(renderer, CALLED, [ASKED, PROBE_CALL], tools),
        expects_bos=bos is not None and plain[:1] == [bos],
        bos=bos,
        stops=stops,
        openings=(frozenset(user) & renderer.special) - stops,
        vocabulary=vocabulary,
    )


def _asked(renderer: Renderer, tools: Sequence[Any]) -> str:
    """A question as the template writes it; one that takes no tools is asked without them."""
    try:
        return renderer.render((ASKED,), tools, answered=True)
    except TemplateRefusal:
        return renderer.render((ASKED,), answered=True)


def _writes(renderer: Renderer, mark: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> bool:
    try:
        return mark in renderer.render(messages, tools, answered=True)
    except TemplateRefusal:
        return False


def examine(renderer: Renderer, facts: Facts, row: EncodedRow, loss: str, closely: bool) -> Findings:
    """Everything found in a row: (check, message). `closely`: run also the slow checks, which decode the row."""
    renderer, facts = renderer.meeting(row.tools), (row.tools and facts.offering) or facts
    yield from row.findings
    yield from _labels(row)
    yield from _bos(facts, row)
    yield from _vocabulary(facts, row)
    yield from _rounded(row)
    if row.text:
        yield from _conversation(renderer, facts, row, loss, closely)
    elif row.start > 1 or IGNORED in row.labels[1:]:
        yield from _foreign(facts, row)


def _conversation(renderer: Renderer, facts: Facts, row: EncodedRow, loss: str, closely: bool) -> Findings:
    lost = list(_lost_texts(renderer, facts, row))
    yield from lost
    legible = {"content", "special_text"}.isdisjoint(name for name, _ in lost)
    cut = any(name == "answer_cut" for name, _ in row.findings)
    if not cut and not _ends_learnt(facts, row):
        yield (
            "turn_end",
            f"ends with {renderer.tokenizer.decode(row.input_ids[-2:])!r}, which does not end a turn or carries no loss",
        )
    if loss == "all":
        if IGNORED in row.labels[1:]:
            yield "mask", f"has {row.labels[1:].count(IGNORED)} tokens without loss, although data.loss is all"
        return
    yield from _headers(facts, row)
    if closely and legible and not cut:
        yield from _mask(renderer, row)


def _labels(row: EncodedRow) -> Findings:
    for place, (token, label) in enumerate(zip(row.input_ids, row.labels, strict=True)):
        if label not in (token, IGNORED):
            yield "mask", f"has the label {label} at position {place}, where the token is {token}"
            return


def _bos(facts: Facts, row: EncodedRow) -> Findings:
    if facts.bos is None or row.continues:
        return
    first = list(row.input_ids[:2])
    if first == [facts.bos, facts.bos]:
        yield "bos", "begins with two of them"
    elif facts.expects_bos and first[:1] != [facts.bos]:
        yield "bos", "begins with none"


def _vocabulary(facts: Facts, row: EncodedRow) -> Findings:
    largest, least = max(row.input_ids), min(row.input_ids)
    if largest >= facts.vocabulary or least < 0:
        worst = largest if largest >= facts.vocabulary else least
        yield "vocabulary", f"has the id {worst}; the model's ids are 0 to {facts.vocabulary - 1}"


def _rounded(row: EncodedRow) -> Findings:
    """Numbers from a table that have lost digits if they were integers."""
    calls = [message.get("tool_calls") for message in (*row.messages, row.reply)]
    if (number := _first_rounded([*filter(None, calls), *row.tools, row.variables])) is not None:
        yield "rounded", f"contains {number!r}"


def _first_rounded(value: Any) -> Rounded | None:
    if isinstance(value, str):
        return None
    if isinstance(value, dict | list | tuple):
        inside = map(_first_rounded, value.values() if isinstance(value, dict) else value)
        return next((number for number in inside if number is not None), None)
    return value if isinstance(value, Rounded) else None


def _ends_learnt(facts: Facts, row: EncodedRow) -> bool:
    """Whether every span of tokens that carry loss ends with a token that ends a turn."""
    labels = row.labels
    last = [
        i for i in range(1, len(labels)) if labels[i] != IGNORED and (i + 1 == len(labels) or labels[i + 1] == IGNORED)
    ]
    return all(labels[i] in facts.stops for i in last)


def _headers(facts: Facts, row: EncodedRow) -> Findings:
    if not facts.openings.isdisjoint(row.labels):
        yield "headers", "carries loss where a turn begins"


def _foreign(facts: Facts, row: EncodedRow) -> Findings:
    """Rows tokenized elsewhere: an end-of-turn token that is masked although the turn before it is trained on, and other roles' turns
    that are trained on."""
    ids, labels = row.input_ids, row.labels
    for i in range(1, len(ids)):
        if (
            labels[i] == IGNORED
            and labels[i - 1] != IGNORED
            and ids[i] in facts.stops
            and ids[i - 1] not in facts.stops
        ):
            yield "turn_end", f"its token {i} ends the turn but is masked"
            break
    yield from _headers(facts, row)


# --- what is said, and whether it is still there ------------------------------------------------------------------------


@dataclass
class _Walk:
    """Searches a row's text turn by turn: each text must come after the one before it."""

    text: str
    at: int = 0

    def kept(self, text: str) -> str:
        """How much of a text comes next: "exact" but for white space around it, "dense" but for any, or nothing ("").

        As it is, or as JSON, in which Llama 3.1's template writes the results of tools.
        """
        bare = text.strip()
        forms = (bare, *(json.dumps(bare, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)))
        for form in forms:
            if (begin := self.text.find(form, self.at)) >= 0:
                self.at = begin + len(form)
                return "exact"
        rest = _dense(self.text[self.at :])
        return "dense" if any(_dense(form) in rest for form in forms) else ""


def _lost_texts(renderer: Renderer, facts: Facts, row: EncodedRow) -> Findings:
    messages, walk = [*row.messages, row.reply], _Walk(row.text)
    for number, message in enumerate(messages, start=1):
        yield from _message(renderer, facts, row, number, message, walk)
    yield from _calls(renderer, facts, row, messages)
    yield from _white_space(renderer, row, messages)
    if row.tools and not facts.writes_tools:
        yield "tools", f"offers {len(row.tools)} tools"


def _message(
    renderer: Renderer, facts: Facts, row: EncodedRow, number: int, message: Mapping[str, Any], walk: _Walk
) -> Findings:
    role, content = message["role"], text_of(message.get("content"))
    earlier = role == "assistant" and message is not row.reply
    thought = "" if earlier else message.get(THINKING[0]) or ""  # a server leaves out earlier thinking as well
    texts = texts_in(message.get("content"))
    if role in ("system", "developer"):
        if content.strip() and not facts.writes_system:
            yield "system", f"its system message {content.strip()[:40]!r}"
            texts = []
        walk = _Walk(row.text)  # some templates write it into the last question
    for text, what in ((thought, "the reasoning of "), *((text, "") for text in texts)):
        if (kept := walk.kept(text)) != "exact":
            lost = "white_space" if kept else "prefix_stable" if earlier else "content"
            yield lost, f"{what}its turn {number} ({role}): {text.strip()[:40]!r}"
    written = content if len(message) == 2 else compact(message)  # thinking and calls are read as well
    if mark := renderer.marks.search(written):
        yield "special_text", f"{mark.group()!r} in turn {number} ({role})"


def _calls(renderer: Renderer, facts: Facts, row: EncodedRow, messages: Sequence[Mapping[str, Any]]) -> Findings:
    """Turns of which the template leaves out a call, its name or a value of its arguments.

    Rendered again with marks in their place, since `f` and `1` stand in any text.
    """
    turns = [number for number, message in enumerate(messages, start=1) if message.get("tool_calls")]
    if not facts.writes_calls or not turns:
        yield from (("tool_calls", f"its turn {number}") for number in turns)
        return
    marks: dict[str, str] = {}  # and what it stands for
    changed = [_marked_turn(message, number, marks) for number, message in enumerate(messages, start=1)]
    try:
        written = renderer.render(changed, row.tools, True, row.variables)
    except TemplateRefusal:  # it takes the row's own names only
        return
    yield from (("tool_calls", message) for mark, message in marks.items() if mark not in written)


def _marked_turn(message: Mapping[str, Any], number: int, marks: dict[str, str]) -> Mapping[str, Any]:
    calls = [
        {**call, "function": _marked_call(call["function"], f"call {place} of its turn {number}", marks)}
        for place, call in enumerate(message.get("tool_calls") or (), start=1)
    ]
    return {**message, "tool_calls": calls} if calls else message


def _marked_call(function: Mapping[str, Any], where: str, marks: dict[str, str]) -> Mapping[str, Any]:
    return {**function, **{key: _marked(function.get(key), where, marks) for key in ("name", "arguments")}}


def _marked(value: Any, where: str, marks: dict[str, str]) -> Any:
    """A value of the same form with a mark of its own in place of each text and number."""
    if isinstance(value, Mapping):
        return {key: _marked(item, where, marks) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, where, marks) for item in value]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    number = FIRST_MARK + len(marks)
    mark: Any = f"qkit{number}" if isinstance(value, str) else number if isinstance(value, int) else number + 0.5
    marks[str(mark)] = f"{where}: {compact(value)[:40]}"
    return mark


def _white_space(renderer: Renderer, row: EncodedRow, messages: Sequence[Mapping[str, Any]]) -> Findings:
    """Learnt turns of which the template leaves out white space at the beginning or the end: it writes them as it writes them without.

    (Of a question it is left out by a server too.) Rendered again, since white space that is gone cannot be told from the white space
    that a template puts around a turn. What is learnt all the same, as the line ends within <think> are, is not lost.
    """
    whole, learnt = -1, ""
    for turn, key, text, replaced in _pieces(renderer, row, messages):
        if text == text.strip() or not text.strip() or text.strip() not in row.text:
            continue
        whole = whole if whole >= 0 else _written(renderer, row, messages)
        learnt = learnt or _learnt(renderer, row)
        for place, cut in (("beginning", text.lstrip()), ("end", text.rstrip())):
            gone = len(text) - len(cut)
            changed = [*messages[:turn], {**messages[turn], key: replaced(cut)}, *messages[turn + 1 :]]
            around = text[: len(text.rstrip())] if place == "beginning" else text[len(text) - len(text.lstrip()) :]
            if gone and whole - _written(renderer, row, changed) < gone and around not in learnt:
                white = text[:gone] if place == "beginning" else text[-gone:]
                what = "" if key == "content" else "the reasoning of "
                yield "white_space", f"{white[:20]!r} at the {place} of {what}its turn {turn + 1} (assistant)"


Piece = tuple[int, str, str, Callable[[str], Any]]


def _pieces(renderer: Renderer, row: EncodedRow, messages: Sequence[Mapping[str, Any]]) -> Iterator[Piece]:
    """The texts of learnt turns, and what their value is with another text in place of one.

    What is said in parts is one text, or to a template that goes through them a text each.
    """
    for turn in row.turns:
        for key in ("content", THINKING[0]):
            value = messages[turn].get(key) or ""
            parts = texts_in(value)
            if len(parts) > 1 and goes_through_parts(
                renderer.tokenizer.get_chat_template(tools=list(row.tools) or None)
            ):
                for place, part in enumerate(parts):
                    yield turn, key, part, functools.partial(_with_part, parts, place)
            else:
                yield turn, key, str(text_of(value)), str


def _with_part(parts: Sequence[str], place: int, text: str) -> Parted:
    return Parted([*parts[:place], text, *parts[place + 1 :]])


def _learnt(renderer: Renderer, row: EncodedRow) -> str:
    """What carries loss, as text."""
    return "\0".join(renderer.tokenizer.decode(row.input_ids[begin:end]) for begin, end in spans(row.labels))


def _written(renderer: Renderer, row: EncodedRow, messages: Sequence[Mapping[str, Any]]) -> int:
    """How many characters the template writes for these turns; 0 where it refuses them."""
    try:
        return len(renderer.render(messages, row.tools, True, row.variables))
    except TemplateRefusal:
        return 0


def _dense(text: str) -> str:
    """Text without white space, which templates trim and add."""
    return "".join(text.split())


# --- the mask, read back ------------------------------------------------------------------------------------------------


def spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches of tokens that carry loss: (first, one past the last)."""
    stretches, begin = [], None
    for index, label in enumerate([*labels, IGNORED]):
        if label != IGNORED and begin is None:
            begin = index
        elif label == IGNORED and begin is not None:
            stretches.append((begin, index))
            begin = None
    return stretches


def _mask(renderer: Renderer, row: EncodedRow) -> Findings:
    """The learnt tokens, decoded: as many stretches as turns; the last one is the answer and the end of its turn."""
    stretches = spans(row.labels)
    if len(stretches) != len(row.turns):
        yield "mask", f"has {len(stretches)} spans that carry loss, for {len(row.turns)} turns"
        return
    if stretches and stretches[-1][0] != row.start:
        yield "mask", f"carries loss from token {stretches[-1][0]}, but its answer begins at {row.start}"
        return
    contents = [*(text_of(row.messages[turn].get("content")) for turn in row.turns[:-1]), row.answer]
    for (begin, end), content in zip(stretches, contents, strict=True):
        learnt = _dense(renderer.tokenizer.decode(row.input_ids[begin:end]))
        if not _holds(renderer, learnt, content) or not learnt.endswith(_dense(renderer.ending)):
            yield "mask", f"carries loss on {learnt[:40]!r}, but the answer is {content.strip()[:40]!r}"
            return


def _holds(renderer: Renderer, learnt: str, content: str) -> bool:
    """Whether decoded text holds what was said: to the letter, or as the tokenizer gives it back (Qwen's composes accents)."""
    return _dense(content) in learnt or _dense(renderer.tokenizer.decode(renderer.encode([content])[0])) in learnt
