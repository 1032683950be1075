"""What is looked at before training, check by check: what was found, in which rows, how bad it is, and what to do.

A check that fails stops the stage `data`: training on these rows would teach something that nobody wants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qkit.recipe.schema import Data

NAMED_ROWS = 5  # of the rows that a check found, how many it names


@dataclass(frozen=True)
class Place:
    """Where a row came from: the file or data set, and its line."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Check:
    """`status`: pass, warn, fail or skipped. `rows`: the first that were found; `found`: how many there are."""

    name: str
    status: str
    message: str
    found: int = 0
    rows: tuple[Place, ...] = ()
    remedy: str = ""


@dataclass(frozen=True)
class Kind:
    """A check over rows: what it means when nothing, or something, is found. `status`: of what is found."""

    passes: str
    problem: str
    status: str
    remedy: str


# In the order in which they are shown. What is found in a row is said by whoever finds it; this says what it means.
KINDS: Mapping[str, Kind] = {
    "malformed": Kind(
        "every record is in a known format",
        "cannot be read",
        "fail",
        "correct them, map their columns with data.columns, or drop them with data.clean.malformed=drop",
    ),
    "roles": Kind(
        "turns come in an order that can be learnt from",
        "have turns in an order that cannot be learnt from",
        "fail",
        "correct them, or drop them with data.clean.roles=drop",
    ),
    "unicode": Kind(
        "no broken characters", "hold broken characters", "warn", "correct the encoding where the rows were made"
    ),
    "empty": Kind("no row is empty", "have nothing to learn", "warn", "find out where they come from"),
    "duplicate": Kind(
        "no row comes twice",
        "are there again, to the letter",
        "warn",
        "keep them with data.clean.duplicate=keep if it is meant",
    ),
    "near_duplicate": Kind(
        "no row comes nearly twice",
        "are nearly there again",
        "warn",
        "look at a few; data.clean.near_duplicate=drop leaves one of each kind",
    ),
    "template": Kind(
        "the chat template takes every conversation",
        "are refused by the chat template",
        "fail",
        "take a template that knows these roles (model.chat_template), or change the rows",
    ),
    "system": Kind(
        "every system turn is in what the model reads",
        "lose their system turn: the template leaves it out",
        "fail",
        "take a template that writes system turns (model.chat_template), or put the text into the user turn",
    ),
    "content": Kind(
        "every turn's text is in what the model reads",
        "lose text on the way through the template",
        "fail",
        "take a template that writes every turn, thinking too (model.chat_template), or do without the thinking "
        "(data.ignore='[messages.reasoning_content]', or as your rows call it)",
    ),
    "tools": Kind(
        "every offered tool is in what the model reads",
        "offer tools that the template leaves out",
        "fail",
        "take a template that writes tools (model.chat_template), or describe them in the system turn",
    ),
    "tool_calls": Kind(
        "every tool call is in what the model reads",
        "hold tool calls that the template writes as nothing",
        "fail",
        "take a template that writes tool_calls (model.chat_template), or write the call as the turn's text",
    ),
    "generation_prompt": Kind(
        "the prompt a server sends is a true prefix of what is trained on",
        "are written differently once answered",
        "fail",
        "take a template whose generation prompt is what it writes before an answer (model.chat_template)",
    ),
    "turn_end": Kind(
        "the token that ends a turn carries loss in every turn that is learnt",
        "never learn to stop: the token that ends the turn carries no loss",
        "fail",
        "end the assistant's turn with a special token in the template; in rows tokenized elsewhere, unmask it (it is often masked "
        "together with the padding, where both are one token)",
    ),
    "bos": Kind(
        "the text begins with the beginning-of-sequence token as often as the model expects",
        "begin with the beginning-of-sequence token twice, or lack it",
        "fail",
        "write it once: in the template, or in the text, not in both",
    ),
    "mask": Kind(
        "the tokens that carry loss read as the turns to be learnt",
        "carry loss elsewhere than on the turns to be learnt",
        "fail",
        "this is a fault of qkit: please report it with the row",
    ),
    "headers": Kind(
        "no user or system turn carries loss",
        "carry loss on the start of a turn: the model learns to speak for the user",
        "warn",
        "mask everything but the assistant's turns",
    ),
    "joins": Kind(
        "tokens stay the same where an answer joins its prompt",
        "have other tokens where an answer joins its prompt",
        "warn",
        "qkit trains on what a server would send; elsewhere, tokenize prompt and answer apart",
    ),
    "prefix_stable": Kind(
        "turns read the same once the conversation has gone on",
        "hold turns that the template writes differently once the conversation has gone on (thinking left out, say)",
        "warn",
        "such a turn is learnt in a row of its own, with the prompt a server would send; that takes more tokens",
    ),
    "rounded": Kind(
        "no number was rounded when its table was read",
        "hold numbers beyond 2**63 that are floats in their table: were they integers, their last digits are gone",
        "warn",
        "write such numbers as text, or give the rows as JSON lines, which keep every digit",
    ),
    "special_text": Kind(
        "no text spells a special token",
        "spell a special token in their text, which the model reads as the token itself",
        "warn",
        "take it out of the text unless it is meant",
    ),
    "vocabulary": Kind(
        "every token id is in the model's vocabulary",
        "hold token ids that the model does not have",
        "fail",
        "tokenize with this model's own tokenizer",
    ),
    "length": Kind(
        "every row fits data.max_length",
        "are longer than data.max_length and left out",
        "warn",
        "raise data.max_length, or choose data.too_long=truncate_prompt (text: split)",
    ),
    "prompt_cut": Kind(
        "no prompt is cut", "lose their oldest turns to data.max_length", "warn", "raise data.max_length"
    ),
    "answer_cut": Kind(
        "no answer is cut",
        "have the end of their answer cut, and never learn to stop there",
        "warn",
        "raise data.max_length, or choose data.too_long=drop or truncate_prompt",
    ),
    "loss_tokens": Kind(
        "every row has something to learn",
        "have no token that carries loss",
        "warn",
        "see their labels, weights or train marks",
    ),
}


# What is found under another name than a check's own is the lesser degree of it: said, and no reason to stop.
LESSER: Mapping[str, tuple[str, Kind]] = {
    "white_space": (
        "content",
        Kind(
            "",
            "lose white space on the way through the template, such as the indentation of code: what is learnt is the text without it",
            "warn",
            "take a template that writes turns as they are (model.chat_template), or strip the rows if nothing hangs on it",
        ),
    )
}


@dataclass
class Findings:
    """Collects what is found in rows: counts, the first places and the first words, by check."""

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[Place]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, source: str, line: int, message: str) -> None:
        """One more row in which check `name` found something."""
        self.counts[name] = self.counts.get(name, 0) + 1
        self.messages.setdefault(name, message)
        named = self.places.setdefault(name, [])
        if len(named) < NAMED_ROWS:
            named.append(Place(source, line))

    def checks(self, section: Data, skipped: Iterable[str] = ()) -> Iterator[Check]:
        """Every check over rows, in order."""
        left_out = set(skipped)
        lesser = {check: (name, kind) for name, (check, kind) in LESSER.items() if name in self.counts}
        for name, kind in KINDS.items():
            if name in self.counts:
                yield self._found(name, kind, section)
            elif name in lesser:
                yield replace(self._found(*lesser[name], section), name=name)
            elif name in left_out:
                yield Check(name, "skipped", "does not apply to these rows")
            else:
                yield Check(name, "pass", kind.passes)

    def _found(self, name: str, kind: Kind, section: Data) -> Check:
        rows = tuple(self.places[name])
        count = self.counts[name]
        message = f"{count:,} {'row' if count == 1 else 'rows'} {kind.problem}: {rows[0]} {self.messages[name]}"
        return Check(name, _status(name, kind, section), message, count, rows, kind.remedy)


def _status(name: str, kind: Kind, section: Data) -> str:
    """What the recipe says of the rules that it has a word on; dropping is consent, and still worth a word."""
    rule = getattr(section.clean, name, None)
    if rule is None:
        return kind.status
    return "fail" if rule == "fail" else "warn"


def failures(checks: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of checks as JSON, those that would spoil training."""
    return [check for check in checks if check["status"] == "fail"]


def refusal(failed: Iterable[Mapping[str, Any]]) -> str:
    """Failed checks as the message of an error."""
    return "\n".join(f"check {check['name']}: {check['message']}\n  {check['remedy']}" for check in failed)
