"""A conversation in the terminal, or over pipes: reads what is typed, shows answers as they come."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.commands.talk.reply import STOPPED
from qkit.commands.talk.typed import Command, Typing, help_text, read
from qkit.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from qkit.commands.talk.dialogue import Answering, Dialogue
    from qkit.commands.talk.reply import Reply

PROMPT, MORE = "> ", "... "
# Characters that would move the cursor or worse, as pictures of them: a model may write anything.
CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
LEAVE = "Ctrl-C again or Ctrl-D leaves"


@dataclass
class Screen:
    """Answers go to stdout, all else to `notes`. `is_terminal`: somebody types, so an error does not end the conversation."""

    dialogue: Dialogue
    notes: Console
    is_terminal: bool
    as_json: bool = False
    quiet: bool = False
    interrupted: bool = False  # by the last thing that was typed

    def run(self) -> None:
        """Talk until the input ends, or /quit.

        Raises:
            UserError: a question or a command is wrong, and nobody types.
        """
        for message in self._messages():
            try:
                if message.strip() and not self._take(message):
                    return
            except UserError as error:
                if not self.is_terminal:
                    raise
                self.note(f"error: {error}")

    def _messages(self) -> Iterator[str]:
        typing = Typing()
        while True:
            try:
                line = self._line(MORE if typing.is_open else PROMPT)
            except EOFError:
                if typing.is_open:
                    yield typing.end()
                return
            except KeyboardInterrupt:
                if self.interrupted or not self.is_terminal:
                    return
                self.interrupted, typing = True, Typing()
                self.note(f"\n{LEAVE}")
                continue
            self.interrupted = False
            if (message := typing.take(line)) is not None:
                yield message

    def _line(self, prompt: str) -> str:
        if self.is_terminal:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _take(self, message: str) -> bool:
        """Answer a question or follow a command; whether the conversation goes on."""
        what = read(message)
        if isinstance(what, Command):
            return self._follow(what)
        self._show(what, self.dialogue.next(what))
        return True

    def _follow(self, command: Command) -> bool:
        dialogue, rest = self.dialogue, command.rest
        if command.name == "/quit":
            return False
        if command.name == "/help":
            self.note(help_text())
        if command.name == "/reset":
            dialogue.reset()
        if command.name == "/system":
            dialogue.reset(rest)
        if command.name == "/regen":
            self._show(dialogue.question or "", dialogue.again())
        if command.name == "/save":
            self.note(f"row {dialogue.save(Path(rest).expanduser())} of {rest}")
        return True

    def _show(self, question: str, answers: Iterator[Answering]) -> None:
        """Show the answers of all speakers. Ctrl-C ends one; those that follow are left out."""
        for answering in answers:
            reply = answering.reply
            if self.interrupted:
                reply.reason = STOPPED
                continue
            try:
                self._stream(answering)
            except KeyboardInterrupt:
                if not self.is_terminal:
                    raise
                reply.reason, self.interrupted = STOPPED, True
            if self.as_json:
                line = {"question": question, "model": answering.name, **reply.to_dict()}
                print(json.dumps(line, ensure_ascii=False), flush=True)
            else:
                self._end(reply)

    def _stream(self, answering: Answering) -> None:
        if not self.as_json and len(self.dialogue.speakers) > 1:
            print(f"{answering.name}:")
        for piece in answering.pieces:
            if not self.as_json:
                sys.stdout.write(piece.translate(CONTROL) if self.is_terminal else piece)
                sys.stdout.flush()

    def _end(self, reply: Reply) -> None:
        """End the line of an answer; name its tool calls, and what it took."""
        print(flush=True)
        for call in reply.tool_calls():
            line = f"[tool call] {call['name']} {json.dumps(call['arguments'], ensure_ascii=False)}"
            print(line, flush=True) if reply.calls else self.note(line)
        if not self.quiet:
            self.note(statistics(reply))

    def note(self, text: str) -> None:
        """Show a line that is no answer."""
        self.notes.print(text, highlight=False, soft_wrap=True, style="dim")


def statistics(reply: Reply) -> str:
    """`42 tokens, 35.1 tokens/s, first after 0.21 s; 12 of 250 prompt tokens computed`."""
    parts = [f"{reply.tokens:,} tokens" if reply.tokens is not None else "tokens unknown"]
    if reply.tokens_per_second is not None:
        parts.append(f"{reply.tokens_per_second:,.1f} tokens/s")
    if reply.first_seconds is not None:
        parts.append(f"first after {reply.first_seconds:.2f} s")
    if reply.reason in ("length", STOPPED):
        parts.append({"length": "cut at its maximum length"}.get(reply.reason, STOPPED))
    if reply.prompt_tokens is None:
        return ", ".join(parts)
    computed = "" if reply.computed_tokens is None else f"{reply.computed_tokens:,} of "
    return f"{', '.join(parts)}; {computed}{reply.prompt_tokens:,} prompt tokens{' computed' if computed else ''}"


def edit_lines() -> None:
    """Let the arrow keys edit what is typed, and go through what was typed before, where Python can do that."""
    with suppress(ImportError):
        import readline  # noqa: F401 (that it is imported is all that `input` needs)
