"""What every task on conversations decides alike: a causal language model learns answers, and is compared by its next-token distributions.

Light to import: `qkit plan` reads HEAD and `head_outputs`; the rest is imported where it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.batching import LENGTH_STEP
from qkit.plugins.example import Conversation, Example, Identity, Reads, RowError, Text, Tokens
from qkit.plugins.first_recipe import Suggestion, Table
from qkit.plugins.sections import Evaluated, Figure, Section
from qkit.plugins.task import ModelHead, Prediction, ShownRow
from qkit.recipe.schema import Data, Evaluate, Gate, Recipe
from qkit.tasks._conversation import _methods
from qkit.tasks._conversation._first_recipe import START
from qkit.tasks._conversation.checks.kinds import CONVERSATION_CHECKS, LESSER_CHECKS
from qkit.tasks._texts import preference_clashes, windows_clashes

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from numpy.typing import NDArray

    from qkit.plugins.checks import Check, SetRow
    from qkit.plugins.resampling import Sample
    from qkit.plugins.runtime import RowScores, Runtime, TokenRow
    from qkit.tasks._conversation.answerer import Answerer
    from qkit.tasks._conversation.encoder import ConversationEncoder


class ConversationTask:
    """Everything of the contract but METRIC, `example` and `correct`."""

    BASELINE = "base"
    HEAD = ModelHead("AutoModelForCausalLM", "CAUSAL_LM", "text-generation")
    LOSSES: tuple[str, ...] = ()  # cross-entropy over tokens, always
    TRAINER = "sft"
    LENGTH_STEP = LENGTH_STEP
    # In excess of rounding and chance; benchmarks/results/gates.json lists what intact and broken artifacts measure.
    GATES: Mapping[str, Gate] = {
        "exact": Gate(top1=1.0, max_difference=1e-3),
        "16-bit": Gate(kl_mean=1e-4, kl_row=0.05),
        "quantized": Gate(kl_mean=0.1, kl_row=2.0, score=True),
    }
    CHECKS = CONVERSATION_CHECKS
    LESSER_CHECKS = LESSER_CHECKS
    UNSCORED = frozenset({"text", "tokenized"})  # data formats without a question to answer
    SCORED_IN_PARTS = frozenset({"text"})
    ANSWERS_ARE_SCORED = True
    READS_VALIDATION = False
    FIGURES: Sequence[Figure] = ()
    LABEL_FIGURE: Figure | None = None

    def clashes(self, recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """What only tasks with labels have, and what the method cannot have."""
        for_labels = f"is for tasks with labels, and task={recipe.task} has none: remove it"
        yield from _methods.clashes(recipe)
        for section in ("bottleneck", "head", "loss"):
            if getattr(recipe, section) != type(getattr(recipe, section))():
                yield (section,), f"{section} {for_labels}"
        if recipe.data.label_separator is not None:
            yield ("data", "label_separator"), f"data.label_separator {for_labels}"
        yield from windows_clashes(recipe)
        yield from self.further_clashes(recipe)
        if recipe.data.too_long == "truncate":
            yield (
                ("data", "too_long"),
                f"data.too_long=truncate {for_labels} (truncate_prompt keeps the end of a conversation)",
            )

    def further_clashes(self, recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Further values that the task has no use for, by default the sections of others."""
        return preference_clashes(recipe)

    def defaults(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Those of the schema."""
        return {}

    # --- init ---------------------------------------------------------------------------------------------------------

    START = START

    def suggestion(self, table: Table) -> Suggestion | None:
        """How the records of a data set are conversations, or text; None if they are neither."""
        from qkit.tasks._conversation._first_recipe import of_conversations

        return of_conversations(table)

    # --- data ---------------------------------------------------------------------------------------------------------

    def data_format(self, record: Mapping[str, Any], section: Data) -> str | None:
        """The format that a record is recognised as; None if it is the task's own."""
        from qkit.tasks._conversation import formats

        try:
            return formats.recognised(record, section)
        except RowError:
            return None

    def unknown_column(self, section: Data, reads: Reads) -> str:
        """The error for a name in data.columns that nothing reads, or ""."""
        from qkit.tasks._conversation import formats

        return formats.unknown_column(section, reads)

    def known_names(self, name: str, data_format: str, reads: Reads) -> Iterable[str]:
        """The names that are read at the place of `name` in a record."""
        from qkit.tasks._conversation.known_names import known_names

        return known_names(name, data_format, reads)

    def misplaced(self, name: str, data_format: str) -> str:
        """Where a column belongs that is in the wrong place, or ""."""
        from qkit.tasks._conversation.known_names import belongs_in_a_turn

        return "it belongs in the assistant's turn" if belongs_in_a_turn(name, data_format) else ""

    def identity(self, example: Example) -> Identity:
        """The prompt; everything that is trained on; and the turns without the system's, which many conversations share."""
        from qkit.chat.template import compact, texts_of
        from qkit.core.batching import IGNORED

        if isinstance(example, Text):
            return Identity(example.text, example.text, example.text)
        if isinstance(example, Tokens):
            content = compact(example.input_ids)
            asked = [i for i, label in zip(example.input_ids, example.labels, strict=True) if label == IGNORED]
            question = compact(asked) if len(asked) > 1 else content
            return Identity(question, content + compact(example.labels), " ".join(map(str, example.input_ids)))
        assert isinstance(example, Conversation)
        tools = compact(example.tools) if example.tools else ""
        variables = compact(example.variables) if example.variables else ""
        content = tools + variables + compact(example.messages) + compact(example.trained)
        turns = texts_of(message for message in example.messages if message["role"] != "system")
        return Identity(tools + texts_of(example.messages[:-1]), content, turns)

    def columns(self) -> Mapping[str, str]:
        """The columns of a prepared row, with their Arrow types."""
        from qkit.tasks._conversation.encoder import COLUMNS

        return COLUMNS

    def encoder(self, recipe: Recipe) -> ConversationEncoder:
        """Open the tokenizer and the chat template of the recipe's model."""
        from qkit.tasks._conversation.encoder import open_encoder

        return open_encoder(recipe)

    def tokenizer(self, recipe: Recipe) -> Any:
        """The tokenizer with the recipe's chat template and tokens."""
        from qkit.model.tokenizer import tokenizer_of

        return tokenizer_of(recipe.model)

    def token_labels(self, record: Mapping[str, Any]) -> Sequence[int]:
        """The labels of a prepared row."""
        labels: Sequence[int] = record["labels"]
        return labels

    def shown(self, record: Mapping[str, Any]) -> ShownRow:
        """All tokens of a prepared row."""
        return ShownRow(record["input_ids"], self.token_labels(record))

    def labels(self, rows: Sequence[SetRow]) -> Mapping[str, Any]:
        """None: what is learned is text."""
        return {}

    def with_label_ids(self, batch: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
        """The rows as they are."""
        return batch

    def set_checks(self, rows: Sequence[SetRow], recipe: Recipe) -> Iterator[Check]:
        """None beside those that every task has."""
        return iter(())

    # --- train, plan --------------------------------------------------------------------------------------------------

    def collate(self, rows: Sequence[Mapping[str, Any]], pad: int, packed: bool = False) -> dict[str, torch.Tensor]:
        """Rows as one padded batch, or as one pack."""
        from qkit.tasks._conversation.collate import collate, collate_pack

        return collate_pack(rows, pad) if packed else collate(rows, pad)

    def head_config(self, labels: Sequence[str]) -> Mapping[str, Any]:
        """Nothing: the base model has the head."""
        return {}

    def head_outputs(self, recipe: Recipe, vocabulary: int) -> int:
        """One logit for each token of the vocabulary."""
        return vocabulary

    # --- evaluate, merge, verify ---------------------------------------------------------------------------------------

    def row(self, record: Mapping[str, Any]) -> TokenRow:
        """The prompt and the reference answer, as token ids."""
        from qkit.plugins.runtime import TokenRow

        return TokenRow(record["input_ids"], record["start"])

    def reference(self, record: Mapping[str, Any]) -> Any:
        """How a right prediction reads, or a list of such texts or calls."""
        return json.loads(record["reference"])

    def continues(self, record: Mapping[str, Any]) -> bool:
        """No: each row has an answer of its own."""
        return False

    def tune(self, runtime: Runtime, recipe: Recipe, data: Path) -> Mapping[str, float]:
        """Nothing: decoding is greedy."""
        return {}

    def outputs(self, runtime: Runtime, rows: Sequence[TokenRow]) -> Iterator[RowScores]:
        """The distribution at each token of each answer."""
        return runtime.score(rows)

    def baseline(self, data: Path) -> Any:
        """Never asked for: the base model has a head."""
        raise AssertionError(data)

    def predictor(self, recipe: Recipe, data: Path, tuned: Mapping[str, float]) -> Answerer:
        """Greedy answers by the recipe's settings."""
        from qkit.tasks._conversation.answerer import open_answerer

        return open_answerer(recipe, data)

    def sample(self, predictions: Sequence[str], references: Sequence[Any]) -> Sample | None:
        """None: the score is the share of right answers."""
        return None

    def metrics(
        self, predictions: Sequence[Prediction], references: Sequence[Any], data: Path, section: Evaluate, seed: int
    ) -> Mapping[str, Any]:
        """None beside the score."""
        return {}

    def distance(self, reference: RowScores, other: RowScores) -> NDArray[np.float32]:
        """KL(reference || other) in nats at each token of the answer, [T]."""
        from qkit.tasks._distributions import divergence

        return divergence(reference, other)

    # --- report -------------------------------------------------------------------------------------------------------

    def question(self, record: Mapping[str, Any]) -> str:
        """The last turn before the answer, as text."""
        from qkit.chat.conversation import text_of

        return text_of(json.loads(record["messages"])[-1]["content"])

    def usage(self, library: str, recipe: Recipe) -> str:
        """Nothing: the model card shows how to use a chat model, by format."""
        return ""

    def answer(self, record: Mapping[str, Any]) -> str:
        """The reference answer, as the template writes it."""
        return str(record["answer"])

    def sections(self, evaluated: Evaluated) -> Sequence[Section]:
        """None: the sections of every run have it all."""
        return ()

    # --- serve --------------------------------------------------------------------------------------------------------

    ENDPOINT = ""
    EXAMPLE: Mapping[str, Any] = {}
    WHOLE: Mapping[str, Any] = {}

    def request(self, record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
        """The turns to answer, `messages` with `tools`: those of a record without its last answer, or its prompt as a question."""
        from qkit.tasks._conversation.prepared import asked

        return asked(record, columns)

    def service(self, folder: Path, max_length: int) -> None:
        """None: servers of the OpenAI API answer conversations."""
