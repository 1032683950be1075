"""Token classification: a tag for each word, such as named entities."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.plugins.checks import Check, SetRow
from qkit.plugins.example import NO_MORE, Example, Identity, Reads, TaggedWords
from qkit.plugins.first_recipe import Suggestion, Table
from qkit.plugins.sections import Evaluated, Section
from qkit.plugins.task import ModelHead, Prediction, read_labels
from qkit.recipe.schema import Data, Evaluate, Recipe
from qkit.tasks._encoder._first_recipe import start_of
from qkit.tasks._encoder._report.tags import ENTITIES
from qkit.tasks._encoder.tagging.checks import ROW_CHECKS
from qkit.tasks._encoder.task import EncoderTask

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from transformers import PreTrainedModel

    from qkit.plugins.resampling import Sample
    from qkit.plugins.runtime import Encodes, RowScores
    from qkit.plugins.task import Loss
    from qkit.tasks._encoder.tagging.encoder import WordEncoder
    from qkit.tasks._encoder.tagging.tagger import MostFrequent, Tagger

CRF = "crf"  # the loss with scores of neighbouring tags
ADDS_TOKENS = ("PROMPT_TUNING", "P_TUNING")


class Tag(EncoderTask):
    """Records with words and their tags; entities are right if type, begin and end are."""

    METRIC = "entity F1"
    HEAD = ModelHead("AutoModelForTokenClassification", "TOKEN_CLS", "token-classification", generates=False)
    LOSSES = ("cross_entropy", "focal", CRF)
    CHECKS = ROW_CHECKS
    FIGURES = ENTITIES

    def clashes(self, recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Also adapters that add tokens of their own."""
        yield from super().clashes(recipe)
        kind = recipe.peft.get("peft_type")
        if recipe.method == "peft" and kind in ADDS_TOKENS:
            yield (
                ("peft", "peft_type"),
                f"peft.peft_type={kind} puts tokens before a text, and task=tag reads its tokens by their places: use PREFIX_TUNING, IA3 "
                "or method=lora",
            )

    START = start_of(512, "cut between words")

    def suggestion(self, table: Table) -> Suggestion | None:
        """How the records of a data set are words with tags; None if they are not."""
        from qkit.tasks._encoder.tagging._first_recipe import of_tags

        return of_tags(table)

    # --- data ---------------------------------------------------------------------------------------------------------

    def example(
        self, record: Mapping[str, Any], accepted: Any, data_format: str, section: Data, reads: Reads = NO_MORE
    ) -> Example:
        """Words with their tags, or a text with spans."""
        from qkit.tasks._encoder.tagging.records import tagged_words

        return tagged_words(record, section)

    def data_format(self, record: Mapping[str, Any], section: Data) -> str | None:
        """ "spans" for a text with spans, from which it follows how requests are divided into words; None for words."""
        from qkit.tasks._encoder.tagging.records import SPANS, form_of

        return SPANS if form_of(record, section) == SPANS else None

    def unknown_column(self, section: Data, reads: Reads) -> str:
        """The error for a name in data.columns that nothing reads, or ""."""
        from qkit.tasks._columns import unknown_column
        from qkit.tasks._encoder.tagging.records import COLUMNS

        return unknown_column(section, COLUMNS)

    def known_names(self, name: str, data_format: str, reads: Reads) -> Iterable[str]:
        """The names that are read in a record."""
        from qkit.tasks._encoder.tagging.records import KNOWN

        return KNOWN

    def identity(self, example: Example) -> Identity:
        """The sentence; the words with their tags; and the sentence again for near-duplicates."""
        assert isinstance(example, TaggedWords)
        sentence = " ".join(example.words)
        return Identity(sentence, json.dumps([example.words, example.tags]), sentence)

    def columns(self) -> Mapping[str, str]:
        """The columns of a prepared row, with their Arrow types."""
        from qkit.tasks._encoder.tagging.encoder import COLUMNS

        return COLUMNS

    def encoder(self, recipe: Recipe) -> WordEncoder:
        """Open the tokenizer of the recipe's model."""
        from qkit.tasks._encoder.tagging.encoder import open_encoder

        return open_encoder(recipe)

    def encoded(self, tokenizer: Any, record: Mapping[str, Any], section: Data) -> Iterator[tuple[str, Sequence[int]]]:
        """The token ids that a tokenizer makes of a row's words, in all windows, and where words begin."""
        from qkit.tasks._encoder.tagging.encoder import encoded

        return encoded(tokenizer, record["words"], section.max_length)

    def token_labels(self, record: Mapping[str, Any]) -> Sequence[int]:
        """The tag of a word at its first token."""
        labels: Sequence[int] = record["labels"]
        return labels

    def labels(self, rows: Sequence[SetRow]) -> Mapping[str, Any]:
        """O, and B and I of each type that training rows have; with counts, the scheme of the source, and what divides a text into words."""
        from qkit.tasks._encoder.tagging.rows import labels

        return labels(rows)

    def with_label_ids(self, batch: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
        """The rows with their tags in IOB2, as ids. One of a type that no training row has gets -1; the check `labels` fails then."""
        from qkit.tasks._encoder.tagging.rows import with_label_ids

        return with_label_ids(batch, names)

    def set_checks(self, rows: Sequence[SetRow], recipe: Recipe) -> Iterator[Check]:
        """The checks of the tags of the whole set."""
        from qkit.tasks._encoder.tagging.checks import checks

        return checks(rows)

    # --- train --------------------------------------------------------------------------------------------------------

    def add_to_head(self, model: PreTrainedModel, folder: Path, recipe: Recipe) -> None:
        """The scores of neighbouring tags, with the loss `crf`."""
        from qkit.tasks._encoder.tagging import transitions

        if recipe.loss.name == CRF:
            transitions.add(model, folder)

    def collate(self, rows: Sequence[Mapping[str, Any]], pad: int, packed: bool = False) -> dict[str, torch.Tensor]:
        """Rows as one padded batch with a mask; `labels`: [rows, tokens], -100 where no word begins."""
        from qkit.tasks._encoder.tagging.rows import collate

        return collate(rows, pad)

    def losses(self, outputs: Any, batch: Mapping[str, torch.Tensor], loss: Loss) -> torch.Tensor:
        """The loss of each row, summed over its words, [rows]."""
        from qkit.tasks._encoder.tagging.transitions import losses

        return losses(outputs.logits.float(), batch["labels"], loss)

    # --- evaluate, merge, verify ---------------------------------------------------------------------------------------

    def row(self, record: Mapping[str, Any]) -> Any:
        """A TaggedRow: the words as token ids, in one window or several."""
        from qkit.tasks._encoder.tagging.rows import row

        return row(record)

    def reference(self, record: Mapping[str, Any]) -> Any:
        """The tag of each word, in IOB2."""
        return tuple(record["names"])

    def outputs(self, runtime: Encodes, rows: Sequence[Any]) -> Iterator[RowScores]:
        """The distribution over the tags at each word."""
        from qkit.tasks._encoder.tagging.tagger import scores

        return scores(runtime, rows)

    def baseline(self, data: Path) -> MostFrequent:
        """A model that knows how frequent each tag is, and nothing else: it tags every word O."""
        from qkit.tasks._encoder.tagging.tagger import open_most_frequent

        return open_most_frequent(data)

    def predictor(self, recipe: Recipe, data: Path, tuned: Mapping[str, float]) -> Tagger:
        """The tags of each sentence."""
        from qkit.tasks._encoder.tagging.tagger import Tagger

        return Tagger(read_labels(data))

    def correct(self, prediction: str, reference: Any, section: Evaluate) -> bool:
        """Whether all tags of a sentence are right."""
        return bool(tuple(prediction.split()) == tuple(reference))

    def sample(self, predictions: Sequence[str], references: Sequence[Any]) -> Sample | None:
        """Micro F1 of entities, which are right if type, begin and end are."""
        from qkit.tasks._encoder.metrics.entities import entity_f1

        return entity_f1(references, [text.split() for text in predictions])

    def metrics(
        self, predictions: Sequence[Prediction], references: Sequence[Any], data: Path, section: Evaluate, seed: int
    ) -> Mapping[str, Any]:
        """Precision, recall and F1 of entities, over all and of each type, and the share of right tags; with their intervals."""
        from qkit.plugins.resampling import with_intervals
        from qkit.tasks._encoder.metrics.entities import tagging

        sample = tagging(references, [one.text.split() for one in predictions])
        return with_intervals(sample, section.confidence, seed)

    # --- report -------------------------------------------------------------------------------------------------------

    def question(self, record: Mapping[str, Any]) -> str:
        """The sentence."""
        return " ".join(record["words"])

    def answer(self, record: Mapping[str, Any]) -> str:
        """The JSON list of the entities, such as ["person: Ada Lovelace"]; `entities` of a prediction is the same."""
        from qkit.tasks._encoder.tagging.tagger import named

        return json.dumps(named(record["words"], record["names"]), ensure_ascii=False)

    def sections(self, evaluated: Evaluated) -> Sequence[Section]:
        """The figures of each type, and what is missed and wrongly found."""
        from qkit.tasks._encoder._report.tags import sections_of_tags

        return sections_of_tags(evaluated)

    def usage(self, library: str, recipe: Recipe) -> str:
        """How to tag a sentence, for the model card."""
        from qkit.tasks._encoder.tagging.usage import usage

        return usage(library, recipe)

    # --- serve, predict -----------------------------------------------------------------------------------------------

    ENDPOINT = "/tag"
    EXAMPLE: Mapping[str, Any] = {"text": "A sentence as in the training data ."}
    WHOLE: Mapping[str, Any] = {}

    def request(self, record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
        """The words of a record of any data set, or of a prepared row, as `tokens`; its text where it has no list of them."""
        from qkit.tasks._encoder.tagging.records import request_of

        return request_of(record, columns)

    def service(self, folder: Path, max_length: int) -> Any:
        """A TagService: sentences to entities, with the tokenizer and the names of the tags in the folder."""
        from qkit.tasks._encoder.tagging.service import open_service

        return open_service(folder, max_length)


TASK = Tag()
