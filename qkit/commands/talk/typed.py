"""What is typed: messages over one or more lines, and commands."""

from __future__ import annotations

from dataclasses import dataclass, field

from qkit.core.errors import UserError, nearest, short

BLOCK = '"""'
COMMANDS = {
    "/help": "list the commands",
    "/reset": "forget the conversation",
    "/system TEXT": "begin anew with this system turn; without TEXT, with none",
    "/regen": "answer the last question again",
    "/save FILE": "append the conversation to FILE.jsonl, as a row that qkit trains on",
    "/quit": "leave; Ctrl-D does too",
}
TYPING = 'A line that ends with \\ is continued; """ begins and ends a text of several lines. // begins a question with a slash.'


@dataclass(frozen=True)
class Command:
    """`name`: with its slash; `rest`: what follows it."""

    name: str
    rest: str = ""


@dataclass
class Typing:
    """Joins lines to messages."""

    lines: list[str] = field(default_factory=list)
    in_block: bool = False

    @property
    def is_open(self) -> bool:
        """Whether a message has begun and goes on."""
        return bool(self.lines) or self.in_block

    def take(self, line: str) -> str | None:
        """The message that this line completes; None if it goes on."""
        if self.in_block:
            return self._in_block(line)
        if not self.lines and line.lstrip().startswith(BLOCK):
            self.in_block = True
            return self._in_block(line.lstrip().removeprefix(BLOCK), first=True)
        if line.endswith("\\"):
            self.lines.append(line[:-1])
            return None
        self.lines.append(line)
        return self.end()

    def end(self) -> str:
        """What there is of the message, complete or not."""
        text = "\n".join(self.lines)
        self.lines, self.in_block = [], False
        return text.strip("\n")

    def _in_block(self, line: str, first: bool = False) -> str | None:
        closes = line.rstrip().endswith(BLOCK)
        text = line.rstrip().removesuffix(BLOCK) if closes else line
        if text or not (first or closes):
            self.lines.append(text)
        return self.end() if closes else None


def read(message: str) -> Command | str:
    """A message as a command, or as a question.

    Raises:
        UserError: there is no such command, or it lacks what it needs.
    """
    if not message.startswith("/") or message.startswith("//"):
        return message[1:] if message.startswith("//") else message
    name, _, rest = message.partition(" ")
    forms = {form.split()[0]: form for form in COMMANDS}
    if name not in forms:
        raise UserError(
            f"{short(name)}: no such command{nearest(name, [*forms])}; /help lists them, // begins a question with a slash"
        )
    if name == "/save" and not rest.strip():
        raise UserError("/save FILE: name a file, such as talk.jsonl")
    return Command(name, rest.strip())


def help_text() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    return "\n".join([*(f"{form:{width}}  {what}" for form, what in COMMANDS.items()), TYPING])
