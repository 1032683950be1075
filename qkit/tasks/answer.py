"""Extractive question answering: the part of a context that answers a question, or none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import short
from qkit.plugins.checks import Check, SetRow
from qkit.plugins.example import NO_MORE, Example, Identity, Question, Reads
from qkit.plugins.first_recipe import Suggestion, Table
from qkit.plugins.sections import Evaluated, Section
from qkit.plugins.task import ModelHead, Prediction, Service
from qkit.recipe.schema import Data, Evaluate, Recipe
from qkit.tasks._answering.report import ANSWERS, BETWEEN
from qkit.tasks._answering.set_checks import QUESTION_CHECKS
from qkit.tasks._encoder._first_recipe import start_of
from qkit.tasks._encoder.task import EncoderTask

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from qkit.plugins.runtime import Encodes, RowScores
    from qkit.plugins.task import Loss
    from qkit.tasks._answering.spans import Reader, Uniform
    from qkit.tasks._answering.windows import ContextRow, QuestionEncoder


SHIFTING = ("PROMPT_TUNING", "P_TUNING")  # adapters that are tokens before the text


class Answer(EncoderTask):
    """Records with a question, a context and the answer's place in it; a long context becomes several rows, which get one prediction."""

    METRIC = "exact match"
    HEAD = ModelHead("AutoModelForQuestionAnswering", "QUESTION_ANS", "question-answering", generates=False)
    CHECKS = QUESTION_CHECKS
    FIGURES = ANSWERS
    LABEL_FIGURE = None
    SCORED_IN_PARTS = frozenset({"answer"})
    READS_VALIDATION = True
    WINDOWS = True

    def clashes(self, recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """What other tasks with labels have, and windows that share too much."""
        yield from super().clashes(recipe)
        loss, stride, limit = recipe.loss, recipe.data.stride, recipe.data.max_length
        if loss.class_weights is not None:
            yield (
                ("loss", "class_weights"),
                "loss.class_weights: task=answer has places in a text, and no classes: remove it",
            )
        if loss.label_smoothing:
            yield (
                ("loss", "label_smoothing"),
                f"loss.label_smoothing={loss.label_smoothing:g}: with task=answer it would favour padding and the question: remove it",
            )
        if recipe.method == "peft" and recipe.peft.get("peft_type") in SHIFTING:
            yield (
                ("peft", "peft_type"),
                f"peft.peft_type={recipe.peft['peft_type']} puts tokens before the text, and task=answer counts its places: use PREFIX_TUNING, "
                "or method=lora",
            )
        if stride is not None and stride >= limit:
            yield (
                ("data", "stride"),
                f"data.stride={stride}: windows of data.max_length={limit} tokens cannot share as many; set it to {short(limit // 4)} or so",
            )

    def defaults(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Those of texts with labels, and windows of 384 tokens."""
        defaults = super().defaults(raw)
        return {**defaults, "data": {**defaults["data"], "too_long": "split", "max_length": 384}}

    START = start_of(384, "divided into windows, which get one prediction")

    def suggestion(self, table: Table) -> Suggestion | None:
        """How the records of a data set are questions on contexts; None if they are not."""
        from qkit.tasks._answering.first_recipe import of_answers

        return of_answers(table)

    # --- data ---------------------------------------------------------------------------------------------------------

    def example(
        self, record: Mapping[str, Any], accepted: Any, data_format: str, section: Data, reads: Reads = NO_MORE
    ) -> Example:
        """A question, its context, and the answers with their places."""
        from qkit.tasks._answering.reading import question_of

        return question_of(record, section)

    def unknown_column(self, section: Data, reads: Reads) -> str:
        """The error for a name in data.columns that nothing reads, or ""."""
        from qkit.tasks._answering.reading import COLUMNS
        from qkit.tasks._columns import unknown_column

        return unknown_column(section, COLUMNS)

    def known_names(self, name: str, data_format: str, reads: Reads) -> Iterable[str]:
        """The names that are read in a record."""
        from qkit.tasks._answering.reading import KNOWN

        return KNOWN

    def identity(self, example: Example) -> Identity:
        """The question with its context; both with the answers; the question with its answers; and the context, which shares a split."""
        assert isinstance(example, Question)
        question = json.dumps([example.question, example.context])
        texts = [text for text, _ in example.answers]
        content = json.dumps([question, sorted(example.answers)])
        return Identity(question, content, "\n".join([example.question, *texts]), group=example.context)

    def columns(self) -> Mapping[str, str]:
        """The columns of a prepared row, with their Arrow types."""
        from qkit.tasks._answering.windows import COLUMNS

        return COLUMNS

    def encoder(self, recipe: Recipe) -> QuestionEncoder:
        """Open the tokenizer of the recipe's model."""
        from qkit.tasks._answering.windows import open_encoder

        return open_encoder(recipe)

    def token_labels(self, record: Mapping[str, Any]) -> Sequence[int]:
        """The tokens of the answer; of no answer, the first token."""
        from qkit.core.batching import IGNORED

        first, last = record["labels"]
        return [token if first <= place <= last else IGNORED for place, token in enumerate(record["input_ids"])]

    def labels(self, rows: Sequence[SetRow]) -> Mapping[str, Any]:
        """The outputs of the head, and how many questions of each split have an answer."""
        from qkit.tasks._answering.set_checks import described

        return described(rows)

    def with_label_ids(self, batch: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
        """The rows as they are: their labels are places."""
        return batch

    def set_checks(self, rows: Sequence[SetRow], recipe: Recipe) -> Iterator[Check]:
        """The checks of the answers of the whole set."""
        from qkit.tasks._answering.set_checks import checks

        return checks(rows)

    # --- train, plan --------------------------------------------------------------------------------------------------

    def collate(self, rows: Sequence[Mapping[str, Any]], pad: int, packed: bool = False) -> dict[str, torch.Tensor]:
        """Rows as one padded batch with a mask; `labels`: [rows, 2], the first and the last token of the answer."""
        import torch

        from qkit.tasks._encoder.collate import padded

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {**padded(rows, pad), "labels": torch.tensor([row["labels"] for row in rows]), "lengths": lengths}

    def losses(self, outputs: Any, batch: Mapping[str, torch.Tensor], loss: Loss) -> torch.Tensor:
        """The loss of begin and end, added up, [rows].

        Both are classes among the tokens of the row. Padding is as good as impossible (a finite logit, since 0 x inf is no number), so that a
        row's loss is the same whatever it shares a batch with; transformers' own loss counts padding in.
        """
        import torch

        logits = torch.stack([outputs.start_logits, outputs.end_logits], 1).float()
        padding = batch["attention_mask"][:, None] == 0
        masked = logits.masked_fill(padding, torch.finfo(torch.float32).min)
        return loss(masked.flatten(0, 1), batch["labels"].flatten()).view(-1, 2).sum(-1)

    def head_outputs(self, recipe: Recipe, vocabulary: int) -> int:
        """One logit for the begin, and one for the end."""
        return 2

    # --- evaluate, merge, verify ---------------------------------------------------------------------------------------

    def row(self, record: Mapping[str, Any]) -> ContextRow:
        """A window as token ids, with its place in the context."""
        from qkit.tasks._answering.windows import context_row

        return context_row(record)

    def reference(self, record: Mapping[str, Any]) -> Any:
        """The accepted answers; () where the context has none."""
        return tuple(record["names"])

    def continues(self, record: Mapping[str, Any]) -> bool:
        """Whether it is a further window of the same question."""
        return bool(record["window"])

    def encoded(self, tokenizer: Any, record: Mapping[str, Any], section: Data) -> Iterator[tuple[str, Sequence[int]]]:
        """The same window of the question."""
        from qkit.tasks._answering.windows import encoded

        return encoded(tokenizer, record, section)

    def outputs(self, runtime: Encodes, rows: Sequence[Any]) -> Iterator[RowScores]:
        """The distributions of begin and end over the tokens of each window: two positions."""
        from qkit.tasks._answering.spans import scores

        return (scores(row, logits) for row, logits in zip(rows, runtime.logits(rows), strict=True))

    def baseline(self, data: Path) -> Uniform:
        """A model that knows how frequent questions without an answer are, and nothing else."""
        from qkit.tasks._answering.spans import open_uniform

        return open_uniform(data)

    def tune(self, runtime: Encodes, recipe: Recipe, data: Path) -> Mapping[str, float]:
        """The threshold of no answer, where training rows have none: chosen on the validation rows, 0 without any."""
        from qkit.tasks._answering.spans import tuned

        return tuned(runtime, recipe, data)

    def predictor(self, recipe: Recipe, data: Path, tuned: Mapping[str, float]) -> Reader:
        """The best part of the context for each question, or no answer."""
        from qkit.tasks._answering.spans import THRESHOLD, Reader

        return Reader(recipe.evaluate.max_answer_tokens, tuned.get(THRESHOLD))

    def correct(self, prediction: str, reference: Any, section: Evaluate) -> bool:
        """Whether the answer is one of those accepted, by SQuAD's rules."""
        from qkit.tasks._answering.squad import exact

        return exact(prediction, reference)

    def metrics(
        self, predictions: Sequence[Prediction], references: Sequence[Any], data: Path, section: Evaluate, seed: int
    ) -> Mapping[str, Any]:
        """F1 of the words, and both figures of questions with and without an answer; with their intervals."""
        from qkit.plugins.resampling import with_intervals
        from qkit.tasks._answering.squad import figures_of_answers

        sample = figures_of_answers([one.text for one in predictions], references)
        return with_intervals(sample, section.confidence, seed)

    # --- report -------------------------------------------------------------------------------------------------------

    def question(self, record: Mapping[str, Any]) -> str:
        """The question, and its context."""
        return f"{record['text']}\n{record['pair']}"

    def answer(self, record: Mapping[str, Any]) -> str:
        """The accepted answers."""
        return BETWEEN.join(record["names"])

    def sections(self, evaluated: Evaluated) -> Sequence[Section]:
        """The wrong answers."""
        from qkit.tasks._answering.report import sections_of_answers

        return sections_of_answers(evaluated)

    def usage(self, library: str, recipe: Recipe) -> str:
        """How to ask, for the model card."""
        from qkit.tasks._answering.usage import usage

        return usage(library, recipe)

    # --- serve, predict -----------------------------------------------------------------------------------------------

    ENDPOINT = "/answer"
    EXAMPLE: Mapping[str, Any] = {"question": "Where is the tower?", "context": "The tower is in the old town."}
    WHOLE: Mapping[str, Any] = {}

    def request(self, record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
        """The question and the context of a record of any data set, or of a prepared row."""
        from qkit.tasks._answering.reading import asked

        return asked(record, columns)

    def service(self, folder: Path, max_length: int) -> Service:
        """Questions to answers, with the tokenizer in the folder."""
        from qkit.tasks._answering.service import open_service

        return open_service(folder, max_length)


TASK = Answer()
