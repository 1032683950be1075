"""Regression: a number, or several, for a text or for a pair of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.plugins.checks import Check, SetRow
from qkit.plugins.example import NO_MORE, Example, Identity, Reads
from qkit.plugins.first_recipe import Suggestion, Table
from qkit.plugins.sections import Evaluated, Section
from qkit.plugins.task import ModelHead, Prediction, Service, read_labels
from qkit.recipe.schema import Data, Evaluate, Recipe
from qkit.tasks._encoder._report.numbers import NUMBERS
from qkit.tasks._encoder.task import EncoderTask

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from numpy.typing import NDArray

    from qkit.plugins.resampling import Sample
    from qkit.plugins.runtime import Encodes, RowScores, TextRow
    from qkit.plugins.task import Loss
    from qkit.tasks._encoder.numbers import Regressor


class Regress(EncoderTask):
    """Records with a text and a number, or a list of as many numbers in every row."""

    METRIC = "R2"
    HEAD = ModelHead("AutoModelForSequenceClassification", "SEQ_CLS", "text-classification", generates=False)
    LOSSES = ("mse", "huber")
    FIGURES = NUMBERS
    LABEL_FIGURE = None

    def suggestion(self, table: Table) -> Suggestion | None:
        """How the records of a data set are texts with numbers; None if they are not."""
        from qkit.tasks._encoder._first_recipe import of_numbers

        return of_numbers(table)

    def example(
        self, record: Mapping[str, Any], accepted: Any, data_format: str, section: Data, reads: Reads = NO_MORE
    ) -> Example:
        """A text, or a pair of texts, with its numbers."""
        from qkit.tasks._encoder.labelled_text import labelled_text, numbers_of

        return labelled_text(record, section, numbers_of)

    def identity(self, example: Example) -> Identity:
        """That of every text with labels; splits are not stratified by numbers."""
        return replace(super().identity(example), label=None)

    def columns(self) -> Mapping[str, str]:
        """Those of every text with labels; here `labels` has the numbers."""
        return {**super().columns(), "labels": "list<float>"}

    def labels(self, rows: Sequence[SetRow]) -> Mapping[str, Any]:
        """A name for each number of a row, and the mean and the standard deviation of the training rows."""
        from qkit.tasks._encoder.numbers import described

        return described(rows)

    def with_label_ids(self, batch: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
        """The rows with their numbers."""
        from qkit.tasks._encoder.numbers import with_numbers

        return with_numbers(batch)

    def set_checks(self, rows: Sequence[SetRow], recipe: Recipe) -> Iterator[Check]:
        """The checks of the numbers of the whole set."""
        from qkit.tasks._encoder.numbers import checks

        return checks(rows)

    def collate(self, rows: Sequence[Mapping[str, Any]], pad: int, packed: bool = False) -> dict[str, torch.Tensor]:
        """Rows as one padded batch with a mask; `labels`: [rows, numbers] fp32."""
        from qkit.tasks._encoder.collate import with_numbers

        return with_numbers(rows, pad)

    def losses(self, outputs: Any, batch: Mapping[str, torch.Tensor], loss: Loss) -> torch.Tensor:
        """The mean loss over the numbers of each row, [rows]."""
        return loss(outputs.logits.float(), batch["labels"]).mean(-1)

    def head_config(self, labels: Sequence[str]) -> Mapping[str, Any]:
        """The names of the numbers, and that they are no probabilities."""
        return {**super().head_config(labels), "problem_type": "regression"}

    def reference(self, record: Mapping[str, Any]) -> Any:
        """The numbers."""
        return tuple(record["labels"])

    def outputs(self, runtime: Encodes, rows: Sequence[TextRow]) -> Iterator[RowScores]:
        """The numbers, as the means of normal distributions with a variance of 1."""
        from qkit.tasks._encoder.numbers import scores

        return (scores(row, logits) for row, logits in zip(rows, runtime.logits(rows), strict=True))

    def baseline(self, data: Path) -> Encodes:
        """A model that knows the mean of the training rows, and nothing else."""
        from qkit.tasks._encoder.numbers import open_mean

        return open_mean(data)

    def predictor(self, recipe: Recipe, data: Path, tuned: Mapping[str, float]) -> Regressor:
        """The numbers of each text."""
        from qkit.tasks._encoder.numbers import Regressor

        return Regressor()

    def correct(self, prediction: str, reference: Any, section: Evaluate) -> float:
        """The squared error, negative: more is better."""
        from qkit.tasks._encoder.numbers import squared_error

        return -squared_error(prediction, reference)

    def sample(self, predictions: Sequence[str], references: Sequence[Any]) -> Sample | None:
        """R2: the share of the variance of the references that the predictions explain."""
        from qkit.tasks._encoder.numbers import explained

        return explained(predictions, references)

    def metrics(
        self, predictions: Sequence[Prediction], references: Sequence[Any], data: Path, section: Evaluate, seed: int
    ) -> Mapping[str, Any]:
        """Mean squared and mean absolute error, Pearson's and Spearman's correlation, with their intervals; of each number, if several."""
        from qkit.plugins.resampling import with_intervals
        from qkit.tasks._encoder.numbers import figures_of_numbers

        sample = figures_of_numbers([one.text for one in predictions], references, read_labels(data))
        return with_intervals(sample, section.confidence, seed)

    def distance(self, reference: RowScores, other: RowScores) -> NDArray[np.float32]:
        """KL(reference || other) in nats of normal distributions with a variance of 1: half the squared difference, [numbers]."""
        from qkit.tasks._encoder.numbers import divergence

        return divergence(reference, other)

    def answer(self, record: Mapping[str, Any]) -> str:
        """The numbers."""
        return " ".join(f"{number:.6g}" for number in record["labels"])

    def sections(self, evaluated: Evaluated) -> Sequence[Section]:
        """Predicted against true numbers, and the largest errors."""
        from qkit.tasks._encoder._report.numbers import sections_of_numbers

        return sections_of_numbers(evaluated, read_labels(evaluated.data))

    def service(self, folder: Path, max_length: int) -> Service:
        """Texts to numbers, with the tokenizer in the folder."""
        from qkit.tasks._encoder.use.service import NumberService, open_service

        return open_service(NumberService, folder, max_length)


TASK = Regress()
