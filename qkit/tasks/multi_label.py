"""Multi-label classification: any number of labels for a text, or for a pair of texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.plugins.checks import Check, SetRow
from qkit.plugins.example import NO_MORE, Example, Reads
from qkit.plugins.first_recipe import Suggestion, Table
from qkit.plugins.sections import Evaluated, Section
from qkit.plugins.task import ModelHead, Prediction, Service, read_labels
from qkit.recipe.schema import Data, Evaluate, Recipe
from qkit.tasks._encoder._report.several import SEVERAL_LABELS
from qkit.tasks._encoder.task import EncoderTask

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from qkit.plugins.resampling import Sample
    from qkit.plugins.runtime import Encodes, RowScores, TextRow
    from qkit.plugins.task import Loss
    from qkit.tasks._encoder.several_labels import MultiLabeller


class MultiLabel(EncoderTask):
    """Records with a text and a list of labels; a label is predicted where its probability exceeds one half."""

    METRIC = "micro F1"
    HEAD = ModelHead("AutoModelForSequenceClassification", "SEQ_CLS", "text-classification", generates=False)
    LOSSES = ("bce",)
    SEVERAL = True
    FIGURES = SEVERAL_LABELS

    def suggestion(self, table: Table) -> Suggestion | None:
        """How the records of a data set are texts with any number of labels; None if they are not."""
        from qkit.tasks._encoder._first_recipe import of_several_labels

        return of_several_labels(table)

    def example(
        self, record: Mapping[str, Any], accepted: Any, data_format: str, section: Data, reads: Reads = NO_MORE
    ) -> Example:
        """A text, or a pair of texts, with its labels."""
        from qkit.tasks._encoder.labelled_text import labelled_text, several_names

        return labelled_text(record, section, several_names)

    def columns(self) -> Mapping[str, str]:
        """Those of every text with labels; here `labels` has a 1 or a 0 for each."""
        return {**super().columns(), "labels": "list<float>"}

    def labels(self, rows: Sequence[SetRow]) -> Mapping[str, Any]:
        """As for single labels, and how many training rows there are: the labels of all rows do not add up to it."""
        return {**super().labels(rows), "training_rows": sum(row.split == "train" for row in rows)}

    def with_label_ids(self, batch: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
        """The rows with a 1 for each label they have. A label that no training row has is left out; the check `labels` fails then."""
        from qkit.tasks._encoder.several_labels import with_ones

        return with_ones(batch, names)

    def set_checks(self, rows: Sequence[SetRow], recipe: Recipe) -> Iterator[Check]:
        """The checks of the labels of the whole set."""
        from qkit.tasks._encoder.set_checks import checks

        return checks(rows, several=True)

    def collate(self, rows: Sequence[Mapping[str, Any]], pad: int, packed: bool = False) -> dict[str, torch.Tensor]:
        """Rows as one padded batch with a mask; `labels`: [rows, labels] fp32."""
        from qkit.tasks._encoder.collate import with_numbers

        return with_numbers(rows, pad)

    def losses(self, outputs: Any, batch: Mapping[str, torch.Tensor], loss: Loss) -> torch.Tensor:
        """The mean loss over the labels of each row, [rows]."""
        return loss(outputs.logits.float(), batch["labels"]).mean(-1)

    def head_config(self, labels: Sequence[str]) -> Mapping[str, Any]:
        """The labels, and that each has a probability of its own."""
        return {**super().head_config(labels), "problem_type": "multi_label_classification"}

    def reference(self, record: Mapping[str, Any]) -> Any:
        """The names of the labels."""
        return tuple(record["names"])

    def outputs(self, runtime: Encodes, rows: Sequence[TextRow]) -> Iterator[RowScores]:
        """The distribution of each label over no and yes: as many positions as there are labels."""
        from qkit.tasks._encoder.several_labels import scores

        return (scores(row, logits) for row, logits in zip(rows, runtime.logits(rows), strict=True))

    def baseline(self, data: Path) -> Encodes:
        """A model that knows how frequent each label is, and nothing else."""
        from qkit.tasks._encoder.several_labels import open_rates

        return open_rates(data)

    def predictor(self, recipe: Recipe, data: Path, tuned: Mapping[str, float]) -> MultiLabeller:
        """The labels of each text, with their probabilities."""
        from qkit.tasks._encoder.several_labels import MultiLabeller

        return MultiLabeller(read_labels(data))

    def correct(self, prediction: str, reference: Any, section: Evaluate) -> bool:
        """Whether all labels are right, and no other is there."""
        return bool({*json.loads(prediction)} == {*reference})

    def sample(self, predictions: Sequence[str], references: Sequence[Any]) -> Sample | None:
        """Micro F1: right labels among all labels of references and predictions."""
        from qkit.tasks._encoder.several_labels import micro_f1

        return micro_f1([json.loads(text) for text in predictions], references)

    def metrics(
        self, predictions: Sequence[Prediction], references: Sequence[Any], data: Path, section: Evaluate, seed: int
    ) -> Mapping[str, Any]:
        """Share of rows with all labels right, share of wrong decisions, and precision, recall and F1; with their intervals."""
        from qkit.plugins.resampling import with_intervals
        from qkit.tasks._encoder.several_labels import figures_of_labels

        sample = figures_of_labels(predictions, references, read_labels(data))
        return with_intervals(sample, section.confidence, seed)

    def answer(self, record: Mapping[str, Any]) -> str:
        """The JSON list of the labels, as predictions are."""
        return json.dumps(record["names"], ensure_ascii=False)

    def sections(self, evaluated: Evaluated) -> Sequence[Section]:
        """The figures of each label, and what is missed and wrongly added."""
        from qkit.tasks._encoder._report.several import sections_of_several_labels

        return sections_of_several_labels(evaluated)

    def service(self, folder: Path, max_length: int) -> Service:
        """Texts to their labels, with the tokenizer and the label names in the folder."""
        from qkit.tasks._encoder.use.service import SeveralLabelsService, open_service

        return open_service(SeveralLabelsService, folder, max_length)


TASK = MultiLabel()
