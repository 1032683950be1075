"""What every task of an encoder decides alike: a new head on a base model reads a whole text, and is compared by its distributions.

Light to import: `qkit plan` reads HEAD and `head_outputs`; the rest is imported where it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import short
from qkit.plugins.checks import Check, Kind, SetRow
from qkit.plugins.example import NO_MORE, Example, Identity, LabelledText, Reads, RowError
from qkit.plugins.first_recipe import Suggestion, Table
from qkit.plugins.sections import Evaluated, Figure, Section
from qkit.plugins.task import LABELS, ModelHead, Prediction, Predictor, ShownRow, read_labels
from qkit.recipe.schema import Data, Evaluate, Gate, Recipe
from qkit.tasks._encoder import _clashes
from qkit.tasks._encoder._first_recipe import start_of
from qkit.tasks._encoder._report.labels import OF_ONE_LABEL, SINGLE_LABEL
from qkit.tasks._encoder.kinds import LABELLED_CHECKS
from qkit.tasks._texts import preference_clashes, windows_clashes

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from qkit.plugins.resampling import Sample
    from qkit.plugins.runtime import Encodes, RowScores, TextRow
    from qkit.plugins.task import Loss
    from qkit.tasks._encoder.encoder import TextEncoder


# A batch's loss is the mean over its texts. With a budget of tokens alone, short texts would share a batch with over a hundred others
# and long ones with a few: an epoch would have few steps, and long texts would count for more.
BATCH_ROWS = 32


class EncoderTask:
    """Everything of the contract but METRIC, HEAD and `correct`, for tasks that give a text one label."""

    BASELINE = "majority"
    HEAD: ModelHead
    TRAINER = "labelled"
    LENGTH_STEP = 1  # many texts have 10 to 20 tokens: padded to 16, a third of a batch would be padding
    # Of fp32 artifacts, in excess of rounding and chance; the figures of "quantized" are looser, as for conversations.
    GATES: Mapping[str, Gate] = {
        "exact": Gate(top1=1.0, max_difference=1e-3),
        "16-bit": Gate(kl_mean=1e-4, kl_row=0.05),
        "quantized": Gate(kl_mean=0.1, kl_row=2.0, score=True),
    }
    CHECKS = LABELLED_CHECKS
    LESSER_CHECKS: Mapping[str, tuple[str, Kind]] = {}
    UNSCORED: frozenset[str] = frozenset()
    SCORED_IN_PARTS: frozenset[str] = frozenset()
    ANSWERS_ARE_SCORED = False
    READS_VALIDATION = False
    FIGURES: Sequence[Figure] = SINGLE_LABEL
    LABEL_FIGURE: Figure | None = OF_ONE_LABEL

    LOSSES: tuple[str, ...] = ("cross_entropy", "focal")
    SEVERAL = False  # any number of labels for a text
    WINDOWS = False  # a long text becomes several rows

    def clashes(self, recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """What only tasks on conversations have, and what the method has no use for."""
        data, where = recipe.data, f"task={recipe.task}"
        yield from preference_clashes(recipe)
        if not self.WINDOWS:
            yield from windows_clashes(recipe)
        if ":" not in recipe.loss.name and recipe.loss.name not in self.LOSSES:
            yield (
                ("loss", "name"),
                f"loss.name={short(recipe.loss.name)}: the losses of {where} are {', '.join(self.LOSSES)}, and module:function of your own",
            )
        shortened = "split" if self.WINDOWS else "truncate"
        if data.too_long not in ("drop", shortened):
            yield ("data", "too_long"), f"data.too_long={data.too_long} is not for {where}: use {shortened} or drop"
        if data.label_separator is not None and not self.SEVERAL:
            yield (
                ("data", "label_separator"),
                f"data.label_separator is for task=multi_label, and not for {where}: remove it",
            )
        if data.packing:
            yield (
                ("data", "packing"),
                f"data.packing=true is not possible with {where}: a head reads one text at a time; remove it",
            )
        if data.loss != "completion":
            yield (
                ("data", "loss"),
                f"data.loss={data.loss} is for conversations: {where} has one label for a text; remove it",
            )
        for section, field in (("data", "system"), ("model", "chat_template")):
            if getattr(getattr(recipe, section), field) is not None:
                yield (section, field), f"{section}.{field} is for conversations, and {where} has none: remove it"
        yield from _clashes.clashes(recipe, self.HEAD)

    def defaults(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """16-bit or finer weights, a stratified split of 80/10/10 where no held-out rows are given, and formats of encoders."""
        data = raw.get("data") if isinstance(raw.get("data"), Mapping) else {}
        is_split = bool(data) and not {"split", "validation", "test"} & {*data}  # type: ignore[misc]
        split = {"split": {"train": 0.8, "validation": 0.1, "test": 0.1}} if is_split else {}
        return {
            "quantization": {"load_in_4bit": False},
            "data": {"too_long": "truncate", "max_length": 256, "batch_rows": BATCH_ROWS, **split},
            "train": {
                "bf16": False,
                "gradient_checkpointing": False,
                "num_train_epochs": 3,
                "weight_decay": 0.01,
                "optim": "adamw_torch_fused",  # a fifth of the time of a step on all weights of a small model
            },
            "loss": {"name": self.LOSSES[0]},
            "merge": {"dtype": "float32"},
            "export": {"formats": ["onnx-fp32"]},
            # Not part of `qkit run`; `qkit bench RUN` measures every format. An answer is one text, and takes milliseconds.
            "bench": {"runtimes": [], "concurrency": [1, 8, 32], "output_tokens": 1, "rounds": 32},
        }

    # --- init ---------------------------------------------------------------------------------------------------------

    START = start_of(512, "cut at their end")

    def suggestion(self, table: Table) -> Suggestion | None:
        """How the records of a data set are texts with one label; None if they are not."""
        from qkit.tasks._encoder._first_recipe import of_one_label

        return of_one_label(table)

    # --- data ---------------------------------------------------------------------------------------------------------

    def example(
        self, record: Mapping[str, Any], accepted: Any, data_format: str, section: Data, reads: Reads = NO_MORE
    ) -> Example:
        """A text, or a pair of texts, with its label."""
        from qkit.tasks._encoder.labelled_text import labelled_text

        example = labelled_text(record, section)
        if len(example.labels) != 1:
            raise RowError(
                f"has {len(example.labels)} labels; task=classify gives a text exactly one, task=multi_label any number"
            )
        return example

    def data_format(self, record: Mapping[str, Any], section: Data) -> str | None:
        """None: records have the task's own format."""
        return None

    def unknown_column(self, section: Data, reads: Reads) -> str:
        """The error for a name in data.columns that nothing reads, or ""."""
        from qkit.tasks._columns import unknown_column
        from qkit.tasks._encoder.labelled_text import COLUMNS

        return unknown_column(section, COLUMNS)

    def known_names(self, name: str, data_format: str, reads: Reads) -> Iterable[str]:
        """The names that are read in a record."""
        from qkit.tasks._encoder.labelled_text import KNOWN

        return KNOWN

    def misplaced(self, name: str, data_format: str) -> str:
        """Nothing: records are flat."""
        return ""

    def identity(self, example: Example) -> Identity:
        """The texts; the texts with their labels; and the text that near-duplicates are compared by."""
        assert isinstance(example, LabelledText)
        question = json.dumps([example.text, example.pair]) if example.pair is not None else example.text
        label = example.labels[0] if len(example.labels) == 1 else None
        return Identity(question, json.dumps([question, sorted(example.labels)]), question, label)

    def columns(self) -> Mapping[str, str]:
        """The columns of a prepared row, with their Arrow types."""
        from qkit.tasks._encoder.encoder import COLUMNS

        return COLUMNS

    def encoder(self, recipe: Recipe) -> TextEncoder:
        """Open the tokenizer of the recipe's model."""
        from qkit.tasks._encoder.encoder import open_encoder

        return open_encoder(recipe)

    def tokenizer(self, recipe: Recipe) -> Any:
        """The tokenizer of the recipe's model; it needs no chat template."""
        from qkit.tasks._encoder.encoder import open_tokenizer

        return open_tokenizer(recipe)

    def encoded(self, tokenizer: Any, record: Mapping[str, Any], section: Data) -> Iterator[tuple[str, Sequence[int]]]:
        """The token ids that a tokenizer makes of a row's text or pair of texts, and their types."""
        made = tokenizer(record["text"], record["pair"], truncation=True, max_length=section.max_length)
        return ((name, made.get(name, [])) for name in ("input_ids", "token_type_ids"))

    def token_labels(self, record: Mapping[str, Any]) -> Sequence[int]:
        """None: a text has a label as a whole."""
        from qkit.core.batching import IGNORED

        return [IGNORED] * len(record["input_ids"])

    def shown(self, record: Mapping[str, Any]) -> ShownRow:
        """All tokens of a prepared row."""
        return ShownRow(record["input_ids"], self.token_labels(record))

    def labels(self, rows: Sequence[SetRow]) -> Mapping[str, Any]:
        """The labels of the training rows, numbers in their order and names by the alphabet, and how many rows of a split have each."""
        from qkit.tasks._encoder.labels import counts, names_in

        names = names_in(rows)
        return {"names": names, "rows": counts(rows, names)} if names else {}

    def with_label_ids(self, batch: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
        """The rows with their label ids. A label that no training row has gets -1; the check `labels` fails then."""
        from qkit.tasks._encoder.labels import with_lists

        ids = {name: number for number, name in enumerate(names)}
        column = [[ids.get(name, -1) for name in row] for row in batch.column("names").to_pylist()]
        return with_lists(batch, "labels", column)

    def set_checks(self, rows: Sequence[SetRow], recipe: Recipe) -> Iterator[Check]:
        """The checks of the labels of the whole set."""
        from qkit.tasks._encoder.set_checks import checks

        return checks(rows)

    # --- train, plan --------------------------------------------------------------------------------------------------

    def add_to_head(self, model: PreTrainedModel, folder: Path, recipe: Recipe) -> None:
        """Nothing: the head is that of transformers."""

    def collate(self, rows: Sequence[Mapping[str, Any]], pad: int, packed: bool = False) -> dict[str, torch.Tensor]:
        """Rows as one padded batch with a mask."""
        from qkit.tasks._encoder.collate import collate

        return collate(rows, pad)

    def losses(self, outputs: Any, batch: Mapping[str, torch.Tensor], loss: Loss) -> torch.Tensor:
        """The loss of each row, [rows]. `loss`: that of the recipe."""
        return loss(outputs.logits.float(), batch["labels"])

    def head_config(self, labels: Sequence[str]) -> Mapping[str, Any]:
        """The labels, by id and by name."""
        names = dict(enumerate(labels))
        return {"id2label": names, "label2id": {name: number for number, name in names.items()}}

    def head_outputs(self, recipe: Recipe, vocabulary: int) -> int:
        """One logit for a text and a label; how many labels there are is not known before the data stage."""
        return 1

    # --- evaluate, merge, verify ---------------------------------------------------------------------------------------

    def row(self, record: Mapping[str, Any]) -> Any:
        """A TextRow: the text as token ids, with its label."""
        from qkit.plugins.runtime import TextRow

        return TextRow(record["input_ids"], record["token_type_ids"], tuple(record["labels"]))

    def reference(self, record: Mapping[str, Any]) -> str:
        """The name of the label."""
        return str(record["names"][0])

    def continues(self, record: Mapping[str, Any]) -> bool:
        """No: each row is a text of its own."""
        return False

    def tune(self, runtime: Encodes, recipe: Recipe, data: Path) -> Mapping[str, float]:
        """Nothing: labels are predicted by their probabilities as they are."""
        return {}

    def outputs(self, runtime: Encodes, rows: Sequence[TextRow]) -> Iterator[RowScores]:
        """The distribution over the labels: one position for a text."""
        from qkit.tasks._encoder.labeller import scores

        return (scores(row, logits) for row, logits in zip(rows, runtime.logits(rows), strict=True))

    def baseline(self, data: Path) -> Encodes:
        """A model that knows how frequent each label is, and nothing else."""
        from qkit.tasks._encoder.labels import Constant, log_counts

        counts = json.loads((data / LABELS).read_text(encoding="utf-8"))["rows"]["train"]
        return Constant(log_counts(tuple(counts.values())))

    def predictor(self, recipe: Recipe, data: Path, tuned: Mapping[str, float]) -> Predictor:
        """The most likely label of each text, with its probability."""
        from qkit.tasks._encoder.labeller import Labeller

        return Labeller(read_labels(data))

    def correct(self, prediction: str, reference: Any, section: Any) -> float:
        """Whether the label is the reference."""
        return bool(prediction == reference)

    def sample(self, predictions: Sequence[str], references: Sequence[Any]) -> Sample | None:
        """None: the score is the share of right rows."""
        return None

    def metrics(
        self, predictions: Sequence[Prediction], references: Sequence[Any], data: Path, section: Evaluate, seed: int
    ) -> Mapping[str, Any]:
        """Precision, recall and F1, over all labels and of each, and the calibration of the probabilities; with their intervals."""
        from qkit.tasks._encoder.labeller import figures_of_labels

        return figures_of_labels(predictions, references, read_labels(data), section.confidence, seed)

    def distance(self, reference: RowScores, other: RowScores) -> NDArray[np.float32]:
        """KL(reference || other) in nats over the labels, [1]."""
        from qkit.tasks._distributions import divergence

        return divergence(reference, other)

    # --- report -------------------------------------------------------------------------------------------------------

    def question(self, record: Mapping[str, Any]) -> str:
        """The text, and the second one of a pair."""
        return "\n".join(text for text in (record["text"], record["pair"]) if text is not None)

    def answer(self, record: Mapping[str, Any]) -> str:
        """The names of the labels."""
        return ", ".join(record["names"])

    def sections(self, evaluated: Evaluated) -> Sequence[Section]:
        """The figures of each label, the confusions, the calibration and the worst errors."""
        from qkit.tasks._encoder._report.labels import sections_of_single_labels

        return sections_of_single_labels(evaluated, read_labels(evaluated.data))

    def usage(self, library: str, recipe: Recipe) -> str:
        """How to label a text, for the model card."""
        from qkit.tasks._encoder.use.usage import usage

        return usage(library, self.HEAD, recipe)

    # --- serve, predict -----------------------------------------------------------------------------------------------

    ENDPOINT = "/classify"
    EXAMPLE: Mapping[str, Any] = {"text": "A text as in the training data."}
    WHOLE: Mapping[str, Any] = {"top_k": -1}

    def request(self, record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
        """The texts of a record of any data set, or of a prepared row."""
        from qkit.tasks._encoder.labelled_text import texts_of

        return texts_of(record, columns)

    def service(self, folder: Path, max_length: int) -> Any:
        """A Service: texts to labels, with the tokenizer and the label names in the folder."""
        from qkit.tasks._encoder.use.service import LabelService, open_service

        return open_service(LabelService, folder, max_length)
