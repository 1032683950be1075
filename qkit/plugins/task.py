"""The contract of a task: everything in qkit that depends on the kind of task. `tasks/NAME.py` holds the task NAME as `TASK`.

What several kinds share is in tasks/_FAMILY/: a task on conversations extends `ConversationTask` and decides what is its own.
docs/tasks.md shows how to add one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qkit.plugins.example import NO_MORE, Example, Identity, Reads, RowError
from qkit.recipe.schema import Data, Evaluate, Gate, Recipe

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from qkit.plugins.runtime import RowScores, Runtime


@dataclass(frozen=True)
class Head:
    """The model class that a task trains, by the names that libraries have for it."""

    auto_class: str  # transformers, such as "AutoModelForCausalLM"
    peft_task_type: str  # peft.TaskType, such as "CAUSAL_LM"
    pipeline_tag: str  # the Hugging Face Hub, such as "text-generation"


@dataclass(frozen=True)
class Request:
    """How a server is asked: for warm-up, the serve contract, the benchmark and the snippets that users copy."""

    endpoint: str  # such as "/v1/chat/completions"
    server_options: tuple[str, ...] = ()  # vLLM's, such as ("--runner", "pooling")


class Encoder(Protocol):
    """Examples to token ids. Opened once per process: it holds the tokenizer, and the chat template if the task uses one."""

    reads: Reads

    def encode(self, examples: Sequence[Example | RowError]) -> Sequence[Any]:
        """For each example its rows (a long text may become several) or the error that drops it."""

    def examine(self, row: Any, thoroughly: bool) -> Iterator[tuple[str, str]]:
        """The checks of data/checks.py that a row fails, as (check, message)."""

    def columns(self, row: Any, example: Example) -> Mapping[str, Any]:
        """The values of a prepared row, by `Task.columns`."""


class Task(Protocol):
    """A kind of task. Functions of torch and numpy import them inside."""

    METRIC: str  # what the score counts, for people
    HEAD: Head
    REQUEST: Request
    TRAINER: str  # train/trainers/NAME.py
    GATES: Mapping[str, Gate]  # default limits by kind of artifact: "exact", "16-bit", "quantized"

    # data: record -> example -> rows
    def example(
        self, record: Mapping[str, Any], accepted: Any, data_format: str, section: Data, reads: Reads = NO_MORE
    ) -> Example: ...
    def data_format(self, record: Mapping[str, Any], section: Data) -> str: ...
    def identity(self, example: Example) -> Identity: ...
    def columns(self) -> Mapping[str, str]: ...
    def encoder(self, recipe: Recipe) -> Encoder: ...

    # train, plan
    def collate(self, rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, torch.Tensor]: ...
    def head_outputs(self, recipe: Recipe, vocabulary: int) -> int: ...

    # evaluate, merge, verify
    def outputs(self, runtime: Runtime, rows: Sequence[Any]) -> Iterator[RowScores]: ...
    def predict(self, runtime: Runtime, rows: Any, section: Evaluate, advance: Callable[[int], None]) -> list[str]: ...
    def correct(self, prediction: str, reference: Any, section: Evaluate) -> bool: ...
    def distance(self, reference: RowScores, other: RowScores) -> NDArray[np.float32]: ...

    # report
    def question(self, row: Mapping[str, Any]) -> str: ...


def open_task(name: str) -> Task:
    """The task of that name."""
    task: Task = importlib.import_module(f"qkit.tasks.{name}").TASK
    return task
