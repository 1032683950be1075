"""Texts to token ids: the tokenizer of an encoder, opened once per process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qkit.model import added_tokens
from qkit.model import tokenizer as model_tokenizer
from qkit.model.source import companions
from qkit.plugins.checks import Check
from qkit.plugins.example import NO_MORE, Example, LabelledText, Reads, RowError
from qkit.recipe.schema import Recipe

COLUMNS: Mapping[str, str] = {
    "input_ids": "list<int32>",
    "token_type_ids": "list<int32>",
    "labels": "list<int32>",
    "names": "list<string>",
    "text": "string",
    "pair": "string",
}
MOSTLY = 0.5  # share of unknown tokens


@dataclass(frozen=True)
class EncodedText:
    """One row. `input_ids`, `token_type_ids`: [tokens]; the latter is empty where the model has none. `names`: its labels.

    `whole_tokens`: its length before anything was cut; `findings`: (check, what was seen).
    """

    input_ids: Sequence[int]
    token_type_ids: Sequence[int]
    names: tuple[str, ...]
    whole_tokens: int
    findings: tuple[tuple[str, str], ...] = ()

    @property
    def labelled(self) -> int:
        """Values that the loss compares: one for a text with a label."""
        return 1


@dataclass(frozen=True)
class Result:
    """What became of one example: its row, or several, or the error that says why it makes none."""

    rows: Sequence[Any] = ()
    error: RowError | None = None


class TooLong(RowError):
    """A text that is longer than data.max_length, where such rows are dropped; `row`: the whole row."""

    def __init__(self, message: str, row: Any):
        super().__init__(message, "length")
        self.row = row

    @property
    def labelled(self) -> int:
        labelled: int = self.row.labelled
        return labelled


@dataclass(frozen=True)
class TextEncoder:
    """`pad`: the id that fills batches; `vocabulary`: rows of the embedding."""

    recipe: Recipe
    tokenizer: Any
    pad: int
    vocabulary: int
    reads: Reads = NO_MORE

    def encode(self, examples: Sequence[Example | RowError]) -> list[Result]:
        """The row of each example, or the error that drops it; all texts are tokenized in one call."""
        texts = [example for example in examples if isinstance(example, LabelledText)]
        rows = iter(self._rows(texts))
        return [
            self._result(next(rows)) if isinstance(e, LabelledText) else Result(error=as_error(e)) for e in examples
        ]

    def _rows(self, examples: Sequence[LabelledText]) -> Iterator[EncodedText]:
        singles = [example for example in examples if example.pair is None]
        pairs = [example for example in examples if example.pair is not None]
        encoded: dict[int, EncodedText] = {}
        for group, second in ((singles, None), (pairs, [example.pair for example in pairs])):
            if group:
                whole = self._tokenized([example.text for example in group], second, truncation=False)
                limit = self.recipe.data.max_length
                cut = whole
                if any(len(ids) > limit for ids in whole["input_ids"]):
                    texts = [example.text for example in group]
                    cut = self._tokenized(texts, second, truncation=True, max_length=limit)
                for place, example in enumerate(group):
                    encoded[id(example)] = _row(example, cut, place, len(whole["input_ids"][place]))
        return iter([encoded[id(example)] for example in examples])

    def _tokenized(self, texts: Sequence[str], pairs: Sequence[Any] | None, **options: Any) -> Any:
        return self.tokenizer(list(texts), list(pairs) if pairs else None, verbose=False, **options)

    def _result(self, row: EncodedText) -> Result:
        cut = row.whole_tokens - len(row.input_ids)
        if not cut:
            return Result([row])
        limit = self.recipe.data.max_length
        if self.recipe.data.too_long == "drop":
            return Result(error=TooLong(f"has {row.whole_tokens} tokens, more than data.max_length={limit}", row))
        found = ("text_cut", f"has {row.whole_tokens} tokens, of which data.max_length={limit} keeps the first")
        return Result([EncodedText(row.input_ids, row.token_type_ids, row.names, row.whole_tokens, (found,))])

    def examine(self, row: EncodedText, thoroughly: bool) -> Iterator[tuple[str, str]]:
        """Everything found in a row: (check, message)."""
        yield from row.findings
        if beyond := [number for number in row.input_ids if number >= self.vocabulary]:
            yield "vocabulary", f"contains the token id {beyond[0]}; the embedding has {self.vocabulary:,} rows"
        unknown = self.tokenizer.unk_token_id
        words = [
            number for number in row.input_ids if number not in self.tokenizer.all_special_ids or number == unknown
        ]
        if unknown is not None and words and words.count(unknown) > MOSTLY * len(words):
            yield "unknown", f"has {words.count(unknown)} unknown tokens of {len(words)}"

    def columns(self, row: EncodedText, example: Example) -> dict[str, Any]:
        """The values of a prepared row, by COLUMNS. Label ids are known once all rows are."""
        assert isinstance(example, LabelledText)
        return {
            "input_ids": row.input_ids,
            "token_type_ids": row.token_type_ids,
            "labels": [],
            "names": list(row.names),
            "text": example.text,
            "pair": example.pair,
        }

    def special_tokens(self) -> dict[str, Any]:
        """The content of tokens.json. Nothing stops at a token: no text is generated."""
        return {"pad": self.pad, "stop": []}

    def description(self, tokens: Mapping[str, Any]) -> dict[str, str]:
        """The padding token."""
        return {"name": "none", "pad": str(self.tokenizer.convert_ids_to_tokens(tokens["pad"]))}

    def ids_in_every_row(self, tokens: Mapping[str, Any]) -> set[int]:
        """The special tokens that the tokenizer puts around a text, and padding."""
        return {tokens["pad"], *self.tokenizer("a")["input_ids"]}

    def setup_checks(self, tokens: Mapping[str, Any]) -> Iterator[Check]:
        """None: there is no template."""
        return iter(())


def as_error(example: Example | RowError) -> RowError:
    """The error that an example is."""
    assert isinstance(example, RowError)
    return example


def _row(example: LabelledText, encoded: Any, place: int, whole: int) -> EncodedText:
    types = encoded.get("token_type_ids")
    return EncodedText(encoded["input_ids"][place], types[place] if types else [], example.labels, whole)


def open_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of a recipe's model, with the tokens of model.add_tokens.

    Raises:
        ModelError: there is none.
    """
    tokenizer = added_tokens.bare_tokenizer(companions(recipe.model), recipe.model.trust_remote_code)
    added_tokens.add(tokenizer, recipe.model.add_tokens)
    return tokenizer


def open_encoder(recipe: Recipe) -> TextEncoder:
    """Load the tokenizer of a recipe's model; no chat template is needed.

    Raises:
        ModelError: there is no tokenizer, or no token to pad with.
    """
    tokenizer = open_tokenizer(recipe)
    pad = model_tokenizer.padding_token(tokenizer, recipe.model, companions(recipe.model))
    return TextEncoder(recipe, tokenizer, pad, model_tokenizer.vocabulary(recipe.model, tokenizer))
