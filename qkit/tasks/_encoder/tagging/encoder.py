"""Words with tags to token ids: the first token of a word carries its tag, and the others no loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qkit.model import tokenizer as model_tokenizer
from qkit.model.source import companions
from qkit.plugins.example import Example, RowError, TaggedWords
from qkit.recipe.schema import Recipe
from qkit.tasks._encoder.encoder import EncodedText, Result, TextEncoder, TooLong, open_tokenizer
from qkit.tasks._encoder.tagging.windows import Windows, windows

COLUMNS: Mapping[str, str] = {
    "input_ids": "list<int32>",
    "token_type_ids": "list<int32>",
    "labels": "list<int32>",  # by token; -100 where no word begins
    "names": "list<string>",  # the tag of each word
    "tag_ids": "list<int32>",  # the same as ids
    "words": "list<string>",
    "starts": "list<int32>",  # of each word, where its first token is in input_ids + further; -1: it has none
    "further": "list<int32>",  # what does not fit data.max_length, as further windows, one after another ...
    "sizes": "list<int32>",  # ... with so many tokens each
}


@dataclass(frozen=True)
class EncodedWords(EncodedText):
    """One row. `input_ids`: the first window, which training reads; `names`: the tag of each word, as its source has it.

    `starts`: of each word, where its first token is in all windows, -1 if it has none; `further`: the windows after the first one.
    """

    starts: tuple[int, ...] = ()
    further: tuple[tuple[int, ...], ...] = ()

    @property
    def labelled(self) -> int:
        """Words that the loss compares."""
        return sum(0 <= start < len(self.input_ids) for start in self.starts)


@dataclass(frozen=True)
class WordEncoder(TextEncoder):
    """The encoder of tagged words."""

    def encode(self, examples: Sequence[Example | RowError]) -> list[Result]:
        """The row of each example, or the error that drops it; all sentences are tokenized in one call."""
        sentences = [example for example in examples if isinstance(example, TaggedWords)]
        limit = self.recipe.data.max_length
        divided = iter(windows(self.tokenizer, [example.words for example in sentences], limit))
        results = []
        for example in examples:
            if isinstance(example, TaggedWords):
                results.append(self._of_words(example, next(divided)))
            else:
                assert isinstance(example, RowError)
                results.append(Result(error=example))
        return results

    def _of_words(self, example: TaggedWords, found: Windows) -> Result:
        without = [word for word, start in zip(example.words, found.starts, strict=True) if start < 0]
        if len(without) == len(example.words):
            return Result(error=RowError("has no word that the tokenizer makes a token of", "empty"))
        types = [0] * len(found.ids[0]) if "token_type_ids" in self.tokenizer.model_input_names else []
        first, *further = found.ids
        row = EncodedWords(first, types, example.tags, found.whole, (), found.starts, tuple(further))
        findings = []
        if without:
            findings.append(("no_tokens", f"has {len(without)} words without a token, such as {without[0]!a}"))
        if found.whole > len(first):
            long = f"has {found.whole} tokens, more than data.max_length={self.recipe.data.max_length}"
            if self.recipe.data.too_long == "drop":
                return Result(error=TooLong(long, row))
            findings.append(("text_cut", f"{long}: training reads {row.labelled} of its {len(example.words)} words"))
        return Result([replace(row, findings=tuple(findings))])

    def columns(self, row: EncodedText, example: Example) -> dict[str, Any]:
        """The values of a prepared row, by COLUMNS. Label ids are known once all rows are."""
        assert isinstance(example, TaggedWords) and isinstance(row, EncodedWords)
        return {
            "input_ids": row.input_ids,
            "token_type_ids": row.token_type_ids,
            "labels": [],
            "names": list(row.names),
            "tag_ids": [],
            "words": list(example.words),
            "starts": row.starts,
            "further": [number for window in row.further for number in window],
            "sizes": [len(window) for window in row.further],
        }


def open_encoder(recipe: Recipe) -> WordEncoder:
    """Load the tokenizer of a recipe's model.

    Raises:
        ModelError: there is no tokenizer, or no token to pad with.
    """
    tokenizer = open_tokenizer(recipe)
    pad = model_tokenizer.padding_token(tokenizer, recipe.model, companions(recipe.model))
    return WordEncoder(recipe, tokenizer, pad, model_tokenizer.vocabulary(recipe.model, tokenizer))


def encoded(tokenizer: Any, words: Sequence[str], limit: int) -> Iterator[tuple[str, list[int]]]:
    """The ids that a tokenizer makes of a sentence today, as (column, values), to compare with those of training."""
    found = windows(tokenizer, [words], limit)[0]
    yield "input_ids", list(found.ids[0])
    yield "further", [number for window in found.ids[1:] for number in window]
    yield "starts", list(found.starts)
