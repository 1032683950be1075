"""FeedbackTask: answers that were rated good or bad, each to a prompt of its own (KTO). The model learns to prefer the good ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.plugins.checks import Check, SetRow
from qkit.plugins.example import NO_MORE, Example, Identity, RatedConversation, Reads
from qkit.plugins.first_recipe import Suggestion, Table
from qkit.plugins.task import Prediction
from qkit.recipe.schema import Data, Evaluate, Recipe
from qkit.tasks._conversation.task import ConversationTask
from qkit.tasks._preference._first_recipe import COMPARED
from qkit.tasks._preference.recipes import compared_clashes, rate
from qkit.tasks._preference.scoring import REWARD_FIGURES, without_score

if TYPE_CHECKING:
    import torch

    from qkit.plugins.resampling import Sample
    from qkit.tasks._preference.rated import RatedEncoder
    from qkit.tasks._preference.scoring import Comparer


class FeedbackTask(ConversationTask):
    """Records with a conversation and a label."""

    METRIC = "AUC of rewards"
    TRAINER = "feedback"
    UNSCORED: frozenset[str] = frozenset()
    SCORED_IN_PARTS: frozenset[str] = frozenset()
    ANSWERS_ARE_SCORED = False
    FIGURES = REWARD_FIGURES
    GATES = without_score(ConversationTask.GATES)

    def further_clashes(self, recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Values that have no meaning for rated answers."""
        yield from compared_clashes(recipe, "feedback")
        section = recipe.feedback
        if not section.desirable_weight and not section.undesirable_weight:
            yield (
                ("feedback",),
                "feedback.desirable_weight and feedback.undesirable_weight are both 0: nothing would be learned",
            )
        if recipe.micro_batches > 1 and section.loss_type == "kto":
            yield (
                ("micro_batches",),
                f"micro_batches={recipe.micro_batches}: feedback.loss_type=kto compares each answer with the mean of its batch; lower "
                "data.batch_tokens instead",
            )

    def defaults(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """A rate for small changes of a trained model."""
        return rate(raw)

    # --- init ---------------------------------------------------------------------------------------------------------

    START = COMPARED

    def suggestion(self, table: Table) -> Suggestion | None:
        """How the records of a data set are rated answers; None if they are not."""
        from qkit.tasks._preference._first_recipe import of_ratings

        return of_ratings(table)

    # --- data ---------------------------------------------------------------------------------------------------------

    def example(
        self, record: Mapping[str, Any], accepted: Any, data_format: str, section: Data, reads: Reads = NO_MORE
    ) -> Example:
        """A record with a rated answer."""
        from qkit.tasks._preference.rated import rated

        return rated(record, data_format, section, reads)

    def data_format(self, record: Mapping[str, Any], section: Data) -> str | None:
        """The format of the conversation."""
        from qkit.tasks._preference.rated import format_of

        return format_of(record, section)

    def unknown_column(self, section: Data, reads: Reads) -> str:
        """The error for a name in data.columns that nothing reads, or ""."""
        from qkit.tasks._preference.rated import unknown_column

        return unknown_column(section, reads)

    def known_names(self, name: str, data_format: str, reads: Reads) -> Iterable[str]:
        """The names that are read at the place of `name` in a record."""
        from qkit.tasks._preference.rated import known_names

        return known_names(name, data_format, reads)

    def identity(self, example: Example) -> Identity:
        """That of the conversation; of its content, the rating is a part."""
        assert isinstance(example, RatedConversation)
        plain = super().identity(example.conversation)
        return Identity(
            plain.question, f"{plain.content}\n{example.desirable}", plain.distinctive, str(example.desirable)
        )

    def columns(self) -> Mapping[str, str]:
        """The columns of a prepared row, with their Arrow types."""
        from qkit.tasks._preference.rated import RATED_COLUMNS

        return RATED_COLUMNS

    def encoder(self, recipe: Recipe) -> RatedEncoder:  # type: ignore[override]  # of rated conversations
        """Open the tokenizer and the chat template of the recipe's model."""
        from qkit.tasks._preference.rated import open_rated_encoder

        return open_rated_encoder(recipe)

    def set_checks(self, rows: Sequence[SetRow], recipe: Recipe) -> Iterator[Check]:
        """Whether there are good and bad answers."""
        from qkit.tasks._preference.rated import set_checks

        return set_checks(rows)

    # --- train --------------------------------------------------------------------------------------------------------

    def collate(self, rows: Sequence[Mapping[str, Any]], pad: int, packed: bool = False) -> dict[str, torch.Tensor]:
        """Rated answers, each with another prompt's answer beside it, as one padded batch."""
        from qkit.tasks._preference.collate import collate_rated

        return collate_rated(rows, pad)

    # --- evaluate, verify ---------------------------------------------------------------------------------------------

    def reference(self, record: Mapping[str, Any]) -> Any:
        """Whether the answer is good."""
        return bool(record["desirable"])

    def tune(self, runtime: Any, recipe: Recipe, data: Path) -> Mapping[str, float]:
        """Whether it is the reference itself that is measured: then by its log-probabilities alone."""
        from qkit.tasks._preference.scoring import plain_or_not

        return plain_or_not(runtime, recipe)

    def predictor(self, recipe: Recipe, data: Path, tuned: Mapping[str, float]) -> Comparer:  # type: ignore[override]  # it gives rewards
        """Rewards each answer."""
        from qkit.tasks._conversation.answerer import open_answerer
        from qkit.tasks._preference.scoring import PLAIN, Comparer

        return Comparer(open_answerer(recipe, data), PLAIN in tuned, data.with_name("train"))

    def correct(self, prediction: str, reference: Any, section: Evaluate) -> float:
        """1 if a good answer became more likely, or a bad one less; one half if neither changed."""
        from qkit.tasks._preference.scoring import preferred

        return preferred(prediction) if reference else 1 - preferred(prediction)

    def sample(self, predictions: Sequence[str], references: Sequence[Any]) -> Sample | None:
        """In how many pairs of a good and a bad answer the good one has the higher reward; ties count half."""
        from qkit.tasks._preference.scoring import ranking

        return ranking(predictions, references)

    def metrics(
        self, predictions: Sequence[Prediction], references: Sequence[Any], data: Path, section: Evaluate, seed: int
    ) -> Mapping[str, Any]:
        """Divergence from the reference and length of answers."""
        from qkit.tasks._preference.scoring import figures_of_pairs

        figures = figures_of_pairs(predictions, section.confidence, seed)
        return {figure.name: figures[figure.name] for figure in self.FIGURES if figure.name in figures}

    def answer(self, record: Mapping[str, Any]) -> str:
        """The answer, and how it is rated."""
        return f"{'good' if record['desirable'] else 'bad'}: {record['answer']}"


TASK = FeedbackTask()
