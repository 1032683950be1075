"""What a kind of task must offer; `tasks/NAME.py` is found by its name.

METRIC                      what the score counts, in words
conversation(record, ...)   a record of a data source as prompt, answer and reference
correct(prediction, ...)    whether a prediction counts
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from qkit.recipe import Data, Evaluate

Message = Mapping[str, str]


class RowError(ValueError):
    """A record that cannot be used; the message says why, the caller says where."""


@dataclass(frozen=True)
class Conversation:
    """One example: the turns before the answer, the answer to be learnt, and what predictions are compared with."""

    prompt: tuple[Message, ...]
    answer: str
    reference: Any


class Task(Protocol):
    """The functions of a module in tasks/."""

    METRIC: str

    def conversation(self, record: Mapping[str, Any], accepted: Any, section: Data) -> Conversation:
        """A record as a conversation. `accepted` is its entry in the source's answers file, or None.

        Raises:
            RowError: the record is not of this task's form.
        """

    def correct(self, prediction: str, reference: Any, section: Evaluate) -> bool:
        """Whether a prediction counts as right."""


def open_task(name: str) -> Task:
    """The task of that name."""
    module: Any = importlib.import_module(f"qkit.tasks.{name}")
    found: Task = module
    return found
