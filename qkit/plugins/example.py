"""Examples: what a task makes of the records of a data set, before they become token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]  # role, content, and what else the chat template knows, such as tool_calls


class RowError(ValueError):
    """A record that cannot be used. The message says why, the caller says where; `rule` is the key of data.clean it falls under."""

    def __init__(self, message: str, rule: str = "malformed"):
        super().__init__(message)
        self.rule = rule


@dataclass(frozen=True)
class Reads:
    """What a model's template reads beside what every template does: `variables`, and `keys` of a turn.

    `switches`: variables of which it asks only whether they are true.
    """

    variables: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()
    switches: frozenset[str] = frozenset()


NO_MORE = Reads()
ANSWER_KEYS = ("id", "ground_truth")  # of a row in a file of accepted answers
# The thinking of a turn, by the names that vLLM, OpenRouter and others gave it. Rows have it under the first, templates are given theirs.
THINKING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Conversation:
    """Turns that end with the assistant's. `trained`: by message, True or False where the record decides; else data.loss does.

    `reference` is what predictions of the last turn are compared with; None: the turn as the template writes it. `variables`: what the
    record gives to the template beside turns and tools, such as enable_thinking. `unread`: what of the record nothing reads, such as
    messages.id; `ignored`: the patterns of data.ignore that it has a name for.
    """

    messages: tuple[Message, ...]
    reference: Any = None
    tools: tuple[Mapping[str, Any], ...] = ()
    trained: tuple[bool | None, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = field(default=(), compare=False)
    ignored: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Text:
    """Plain text, learnt from its first token to its last."""

    text: str
    unread: tuple[str, ...] = field(default=(), compare=False)
    ignored: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Tokens:
    """A row that somebody else has tokenized: passed through. `labels`: -100 where there is no loss."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    unread: tuple[str, ...] = field(default=(), compare=False)
    ignored: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class LabelledText:
    """A text, or a pair of texts, with the names of its labels."""

    text: str
    pair: str | None
    labels: tuple[str, ...]
    unread: tuple[str, ...] = field(default=(), compare=False)
    ignored: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Question:
    """A question whose answer is a part of a context. `answers`: the texts that are accepted, and where each begins in it (characters); ()
    for a question that the context does not answer. `key`: its id in the data set, or "".

    `placed`: False where the record did not say where the answer begins, and it occurs several times.
    """

    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    key: str = ""
    placed: bool = True
    unread: tuple[str, ...] = field(default=(), compare=False)
    ignored: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class TaggedWords:
    """The words of a sentence, and a tag for each, as its source has them: in any scheme."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    unread: tuple[str, ...] = field(default=(), compare=False)
    ignored: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to one prompt, of which `chosen` is preferred: two conversations that differ in their last turn only."""

    chosen: Conversation
    rejected: Conversation
    unread: tuple[str, ...] = field(default=(), compare=False)
    ignored: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class RatedConversation:
    """A conversation whose last turn is good (`desirable`) or bad."""

    conversation: Conversation
    desirable: bool
    unread: tuple[str, ...] = field(default=(), compare=False)
    ignored: tuple[str, ...] = field(default=(), compare=False)


Example = Conversation | Text | Tokens | LabelledText | TaggedWords | Question | AnswerPair | RatedConversation


@dataclass(frozen=True)
class Identity:
    """What splits and duplicates go by. `question`: rows with the same one share a split; `content`: exact duplicates have the same one;
    `distinctive`: the part of the content that near-duplicates are compared by; `label`: what splits are stratified by; `group`: what shares
    a split where that is more than the question, such as all questions on a text.
    """

    question: str
    content: str
    distinctive: str
    label: str | None = None
    group: str | None = None


def without_thinking(text: str) -> str:
    """An answer without its reasoning, which the prompt may have opened already."""
    _, closed, answer = text.partition("</think>")
    return answer if closed else text
