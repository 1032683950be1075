"""Words as token ids, in one window or several: a sentence that is longer than a window is read in parts, and no word is divided.

The words are tokenized as one text with spaces between them: exactly what a pipeline or a server makes of that text. Which word a token belongs
to follows from the characters that it stands for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from qkit.core.errors import ModelError

CONTEXT = 4  # a further window begins with the words before its first one, up to a quarter of its tokens
NOWHERE = -1  # the place of a word without tokens, such as a lone variation selector


@dataclass(frozen=True)
class Windows:
    """Token ids of a sentence. `ids`: of each window, special tokens included; training reads the first one alone.

    `starts`: for each word the place of its first token, in all windows one after another; NOWHERE if it has none. `whole`: the tokens of the
    sentence in one window.
    """

    ids: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    whole: int


@dataclass(frozen=True)
class Tokenized:
    """A whole sentence. `before`, `after`: special tokens around it; `ids`: its tokens; `starts`: in these, of each word's first token."""

    before: tuple[int, ...]
    ids: tuple[int, ...]
    after: tuple[int, ...]
    starts: tuple[int, ...]


def joined(words: Sequence[str]) -> str:
    """The text of a sentence."""
    return " ".join(words)


def windows(tokenizer: Any, sentences: Sequence[Sequence[str]], limit: int) -> list[Windows]:
    """Return the windows of sentences, of at most `limit` tokens each. They are tokenized in one call.

    Raises:
        ModelError: the tokenizer does not say which characters a token stands for, or a window has no room for a token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for, which task=tag needs: use a model with a "
            "tokenizer.json"
        )
    if not sentences:
        return []
    texts = [joined(words) for words in sentences]
    encoded = tokenizer(texts, return_offsets_mapping=True, truncation=False, verbose=False)
    return [
        divided(_tokenized(text, words, ids, offsets), limit)
        for text, words, ids, offsets in zip(
            texts, sentences, encoded["input_ids"], encoded["offset_mapping"], strict=True
        )
    ]


def _tokenized(text: str, words: Sequence[str], ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Tokenized:
    begins = [0, *accumulate(len(word) + 1 for word in words)][: len(words)]
    real = [place for place, (begin, end) in enumerate(offsets) if end > begin]
    first, last = (real[0], real[-1] + 1) if real else (0, 0)
    starts = [NOWHERE] * len(words)
    for place in reversed(real):
        begin, end = offsets[place]
        while (
            begin < end and text[begin] == " "
        ):  # some tokens begin with the space before a word, and some are nothing else
            begin += 1
        if begin < end:
            starts[bisect_right(begins, begin) - 1] = place - first
    after = ids[last:] if real else ()
    return Tokenized(tuple(ids[:first] if real else ids), tuple(ids[first:last]), tuple(after), tuple(starts))


def divided(sentence: Tokenized, limit: int) -> Windows:
    """Return the windows of a tokenized sentence. The tokens of a word that is longer than a window are cut.

    Raises:
        ModelError: special tokens leave no room.
    """
    special = len(sentence.before) + len(sentence.after)
    whole = special + len(sentence.ids)
    if whole <= limit:
        starts = tuple(start if start < 0 else start + len(sentence.before) for start in sentence.starts)
        return Windows(((*sentence.before, *sentence.ids, *sentence.after),), starts, whole)
    if limit <= special:
        raise ModelError(f"data.max_length={limit} leaves no room for words beside {special} special tokens: raise it")
    ids: list[tuple[int, ...]] = []
    places, offset = [NOWHERE] * len(sentence.starts), 0
    for part in _parts(sentence, limit - special):
        for word in part.words:
            places[word] = offset + len(sentence.before) + sentence.starts[word] - part.begin
        ids.append((*sentence.before, *sentence.ids[part.begin : part.end], *sentence.after))
        offset += len(ids[-1])
    return Windows(tuple(ids), tuple(places), whole)


@dataclass(frozen=True)
class Part:
    """The tokens of a window, `begin` to `end`, and the words that are tagged there."""

    begin: int
    end: int
    words: tuple[int, ...]


def _parts(sentence: Tokenized, room: int) -> Iterator[Part]:
    """The windows of a sentence that does not fit one."""
    known = [word for word, start in enumerate(sentence.starts) if start >= 0]
    bounds = [*(sentence.starts[word] for word in known), len(sentence.ids)]
    done = 0  # of `known`
    while done < len(known):
        begin = done
        while (
            begin
            and bounds[done] - bounds[begin - 1] <= room // CONTEXT
            and bounds[done + 1] - bounds[begin - 1] <= room
        ):
            begin -= 1
        end = done + 1
        while end < len(known) and bounds[end + 1] - bounds[begin] <= room:
            end += 1
        yield Part(bounds[begin], min(bounds[end], bounds[begin] + room), tuple(known[done:end]))
        done = end
