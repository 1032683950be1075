"""Pairs to token ids: the prompt once, and both answers, each with the labels that it has in a conversation of its own.

Both sides go through the encoder of conversations, with the chat template. Here they become one row, whose length decides for both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qkit.plugins.checks import Check
from qkit.plugins.example import AnswerPair, Conversation, Example, Reads, RowError
from qkit.recipe.schema import Data, Recipe
from qkit.tasks._conversation.encode import Result as SideResult
from qkit.tasks._conversation.encode import shortened, tokenize
from qkit.tasks._conversation.encoder import COLUMNS, ConversationEncoder, open_encoder
from qkit.tasks._conversation.rows import EncodedRow, Refused
from qkit.tasks._preference.checks import PairFacts
from qkit.tasks._preference.reading import SIDES

# As of a conversation, which is the chosen one; and the other answer, which follows the same prompt.
PAIR_COLUMNS: Mapping[str, str] = {
    **COLUMNS,
    "rejected_ids": "list<int32>",
    "rejected_labels": "list<int32>",
    "rejected": "string",
}
NO_LIMIT = 2**31 - 1  # of a side: the whole row has one


@dataclass(frozen=True)
class PairRow:
    """Two rows that begin with the same prompt. `whole_tokens`: of both before the prompt was cut, the prompt counted once."""

    chosen: EncodedRow
    rejected: EncodedRow
    whole_tokens: int
    names: tuple[str, ...] = ()

    @property
    def rejected_ids(self) -> Sequence[int]:
        """The rejected answer."""
        return self.rejected.input_ids[self.rejected.start :]

    @property
    def rejected_labels(self) -> Sequence[int]:
        return self.rejected.labels[self.rejected.start :]

    @property
    def input_ids(self) -> Sequence[int]:
        """The prompt, the chosen and the rejected answer."""
        return [*self.chosen.input_ids, *self.rejected_ids]

    @property
    def labelled(self) -> int:
        """Tokens of both answers that carry loss."""
        return self.chosen.labelled + self.rejected.labelled

    @property
    def about(self) -> PairFacts:
        answers = (self.chosen.input_ids[self.chosen.start :], self.rejected_ids)
        digests = [hashlib.sha256(repr(list(ids)).encode()).hexdigest() for ids in answers]
        return PairFacts(digests[0], digests[1], len(answers[0]), len(answers[1]))


@dataclass(frozen=True)
class Result:
    """The row of a pair, or the error that drops it."""

    rows: Sequence[PairRow] = ()
    error: RowError | None = None


@dataclass(frozen=True)
class OfConversations:
    """What encoders of conversations in pairs or with ratings have of the plain one, `each`."""

    recipe: Recipe
    each: ConversationEncoder

    @property
    def reads(self) -> Reads:
        """What the chat template reads."""
        return self.each.reads

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        return self.each.tokenizer

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.each.vocabulary

    def special_tokens(self) -> dict[str, Any]:
        """The content of tokens.json."""
        return self.each.special_tokens()

    def description(self, tokens: Mapping[str, Any]) -> dict[str, str]:
        """The name of the chat template, and the tokens that end a turn and pad."""
        return self.each.description(tokens)

    def ids_in_every_row(self, tokens: Mapping[str, Any]) -> set[int]:
        """Ids that every data set uses."""
        return self.each.ids_in_every_row(tokens)

    def setup_checks(self, tokens: Mapping[str, Any]) -> Iterator[Check]:
        """The checks of template and tokenizer as a whole."""
        return self.each.setup_checks(tokens)


@dataclass(frozen=True)
class PairEncoder(OfConversations):
    """Encodes both sides of a pair as one row."""

    def encode(self, examples: Sequence[Example | RowError]) -> list[Result]:
        """The row of each pair, or the error that drops it; all texts are tokenized in one call."""
        sides: list[Conversation | RowError] = []
        for example in examples:
            sides += [example.chosen, example.rejected] if isinstance(example, AnswerPair) else [_error(example)] * 2
        results = tokenize(self.each.renderer, sides, _unlimited(self.recipe.data))
        pairs = zip(examples, results[::2], results[1::2], strict=True)
        return [self._result(example, chosen, rejected) for example, chosen, rejected in pairs]

    def _result(self, example: Example | RowError, chosen: SideResult, rejected: SideResult) -> Result:
        if isinstance(example, RowError):
            return Result(error=example)
        assert isinstance(example, AnswerPair)
        try:
            return Result([self._fitted(example, _joined(chosen, rejected))])
        except RowError as error:
            return Result(error=error)

    def _fitted(self, example: AnswerPair, row: PairRow) -> PairRow:
        """The row if it is within data.max_length, or without the oldest turns of its prompt.

        Raises:
            Refused: it is too long.
        """
        section = self.recipe.data
        if row.whole_tokens <= section.max_length:
            return row
        if section.too_long != "truncate_prompt":
            raise Refused(
                f"has {row.whole_tokens} tokens (the prompt, and both answers), data.max_length is {section.max_length}",
                "length",
                row,  # type: ignore[arg-type]
            )
        for shorter in _shortened(example):
            results = tokenize(self.each.renderer, [shorter.chosen, shorter.rejected], _unlimited(section))
            cut = _joined(*results)
            if cut.whole_tokens <= section.max_length:
                gone = row.whole_tokens - cut.whole_tokens
                finding = (
                    "prompt_cut",
                    f"the oldest turns of its prompt are removed: {gone} of {row.whole_tokens} tokens",
                )
                kept = replace(cut.chosen, findings=(*cut.chosen.findings, finding))
                return replace(cut, chosen=kept, whole_tokens=row.whole_tokens)
        raise Refused(
            f"has {row.whole_tokens} tokens; even its last question and both answers exceed data.max_length={section.max_length}",
            "length",
            row,  # type: ignore[arg-type]
        )

    def examine(self, row: PairRow, thoroughly: bool) -> Iterator[tuple[str, str]]:
        """Everything found in either side: (check, message)."""
        for side, of_side in zip(SIDES, (row.chosen, row.rejected), strict=True):
            for name, message in self.each.examine(of_side, thoroughly):
                yield name, f"({side}) {message}"

    def columns(self, row: PairRow, example: AnswerPair) -> dict[str, Any]:
        """The values of a prepared row, by PAIR_COLUMNS."""
        return {
            **self.each.columns(row.chosen, example.chosen),
            "rejected_ids": row.rejected_ids,
            "rejected_labels": row.rejected_labels,
            "rejected": row.rejected.answer,
        }


def open_pair_encoder(recipe: Recipe) -> PairEncoder:
    """Load the tokenizer and the chat template of a recipe's model, and probe them."""
    return PairEncoder(recipe, open_encoder(recipe))


def _error(example: Example | RowError) -> RowError:
    return example if isinstance(example, RowError) else RowError("is no pair of answers")


def _unlimited(section: Data) -> Data:
    return section.model_copy(update={"max_length": NO_LIMIT})


def _joined(chosen: SideResult, rejected: SideResult) -> PairRow:
    """One row of both sides.

    Raises:
        RowError: one of them cannot be used, or their prompts or answers do not make a pair.
    """
    for side, result in zip(SIDES, (chosen, rejected), strict=True):
        if result.error is not None:
            raise RowError(f"{side}: {result.error}", result.error.rule)
    left, right = chosen.rows[0], rejected.rows[0]
    if left.input_ids[: left.start] != right.input_ids[: right.start]:
        raise RowError("has no common prompt: the chat template writes other prompts for its two answers", "prompt")
    if left.input_ids == right.input_ids:
        raise RowError(
            "has the same answer as chosen and as rejected once the chat template has written them", "identical"
        )
    tokens = len(left.input_ids) + len(right.input_ids) - right.start
    return PairRow(left, right, tokens)


def _shortened(example: AnswerPair) -> Iterator[AnswerPair]:
    """Pairs with ever shorter prompts, the same on both sides."""
    last = len(example.chosen.messages) - 1
    sides = zip(shortened(example.chosen, last), shortened(example.rejected, last), strict=True)
    for (_, chosen), (_, rejected) in sides:
        yield replace(example, chosen=chosen, rejected=rejected)
