"""The contract of a task: everything in qkit that depends on the kind of task. `tasks/NAME.py` holds the task NAME as `TASK`.

What several kinds share is in tasks/_FAMILY/: a task on conversations extends `ConversationTask` and decides what is its own.
docs/tasks.md shows how to add one.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qkit.plugins.checks import Check, Kind, SetRow
from qkit.plugins.example import NO_MORE, Example, Identity, Reads, RowError
from qkit.plugins.first_recipe import Start, Suggestion, Table
from qkit.plugins.sections import Evaluated, Figure, Section
from qkit.recipe.schema import Data, Evaluate, Gate, Recipe

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from qkit.plugins.resampling import Sample
    from qkit.plugins.runtime import RowScores, TextRow

    # (outputs of the head [n, ...], labels [n] or [n, ...]) -> losses, of the shape of the labels; crf: of the rows
    Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ModelHead:
    """The model class that a task trains, by the names that libraries have for it."""

    auto_class: str  # transformers, such as "AutoModelForCausalLM"
    peft_task_type: str  # peft.TaskType, such as "CAUSAL_LM"
    pipeline_tag: str  # the Hugging Face Hub, such as "text-generation"
    generates: bool = True  # tokens, from a head that the base model has; else the head is new, and reads whole texts


class Encoder(Protocol):
    """Examples to token ids. Opened once per process: it holds the tokenizer, and the chat template if the task uses one."""

    @property
    def reads(self) -> Reads: ...  # what the model's template reads
    @property
    def tokenizer(self) -> Any: ...
    @property
    def vocabulary(self) -> int: ...  # rows of the embedding

    def encode(self, examples: Sequence[Example | RowError]) -> Sequence[Any]: ...  # .rows, or .error that drops it
    def examine(self, row: Any, thoroughly: bool) -> Iterator[tuple[str, str]]: ...  # (check of Task.CHECKS, message)
    def columns(self, row: Any, example: Example) -> Mapping[str, Any]: ...  # values of Task.columns()
    def special_tokens(self) -> dict[str, Any]: ...  # the content of tokens.json
    def description(self, tokens: Mapping[str, Any]) -> dict[str, str]: ...  # for summary.json
    def ids_in_every_row(self, tokens: Mapping[str, Any]) -> set[int]: ...
    def setup_checks(self, tokens: Mapping[str, Any]) -> Iterator[Check]: ...  # of tokenizer and template


@dataclass(frozen=True)
class Prediction:
    """What a model says of a row. `text`: for people, and what `Task.correct` reads; `details`: further columns of predictions.jsonl;
    `outputs`: what else `Task.metrics` needs, such as probabilities."""

    text: str
    details: Mapping[str, Any]
    outputs: Any = None


@dataclass(frozen=True)
class ShownRow:
    """A prepared row as it is shown to people, token by token. `labels`: -100 where there is no loss; `titles`: by place, what begins there."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    titles: Mapping[int, str] = field(default_factory=dict)


class Losses(Protocol):
    """What a task has beside the rest if its TRAINER is `labelled`, and its head is new."""

    def add_to_head(self, model: PreTrainedModel, folder: Path, recipe: Recipe) -> None:
        """Add the modules that the head has beside those of transformers, with the weights that `folder` holds of them, if any."""
        ...

    def encoded(self, tokenizer: Any, record: Mapping[str, Any], section: Data) -> Iterator[tuple[str, Sequence[int]]]:
        """What a tokenizer makes of a prepared row's text: (column, values), equal to the row's if it is the tokenizer of training."""
        ...

    def losses(self, outputs: Any, batch: Mapping[str, torch.Tensor], loss: Loss) -> torch.Tensor:
        """The loss of each row [rows], summed over its labels. `outputs`: of the model; `batch`: what `collate` made."""
        ...


class Predictor(Protocol):
    """Predicts rows with an open model, by the settings of one recipe and one data folder: one prediction for each row, or for each row with
    those that continue it."""

    def predict(self, runtime: Any, rows: Sequence[Any], advance: Callable[[int], None]) -> list[Prediction]: ...


@dataclass(frozen=True)
class Prepared:
    """A request as what a runtime scores. `rows`: one or more, such as the windows of a long text; `kept`: what else its answer needs,
    such as its options, or the place in the text of each token."""

    rows: Sequence[TextRow]
    kept: Any = None

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.input_ids) for row in self.rows)


class Service(Protocol):
    """How a finished artifact answers requests: text in, JSON out. Opened from the artifact's folder alone, once per process.

    A request is a mapping: the texts under the names in FIELDS, and options under those in OPTIONS. One thread at a time may prepare;
    any may answer.
    """

    FIELDS: Sequence[str]  # of a request; a plain text stands for the first
    OPTIONS: Collection[str]  # further keys that a request may have
    max_length: int  # tokens of a row at most

    def prepare(self, requests: Sequence[Mapping[str, Any]]) -> list[Prepared | RowError]: ...
    def answer(self, prepared: Prepared, logits: Sequence[NDArray[np.float32]]) -> dict[str, Any]: ...
    def difference(
        self, expected: Mapping[str, Any], given: Mapping[str, Any], tolerance: float
    ) -> str: ...  # "": the same


class Task(Protocol):
    """A kind of task. The methods are documented where a family of tasks implements them: tasks/_conversation/task.py."""

    METRIC: str  # what the score is, for people
    BASELINE: str  # what the trained model is compared with: one of recipe.registry.BASELINES
    HEAD: ModelHead
    LOSSES: tuple[str, ...]  # that its recipes can name, the default first: train/losses.py
    TRAINER: str  # train/trainers/NAME.py
    LENGTH_STEP: int  # rows are padded to a multiple of this many tokens
    GATES: Mapping[str, Gate]  # default limits by kind of artifact: "exact", "16-bit", "quantized"
    UNSCORED: Collection[str]  # data formats whose rows have no answer to score
    SCORED_IN_PARTS: Collection[
        str
    ]  # data formats of which all rows of a held-out record are scored, not only its first
    ANSWERS_ARE_SCORED: bool  # predictions are what a model generates; else only `predictor` makes them
    READS_VALIDATION: bool  # whether `tune` chooses anything on validation rows
    CHECKS: Mapping[str, Kind]  # over rows, in the order in which they are shown
    LESSER_CHECKS: Mapping[str, tuple[str, Kind]]  # milder forms of one of them: name -> (check, its texts)
    FIGURES: Sequence[Figure]  # of `metrics`: those that are shown beside the score, in their order
    LABEL_FIGURE: Figure | None  # `metrics` has it for each label, as NAME:LABEL; by it the worst labels are named

    def clashes(
        self, recipe: Recipe
    ) -> Iterator[tuple[tuple[str | int, ...], str]]: ...  # values without a meaning here
    def defaults(self, raw: Mapping[str, Any]) -> Mapping[str, Any]: ...  # section -> values where a recipe has none

    # init
    START: Start  # what a first recipe starts with

    def suggestion(
        self, table: Table
    ) -> Suggestion | None: ...  # how the task would read these records; None: not at all

    # data: record -> example -> rows
    def example(
        self, record: Mapping[str, Any], accepted: Any, data_format: str, section: Data, reads: Reads = NO_MORE
    ) -> Example: ...
    def data_format(self, record: Mapping[str, Any], section: Data) -> str | None: ...
    def unknown_column(self, section: Data, reads: Reads) -> str: ...
    def known_names(self, name: str, data_format: str, reads: Reads) -> Iterable[str]: ...
    def misplaced(self, name: str, data_format: str) -> str: ...
    def identity(self, example: Example) -> Identity: ...
    def columns(self) -> Mapping[str, str]: ...  # column -> list<int32>, int32, float or string
    def encoder(self, recipe: Recipe) -> Encoder: ...
    def tokenizer(self, recipe: Recipe) -> Any: ...  # that of the encoder, opened alone
    def token_labels(self, record: Mapping[str, Any]) -> Sequence[int]: ...  # by token; -100: no loss
    def shown(self, record: Mapping[str, Any]) -> ShownRow: ...  # `record`: the columns that are lists of ints
    def labels(
        self, rows: Sequence[SetRow]
    ) -> Mapping[str, Any]: ...  # of labels.json: names by label id ...; or nothing
    def with_label_ids(self, batch: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch: ...
    def set_checks(self, rows: Sequence[SetRow], recipe: Recipe) -> Iterator[Check]: ...

    # train, plan
    def collate(self, rows: Sequence[Mapping[str, Any]], pad: int, packed: bool = False) -> dict[str, torch.Tensor]: ...
    def head_config(self, labels: Sequence[str]) -> Mapping[str, Any]: ...  # keys of config.json
    def head_outputs(self, recipe: Recipe, vocabulary: int) -> int: ...  # outputs of the head for one position

    # evaluate, merge, verify. `record`: a prepared row with all columns; what `row` returns is what runtimes score.
    def row(self, record: Mapping[str, Any]) -> Any: ...
    def reference(self, record: Mapping[str, Any]) -> Any: ...
    def continues(self, record: Mapping[str, Any]) -> bool: ...  # the prediction of the row before it
    def outputs(self, runtime: Any, rows: Sequence[Any]) -> Iterator[RowScores]: ...
    def baseline(self, data: Path) -> Any: ...  # what a runtime opens, where the head is new
    def tune(
        self, runtime: Any, recipe: Recipe, data: Path
    ) -> Mapping[str, float]: ...  # settings of its predictions, chosen on the validation rows
    def predictor(self, recipe: Recipe, data: Path, tuned: Mapping[str, float]) -> Predictor: ...
    def metrics(
        self, predictions: Sequence[Prediction], references: Sequence[Any], data: Path, section: Evaluate, seed: int
    ) -> Mapping[str, Any]: ...  # name -> {value, low, high}; beside the score. support:LABEL: how many rows it has
    def correct(
        self, prediction: str, reference: Any, section: Evaluate
    ) -> float: ...  # True, False, or more is better
    def sample(
        self, predictions: Sequence[str], references: Sequence[Any]
    ) -> Sample | None: ...  # with the figure SCORE
    def distance(self, reference: RowScores, other: RowScores) -> NDArray[np.float32]: ...

    # evaluate, report
    def question(self, record: Mapping[str, Any]) -> str: ...
    def answer(self, record: Mapping[str, Any]) -> str: ...
    def sections(self, evaluated: Evaluated) -> Sequence[Section]: ...  # of the report, beyond those of every run
    def usage(self, library: str, recipe: Recipe) -> str: ...  # Markdown for the model card; "": as a chat model

    # serve, predict. `folder`: an artifact with its tokenizer and config.json; None, and no endpoint: a task that generates text
    ENDPOINT: str  # the path of its requests on a server, such as "/classify"
    EXAMPLE: Mapping[str, Any]  # a request, by the fields of its Service
    WHOLE: Mapping[str, Any]  # the options of a request whose answer leaves nothing out

    def request(self, record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]: ...
    def service(self, folder: Path, max_length: int) -> Service | None: ...


SCORE = "score"  # the figure of Task.sample, where the score is not the share of right rows: 1 is 100
LABELS = "labels.json"  # in a data folder or a trained one: the names by label id


def read_labels(folder: Path) -> tuple[str, ...]:
    """The label names of a data folder or of what was trained on it, by id; () for a task without labels."""
    file = folder / LABELS
    return tuple(json.loads(file.read_text(encoding="utf-8"))["names"]) if file.is_file() else ()


def open_task(name: str) -> Task:
    """The task of that name."""
    task: Task = importlib.import_module(f"qkit.tasks.{name}").TASK
    return task
