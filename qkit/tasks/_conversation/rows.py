"""Rows of token ids and labels, and the error that drops one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qkit.chat.template import Messages
from qkit.core.batching import IGNORED
from qkit.plugins.example import RowError

Finding = tuple[str, str]  # the check that noticed something, and a message that says what


@dataclass(frozen=True)
class EncodedRow:
    """One row to train on. `input_ids`, `labels`: [tokens]; `start`: where the last completion begins.

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
    findings: tuple[Finding, ...] = ()
    names: tuple[str, ...] = ()  # labels, which conversations have none of

    @property
    def labelled(self) -> int:
        """Tokens that carry loss."""
        return sum(label != IGNORED for label in self.labels)


class Refused(RowError):
    """A row that cannot be trained on once it is rendered. `rule`: the check that it fails; `row`: the whole row, if there is one."""

    def __init__(self, message: str, rule: str, row: EncodedRow | None = None):
        super().__init__(message, rule)
        self.row = row
