"""How a finished model answers requests: a text, or the words of a sentence, to its entities and the tag of each word."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError, short
from qkit.core.files import read_json
from qkit.model import added_tokens
from qkit.plugins.example import RowError
from qkit.plugins.runtime import Encodes, TextRow
from qkit.plugins.task import LABELS, Prepared, read_labels
from qkit.tasks._encoder.tagging import transitions
from qkit.tasks._encoder.tagging.rows import TaggedRow
from qkit.tasks._encoder.tagging.schemes import entities
from qkit.tasks._encoder.tagging.tagger import Tagger
from qkit.tasks._encoder.tagging.windows import joined, windows
from qkit.tasks._encoder.tagging.words import BY_SPACE, DIVIDED, DIVISIONS
from qkit.tasks._texts import SURROGATE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class TagService:
    """The tags of a sentence: of a `text`, or of `tokens`, its words, which are taken as they are.

    `names`: of the tags by id; `scores`: of a CRF, if the model has one; `divided`: see words.DIVISIONS.
    """

    FIELDS: Sequence[str] = ("text", "tokens")
    OPTIONS: Collection[str] = ()

    def __init__(
        self, tokenizer: Any, names: Sequence[str], max_length: int, scores: Any = None, divided: str = BY_SPACE
    ):
        self.tokenizer = tokenizer
        self.tagger = Tagger(tuple(names))
        self.max_length = max_length
        self.scores = scores
        self.division = DIVISIONS[divided]
        self.has_types = "token_type_ids" in tokenizer.model_input_names

    def prepare(self, requests: Sequence[Mapping[str, Any]]) -> list[Prepared | RowError]:
        """The windows of each sentence, or what is wrong with it; all are tokenized in one call."""
        sentences = [self._sentence(request) for request in requests]
        words = [sentence.words for sentence in sentences if isinstance(sentence, _Sentence)]
        made = iter(windows(self.tokenizer, words, self.max_length))
        return [one if isinstance(one, RowError) else self._prepared(one, next(made)) for one in sentences]

    def _sentence(self, request: Mapping[str, Any]) -> _Sentence | RowError:
        if request.get("tokens") is not None:
            return _listed(request)
        text = _text(request)
        return text if isinstance(text, RowError) else _Sentence(text, tuple(self.division(text)))

    def _prepared(self, sentence: _Sentence, made: Any) -> Prepared | RowError:
        if not any(start >= 0 for start in made.starts):
            return RowError("has no word that the tokenizer makes a token of", "empty")
        rows = tuple(TextRow(ids, [0] * len(ids) if self.has_types else []) for ids in made.ids)
        return Prepared(rows, (TaggedRow(rows, made.starts, sentence.words), sentence))

    def answer(self, prepared: Prepared, logits: Sequence[NDArray[np.float32]]) -> dict[str, Any]:
        """`words`, `tags` in IOB2, and `entities` with their type, words and text. `logits`: [tokens, labels] of each window."""
        row, sentence = prepared.kept
        (prediction,) = self.tagger.predict(_Computed(logits, self.scores), [row])
        tags = prediction.text.split()
        named = [
            {"type": one.type, "begin": one.begin, "end": one.end, "text": sentence.part(one.begin, one.end)}
            for one in entities(tags)
        ]
        return {"words": list(row.words), "tags": tags, "entities": named}

    def difference(self, expected: Mapping[str, Any], given: Mapping[str, Any], tolerance: float) -> str:
        """The first word that has another tag; "" if there is none. Answers have no values to which a tolerance would apply."""
        for word, ours, theirs in zip(expected["words"], expected["tags"], given["tags"], strict=False):
            if ours != theirs:
                return f"the word {short(repr(word))} has the tag {theirs}, not {ours}"
        counts = len(expected["tags"]), len(given["tags"])
        return "" if counts[0] == counts[1] else f"it has {counts[1]} tags, not {counts[0]}"


@dataclass(frozen=True)
class _Sentence:
    """A text, and begin and end of each of its words."""

    text: str
    offsets: Sequence[tuple[int, int]]

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(self.text[begin:end] for begin, end in self.offsets)

    def part(self, begin: int, end: int) -> str:
        """The text from word `begin` to before word `end`."""
        return self.text[self.offsets[begin][0] : self.offsets[end - 1][1]]


@dataclass(frozen=True)
class _Computed(Encodes):
    """Logits that are there already."""

    windows: Sequence[NDArray[np.float32]]
    scores: Any

    def logits(self, rows: Sequence[TextRow]) -> Iterator[NDArray[np.float32]]:
        return iter(self.windows)

    def transitions(self) -> Mapping[str, NDArray[np.float32]] | None:
        scores: Mapping[str, NDArray[np.float32]] | None = self.scores
        return scores

    def memory_bytes(self) -> int:
        return 0


def _listed(request: Mapping[str, Any]) -> _Sentence | RowError:
    """The sentence of `tokens`, as training joins words."""
    tokens = request["tokens"]
    if request.get("text") is not None:
        return RowError("has both text and tokens: give one of them")
    if not isinstance(tokens, list | tuple):
        return RowError(f"tokens is not a list: {short(repr(tokens))}")
    for place, word in enumerate(tokens):
        if not isinstance(word, str) or not word:
            return RowError(
                f"tokens: word {place} (counted from 0) is not a text with a sign in it: {short(repr(word))}"
            )
    if not "".join(tokens).strip():
        return RowError("tokens has no words", "empty")
    if SURROGATE.search(joined(tokens)):
        return RowError("tokens contains half of a surrogate pair, which is not valid Unicode")
    ends = list(accumulate(tokens, lambda end, word: end + 1 + len(word), initial=-1))[1:]
    return _Sentence(joined(tokens), [(end - len(word), end) for end, word in zip(ends, tokens, strict=True)])


def _text(request: Mapping[str, Any]) -> str | RowError:
    text = request.get("text")
    if not isinstance(text, str):
        return RowError(f"text is not a text: {short(repr(text))}" if text is not None else "has no text")
    if not text.split():
        return RowError("text is empty or contains only white space", "empty")
    if SURROGATE.search(text):
        return RowError("text contains half of a surrogate pair, which is not valid Unicode")
    return text


def open_service(folder: Path, max_length: int) -> TagService:
    """Open the tokenizer, the names of the tags and the scores of a CRF of an artifact.

    Raises:
        ModelError: the folder has no tokenizer, or no labels.json.
    """
    names = read_labels(folder)
    if not names:
        raise ModelError(f"{folder}: labels.json is missing, so the tags have no names; export it again", source=folder)
    divided = read_json(folder / LABELS).get(
        DIVIDED, BY_SPACE
    )  # artifacts that do not say were made before it was recorded
    tokenizer = added_tokens.bare_tokenizer(folder, False)
    return TagService(tokenizer, names, max_length, transitions.in_folder(folder), divided)
