"""Text from tokens as they come, cut at stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# --- text ---------------------------------------------------------------------------------------------------------------


class Text:
    """Token ids in, text out as soon as it is certain: no half characters, and nothing that may yet become a stop."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self.tokenizer = tokenizer
        self.stops = stops
        self.ids: list[int] = []
        self.prefix = self.read = (
            0  # the ids of which the text was given out, and some before them, whose text shapes it
        )
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be given out now."""
        self.ids.append(token)
        before = self._decode(self.ids[self.prefix : self.read])
        now = self._decode(self.ids[self.prefix :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self.prefix, self.read = self.read, len(self.ids)
        return self._cut(now[len(before) :], last=False)

    def end(self) -> str:
        """What was held back."""
        before = self._decode(self.ids[self.prefix : self.read])
        return "" if self.stopped else self._cut(self._decode(self.ids[self.prefix :])[len(before) :], last=True)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _cut(self, new: str, last: bool) -> str:
        self.held += new
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self.held[: min(found)]
        keep = 0 if last else max((_overlap(self.held, stop) for stop in self.stops), default=0)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


@dataclass(frozen=True)
class Piece:
    """A part of an answer. `reason` is set on the last one, where `tokens` counts the whole answer's."""

    text: str
    reason: str | None = None
    tokens: int = 0
