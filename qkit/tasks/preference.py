"""PreferenceTask: of two answers to one prompt, make the preferred one more likely than the other. A pair is right if the model prefers it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.plugins.checks import Check, SetRow
from qkit.plugins.example import NO_MORE, AnswerPair, Example, Identity, Reads
from qkit.plugins.first_recipe import Suggestion, Table
from qkit.plugins.sections import Evaluated, Section
from qkit.plugins.task import Prediction, ShownRow
from qkit.recipe import preference
from qkit.recipe.schema import Data, Evaluate, Recipe
from qkit.tasks._conversation.task import ConversationTask
from qkit.tasks._preference._first_recipe import COMPARED
from qkit.tasks._preference.checks import PAIR_CHECKS
from qkit.tasks._preference.recipes import compared_clashes, rate
from qkit.tasks._preference.scoring import PAIR_FIGURES, without_score

if TYPE_CHECKING:
    import torch

    from qkit.plugins.resampling import Sample
    from qkit.tasks._preference.encoder import PairEncoder
    from qkit.tasks._preference.scoring import Comparer, PairTokens


class PreferenceTask(ConversationTask):
    """Records with a prompt, a chosen and a rejected answer. In all else, the chosen answer is that of a conversation."""

    METRIC = "preference accuracy"
    TRAINER = "preference"
    CHECKS = PAIR_CHECKS
    UNSCORED: frozenset[str] = frozenset()
    SCORED_IN_PARTS: frozenset[str] = frozenset()
    ANSWERS_ARE_SCORED = False
    FIGURES = PAIR_FIGURES
    GATES = without_score(ConversationTask.GATES)

    def further_clashes(self, recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Values that have no meaning for pairs."""
        data, where = recipe.data, f"task={recipe.task}"
        yield from preference.problems(recipe.preference)
        yield from compared_clashes(recipe, "preference")
        if data.too_long not in ("drop", "truncate_prompt"):
            yield (
                ("data", "too_long"),
                f"data.too_long={data.too_long} is not for {where}: it would cut two answers in different places; use drop or truncate_prompt",
            )
        yield from _of_a_batch(recipe)
        for split in ("train", "validation", "test"):
            for index, source in enumerate(getattr(data, split)):
                if source.format != "auto":
                    key = f"data.{split}.{index}.format"
                    yield (
                        ("data", split, index, "format"),
                        f"{key}={source.format} has no pairs of answers: remove it (columns prompt, chosen and rejected are recognized)",
                    )

    def defaults(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """A rate for small changes of a trained model."""
        return rate(raw)

    # --- init ---------------------------------------------------------------------------------------------------------

    START = COMPARED

    def suggestion(self, table: Table) -> Suggestion | None:
        """How the records of a data set are pairs of answers; None if they are not."""
        from qkit.tasks._preference._first_recipe import of_pairs

        return of_pairs(table)

    # --- data ---------------------------------------------------------------------------------------------------------

    def example(
        self, record: Mapping[str, Any], accepted: Any, data_format: str, section: Data, reads: Reads = NO_MORE
    ) -> Example:
        """A record with a pair of answers."""
        from qkit.tasks._preference.reading import pair_of

        return pair_of(record, section, reads)

    def data_format(self, record: Mapping[str, Any], section: Data) -> str | None:
        """`pair`, or `implicit_prompt` where only the answers have the prompt."""
        from qkit.tasks._preference.reading import format_of

        return format_of(record, section)

    def unknown_column(self, section: Data, reads: Reads) -> str:
        """The error for a name in data.columns that nothing reads, or ""."""
        from qkit.tasks._preference.reading import unknown_column

        return unknown_column(section, reads)

    def known_names(self, name: str, data_format: str, reads: Reads) -> Iterable[str]:
        """The names that are read at the place of `name` in a record."""
        from qkit.tasks._preference.reading import known_names

        return known_names(name, reads)

    def misplaced(self, name: str, data_format: str) -> str:
        """Where a column belongs that is in the wrong place, or ""."""
        from qkit.plugins.example import THINKING

        return "it belongs in the turn of one of the two answers" if name in THINKING else ""

    def identity(self, example: Example) -> Identity:
        """The prompt; both answers with it; and the turns without the system's."""
        from qkit.chat.template import compact, texts_of

        assert isinstance(example, AnswerPair)
        of_chosen, rejected = super().identity(example.chosen), example.rejected.messages[-1:]
        return Identity(
            of_chosen.question,
            of_chosen.content + compact(rejected),
            f"{of_chosen.distinctive}\n{texts_of(rejected)}",
        )

    def columns(self) -> Mapping[str, str]:
        """The columns of a prepared row, with their Arrow types."""
        from qkit.tasks._preference.encoder import PAIR_COLUMNS

        return PAIR_COLUMNS

    def encoder(self, recipe: Recipe) -> PairEncoder:  # type: ignore[override]  # of pairs instead of conversations
        """Open the tokenizer and the chat template of the recipe's model."""
        from qkit.tasks._preference.encoder import open_pair_encoder

        return open_pair_encoder(recipe)

    def shown(self, record: Mapping[str, Any]) -> ShownRow:
        """The prompt, and below each other both answers."""
        from qkit.tasks._preference.collate import whole

        row = whole(record)
        titles = {0: "prompt", row["start"]: "chosen", row["rejected_start"]: "rejected"}
        return ShownRow(row["input_ids"], row["labels"], titles)

    def set_checks(self, rows: Sequence[SetRow], recipe: Recipe) -> Iterator[Check]:
        """Pairs that contradict each other, and whether the longer answer is the chosen one."""
        from qkit.tasks._preference.checks import set_checks

        return set_checks(rows)

    # --- train --------------------------------------------------------------------------------------------------------

    def collate(self, rows: Sequence[Mapping[str, Any]], pad: int, packed: bool = False) -> dict[str, torch.Tensor]:
        """Pairs as one padded batch."""
        from qkit.tasks._preference.collate import collate_pairs

        return collate_pairs(rows, pad)

    # --- evaluate, verify ---------------------------------------------------------------------------------------------

    def row(self, record: Mapping[str, Any]) -> PairTokens:
        """The prompt and both answers, as token ids."""
        from qkit.tasks._preference.scoring import PairTokens

        return PairTokens(record["input_ids"], record["start"], record["rejected_ids"])

    def tune(self, runtime: Any, recipe: Recipe, data: Path) -> Mapping[str, float]:
        """Whether it is the reference itself that is measured: then by its log-probabilities alone."""
        from qkit.tasks._preference.scoring import plain_or_not

        return plain_or_not(runtime, recipe)

    def predictor(self, recipe: Recipe, data: Path, tuned: Mapping[str, float]) -> Comparer:  # type: ignore[override]  # it gives margins
        """Compares the two answers of each pair."""
        from qkit.tasks._conversation.answerer import open_answerer
        from qkit.tasks._preference.scoring import PLAIN, Comparer

        return Comparer(open_answerer(recipe, data), PLAIN in tuned, data.with_name("train"))

    def correct(self, prediction: str, reference: Any, section: Evaluate) -> float:  # ties count half
        """1 if the chosen answer is preferred, one half if neither is."""
        from qkit.tasks._preference.scoring import preferred

        return preferred(prediction)

    def sample(self, predictions: Sequence[str], references: Sequence[Any]) -> Sample | None:
        """The share of pairs whose chosen answer is preferred; ties count half."""
        from qkit.tasks._preference.scoring import accuracy

        return accuracy(predictions)

    def metrics(
        self, predictions: Sequence[Prediction], references: Sequence[Any], data: Path, section: Evaluate, seed: int
    ) -> Mapping[str, Any]:
        """The mean margin, divergence from the reference and length of answers."""
        from qkit.tasks._preference.scoring import figures_of_pairs

        return figures_of_pairs(predictions, section.confidence, seed)

    def answer(self, record: Mapping[str, Any]) -> str:
        """Both answers."""
        return f"chosen: {record['answer']}\nrejected: {record['rejected']}"

    def sections(self, evaluated: Evaluated) -> Sequence[Section]:
        """The margins of the held-out pairs, and the pairs that are the wrong way round."""
        from qkit.tasks._preference.pages import sections_of_pairs

        return sections_of_pairs(evaluated)


def _of_a_batch(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Losses that compare the pairs of a batch with each other leave a pair no loss of its own, and a batch no parts."""
    sorting = [loss for loss in recipe.preference.loss_type if loss in preference.OF_A_BATCH]
    if not sorting:
        return
    of_batch = f"preference.loss_type={sorting[0]} is a loss of all pairs of a batch together"
    if recipe.ledger.losses:
        yield ("ledger", "losses"), f"ledger.losses=true: {of_batch}, so that no pair has its own; remove it"
    if recipe.micro_batches > 1:
        yield ("micro_batches",), f"micro_batches={recipe.micro_batches}: {of_batch}; lower data.batch_tokens instead"


TASK = PreferenceTask()
