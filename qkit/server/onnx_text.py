"""Text from tokens as they are generated, cut at stop strings.

This is not tokenizers' DecodeStream, which raises an error for some sequences of byte-fallback tokens, and has no way to ask for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class Text:
    """Takes token ids and returns text as soon as it is final: no partial characters, and nothing that may become a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self.tokenizer = tokenizer
        self.stops = stops
        self.ids: list[int] = []
        # Text up to ids[read] has been returned. Decoding starts at ids[prefix], since a token's text can depend on the tokens before it.
        self.prefix = self.read = 0
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that this token makes final."""
        self.ids.append(token)
        before = self._decode(self.ids[self.prefix : self.read])
        now = self._decode(self.ids[self.prefix :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self.prefix, self.read = self.read, len(self.ids)
        return self._cut(now[len(before) :], last=False)

    def end(self) -> str:
        """The rest of the text, after the last token."""
        before = self._decode(self.ids[self.prefix : self.read])
        return "" if self.stopped else self._cut(self._decode(self.ids[self.prefix :])[len(before) :], last=True)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _cut(self, new: str, last: bool) -> str:
        self.held += new
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self.held[: min(places)]
        keep = 0 if last else max((_overlap(self.held, stop) for stop in self.stops), default=0)
        final, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return final


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


@dataclass(frozen=True)
class Piece:
    """A part of an answer. The last one has the `reason` for the end, and the number of `tokens` of the whole answer."""

    text: str
    reason: str | None = None
    tokens: int = 0
