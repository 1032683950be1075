"""How a finished model answers requests: a sentence, whose words are parted by white space, to its entities and the tag of each word."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError, short
from qkit.model import added_tokens
from qkit.plugins.example import RowError
from qkit.plugins.runtime import Encodes, TextRow
from qkit.plugins.task import Prepared, read_labels
from qkit.tasks._encoder.tagging import transitions
from qkit.tasks._encoder.tagging.rows import TaggedRow
from qkit.tasks._encoder.tagging.schemes import entities
from qkit.tasks._encoder.tagging.tagger import Tagger
from qkit.tasks._encoder.tagging.windows import windows
from qkit.tasks._texts import SURROGATE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class TagService:
    """The tags of a sentence. `names`: of the tags by id; `scores`: of a CRF, if the model has one."""

    FIELDS: Sequence[str] = ("text",)
    OPTIONS: Collection[str] = ()

    def __init__(self, tokenizer: Any, names: Sequence[str], max_length: int, scores: Any = None):
        self.tokenizer = tokenizer
        self.tagger = Tagger(tuple(names))
        self.max_length = max_length
        self.scores = scores
        self.has_types = "token_type_ids" in tokenizer.model_input_names

    def prepare(self, requests: Sequence[Mapping[str, Any]]) -> list[Prepared | RowError]:
        """The windows of each sentence, or what is wrong with it; all are tokenized in one call."""
        texts = [_text(request) for request in requests]
        sentences = [text.split() for text in texts if isinstance(text, str)]
        divided = iter(zip(sentences, windows(self.tokenizer, sentences, self.max_length), strict=True))
        return [text if isinstance(text, RowError) else self._prepared(*next(divided)) for text in texts]

    def _prepared(self, words: Sequence[str], made: Any) -> Prepared | RowError:
        if not any(start >= 0 for start in made.starts):
            return RowError("has no word that the tokenizer makes a token of", "empty")
        rows = tuple(TextRow(ids, [0] * len(ids) if self.has_types else []) for ids in made.ids)
        return Prepared(rows, TaggedRow(rows, made.starts, tuple(words)))

    def answer(self, prepared: Prepared, logits: Sequence[NDArray[np.float32]]) -> dict[str, Any]:
        """`words`, `tags` in IOB2, and `entities` with their type, words and text. `logits`: [tokens, labels] of each window."""
        row: TaggedRow = prepared.kept
        (prediction,) = self.tagger.predict(_Computed(logits, self.scores), [row])
        tags = prediction.text.split()
        named = [
            {"type": one.type, "begin": one.begin, "end": one.end, "text": " ".join(row.words[one.begin : one.end])}
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
    return TagService(added_tokens.bare_tokenizer(folder, False), names, max_length, transitions.in_folder(folder))
