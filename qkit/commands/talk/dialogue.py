"""A conversation with one or more speakers: every question goes to each, and each continues what it said itself."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qkit.commands.talk.reply import STOPPED, Reply
from qkit.commands.talk.speakers import Speaker
from qkit.core.errors import UserError
from qkit.core.files import writing


@dataclass
class Answering:
    """An answer that is being given: by whom, its `pieces` of text as they come, and all that is known of it."""

    name: str
    pieces: Iterator[str]
    reply: Reply


@dataclass
class Dialogue:
    """`turns`: what was said, by speaker; an interrupted answer counts as far as it came."""

    speakers: Mapping[str, Speaker]
    system: str | None = None
    turns: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    question: str | None = None  # the last one that was answered
    attempts: int = 0  # earlier answers to it

    def ask(self, question: str) -> Generator[Answering, None, bool]:
        """Yield an answer for each speaker, whose pieces are to be read before the next; returns whether they count.

        They do if every speaker said something, also where it was interrupted.
        """
        asked = {"role": "user", "content": question}
        given = []
        for name, speaker in self.speakers.items():
            reply = Reply()
            yield Answering(name, speaker.answer([*self.messages(name), asked], reply, self.attempts), reply)
            given.append((name, reply))
        if any(reply.reason == STOPPED and reply.is_empty for _, reply in given):
            return False
        self.question = question
        for name, reply in given:
            self.turns.setdefault(name, []).extend([asked, reply.message()])
        return True

    def again(self) -> Iterator[Answering]:
        """Answer the last question once more; the earlier answer stays if this one fails.

        Raises:
            UserError: nothing was asked.
        """
        if self.question is None:
            raise UserError("/regen: there is no answer yet")
        before = {name: list(turns) for name, turns in self.turns.items()}
        for turns in self.turns.values():
            del turns[-2:]
        self.attempts += 1
        answered = False
        try:
            answered = yield from self.ask(self.question)
        finally:
            if not answered:
                self.turns, self.attempts = before, self.attempts - 1

    def next(self, question: str) -> Iterator[Answering]:
        """Answer a new question."""
        self.attempts = 0
        return self.ask(question)

    def messages(self, name: str) -> list[dict[str, Any]]:
        """The conversation of a speaker so far."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *({key: turn[key] for key in turn if key != "train"} for turn in self.turns.get(name, []))]

    def reset(self, system: str | None = None) -> None:
        """Begin anew; with another system turn if one is given ("": with none)."""
        self.system = self.system if system is None else system
        self.turns, self.question, self.attempts = {}, None, 0

    def save(self, file: Path) -> int:
        """Append the conversation with the last speaker to a .jsonl file, as a row that qkit trains on; returns the row's number.

        An answer that was cut off is marked: it is not trained on.

        Raises:
            UserError: nothing was said, or the file is something else.
        """
        name = [*self.speakers][-1]
        messages = [*self.messages(name)[: bool(self.system)], *self.turns.get(name, [])]
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError("/save: there is no answer yet")
        if file.suffix != ".jsonl":
            raise UserError(f"/save {file}: the name must end with .jsonl")
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        lines = before.splitlines()
        if any("messages" not in _object(line) for line in lines):
            raise UserError(
                f"/save {file}: it exists, and its rows are not conversations (`messages`); name another file"
            )
        with writing(file), file.open("a", encoding="utf-8") as opened:
            row = json.dumps({"messages": messages}, ensure_ascii=False)
            opened.write(f"{'' if before.endswith(chr(10)) or not before else chr(10)}{row}\n")
        return len(lines) + 1


def _object(line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
