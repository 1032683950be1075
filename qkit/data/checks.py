"""The checks before training: what each one found, in which rows, how serious it is, and how to fix it.

A check that fails stops the stage `data`, because training on these rows would teach the model something wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qkit.recipe.schema import Data

NAMED_ROWS = 5  # how many of the rows that it found a check names


@dataclass(frozen=True)
class Place:
    """Where a row comes from: the file or data set, and the line."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Check:
    """`status`: pass, warn, fail or skipped. `found`: how many rows the check found; `rows`: the first of them."""

    name: str
    status: str
    message: str
    found: int = 0
    rows: tuple[Place, ...] = ()
    remedy: str = ""


@dataclass(frozen=True)
class Kind:
    """A check over rows. `passes`: its message when it finds nothing; `problem`: what is wrong with the rows that it finds, and `status`
    how serious that is."""

    passes: str
    problem: str
    status: str
    remedy: str


# In the order in which they are shown. The code that examines a row describes what it finds there; these texts say what that means.
KINDS: Mapping[str, Kind] = {
    "malformed": Kind(
        "every record has a known format",
        "cannot be read",
        "fail",
        "fix them, map their columns with data.columns, or drop them with data.clean.malformed=drop",
    ),
    "roles": Kind(
        "every conversation has a valid order of turns",
        "have an invalid order of turns",
        "fail",
        "fix them, or drop them with data.clean.roles=drop",
    ),
    "unicode": Kind("no invalid characters", "contain invalid characters", "warn", "fix the encoding at the source"),
    "empty": Kind("no empty rows", "are empty", "warn", "check how these rows were made"),
    "duplicate": Kind(
        "no exact duplicates",
        "are exact duplicates",
        "warn",
        "if repeating rows is intended, keep them with data.clean.duplicate=keep",
    ),
    "near_duplicate": Kind(
        "no near-duplicates",
        "are near-duplicates",
        "warn",
        "look at a few; data.clean.near_duplicate=drop keeps the first of each group",
    ),
    "template": Kind(
        "the chat template accepts every conversation",
        "are rejected by the chat template",
        "fail",
        "use a template that supports these roles (model.chat_template), or change the rows",
    ),
    "system": Kind(
        "the chat template writes every system message",
        "lose their system message: the chat template omits it",
        "fail",
        "use a template that writes system messages (model.chat_template), or move the text to the user message",
    ),
    "content": Kind(
        "the chat template writes the text of every message",
        "lose text in the chat template",
        "fail",
        "use a template that writes every message, reasoning included (model.chat_template), or ignore the reasoning "
        "(data.ignore='[messages.reasoning_content]', or the name that it has in your rows)",
    ),
    "tools": Kind(
        "the chat template writes every tool",
        "offer tools that the chat template omits",
        "fail",
        "use a template that writes tools (model.chat_template), or describe them in the system message",
    ),
    "tool_calls": Kind(
        "the chat template writes every tool call",
        "contain tool calls that the chat template omits",
        "fail",
        "use a template that writes tool_calls (model.chat_template), or write the call as the text of the message",
    ),
    "generation_prompt": Kind(
        "the prompt that a server sends is a prefix of every training row",
        "do not begin with the prompt that a server would send",
        "fail",
        "use a template whose generation prompt is exactly what it writes before an answer (model.chat_template)",
    ),
    "turn_end": Kind(
        "the end-of-turn token carries loss in every trained turn",
        "do not teach the model to stop: the end-of-turn token carries no loss",
        "fail",
        "end the assistant's turn with a special token in the template; in rows tokenized elsewhere, unmask that token (masking the "
        "padding masks it too when both are the same token)",
    ),
    "bos": Kind(
        "every text has the beginning-of-sequence token that the model expects",
        "have two beginning-of-sequence tokens, or none",
        "fail",
        "write the token once: either in the template or in the text",
    ),
    "mask": Kind(
        "the tokens that carry loss are the turns to train on",
        "carry loss on other tokens than the turns to train on",
        "fail",
        "this is a bug in qkit: please report it together with the row",
    ),
    "headers": Kind(
        "no user or system turn carries loss",
        "carry loss on the start of a turn: the model learns to speak for the user",
        "warn",
        "mask everything except the assistant's turns",
    ),
    "joins": Kind(
        "tokens do not change where an answer follows its prompt",
        "have different tokens where an answer follows its prompt",
        "warn",
        "qkit trains on the tokens that a server would send; in other tools, tokenize prompt and answer separately",
    ),
    "prefix_stable": Kind(
        "turns do not change as the conversation continues",
        "contain turns that the template writes differently once the conversation continues (without the reasoning, for example)",
        "warn",
        "qkit trains on such a turn in a separate row, with the prompt that a server would send; this takes more tokens",
    ),
    "rounded": Kind(
        "no number was rounded when its table was read",
        "contain numbers beyond 2**63 that the table stores as floats: if they were integers, their last digits are lost",
        "warn",
        "write such numbers as text, or provide the rows as JSON lines, which keep every digit",
    ),
    "special_text": Kind(
        "no text contains a special token",
        "contain the text of a special token, which the model reads as the token itself",
        "warn",
        "remove it from the text unless it is intended",
    ),
    "vocabulary": Kind(
        "every token id is in the model's vocabulary",
        "contain token ids that are not in the model's vocabulary",
        "fail",
        "tokenize with this model's own tokenizer",
    ),
    "length": Kind(
        "every row fits data.max_length",
        "are longer than data.max_length and dropped",
        "warn",
        "raise data.max_length, or set data.too_long=truncate_prompt (for plain text: split)",
    ),
    "prompt_cut": Kind(
        "no prompt is truncated", "lose their oldest turns to data.max_length", "warn", "raise data.max_length"
    ),
    "answer_cut": Kind(
        "no answer is truncated",
        "have a truncated answer, and do not teach the model to stop there",
        "warn",
        "raise data.max_length, or set data.too_long=drop or truncate_prompt",
    ),
    "loss_tokens": Kind(
        "every row has tokens that carry loss",
        "have no token that carries loss",
        "warn",
        "check their labels, weights or train marks",
    ),
}


# Findings under these names are milder forms of another check: they are reported as warnings and stop nothing.
LESSER: Mapping[str, tuple[str, Kind]] = {
    "white_space": (
        "content",
        Kind(
            "",
            "lose white space in the chat template, such as the indentation of code: training sees the text without it",
            "warn",
            "use a template that writes messages unchanged (model.chat_template), or strip the rows if white space does not matter",
        ),
    )
}


@dataclass
class Findings:
    """Collects what is found in rows, by check: how many rows, the first places, and the first message."""

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[Place]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, source: str, line: int, message: str) -> None:
        """Add a row in which check `name` found something."""
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
        message = f"{_rows(count, kind.problem)}: {rows[0]} {self.messages[name]}"
        return Check(name, _status(name, kind, section), message, count, rows, kind.remedy)


def _status(name: str, kind: Kind, section: Data) -> str:
    """The status of what is found; for a rule of data.clean the recipe decides. Rows that it drops still deserve a warning."""
    rule = getattr(section.clean, name, None)
    if rule is None:
        return kind.status
    return "fail" if rule == "fail" else "warn"


def failures(checks: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The checks (as JSON) that failed."""
    return [check for check in checks if check["status"] == "fail"]


def refusal(failed: Iterable[Mapping[str, Any]]) -> str:
    """The error message for failed checks."""
    return "\n".join(f"check {check['name']}: {check['message']}\n  {check['remedy']}" for check in failed)


SINGULAR = {
    "have": "has",
    "are": "is",
    "contain": "contains",
    "lose": "loses",
    "carry": "carries",
    "do": "does",
    "offer": "offers",
}


def _rows(count: int, problem: str) -> str:
    """`3 rows are empty`, `1 row is empty`."""
    verb, _, rest = problem.partition(" ")
    return f"1 row {SINGULAR.get(verb, verb)} {rest}" if count == 1 else f"{count:,} rows {problem}"
