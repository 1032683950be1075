"""Logits of tokens to tags of words: predictions, and the distributions by which models are compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.plugins.runtime import Encodes, RowScores, TextRow
from qkit.plugins.task import LABELS, Prediction
from qkit.tasks._distributions import log_softmax
from qkit.tasks._encoder.labels import log_counts
from qkit.tasks._encoder.tagging.crf import Transitions, decode, marginals
from qkit.tasks._encoder.tagging.rows import TaggedRow
from qkit.tasks._encoder.tagging.schemes import OUTSIDE, Scheme, constraint, entities

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Scored = Mapping[str, NDArray[np.float32]]  # scores of a CRF, by name

CHUNK = 64  # sentences that pass through a CRF together


# --- logits -----------------------------------------------------------------------------------------------------------


def emissions(runtime: Encodes, rows: Sequence[TaggedRow]) -> Iterator[NDArray[np.float32]]:
    """The logits at the first token of each word that has one, [words, labels], from all windows of a row."""
    import numpy as np

    computed = runtime.logits([window for row in rows for window in row.windows])
    for row in rows:
        tokens = np.concatenate([next(computed) for _ in row.windows])
        yield tokens[[start for start in row.starts if start >= 0]]


def log_probabilities(runtime: Encodes, rows: Sequence[TaggedRow]) -> Iterator[NDArray[np.float32]]:
    """Of each tag at each word that has a token, [words, labels]: a softmax, or the marginals of a CRF."""
    transitions = runtime.transitions()
    for part in _parts(list(emissions(runtime, rows))):
        if transitions is None:
            yield from map(log_softmax, part)
        else:
            batch, lengths = _padded(part)
            scores = marginals(_on_torch(transitions), batch, lengths).numpy()
            yield from (of_row[:length] for of_row, length in zip(scores, lengths.tolist(), strict=True))


def _parts(rows: Sequence[NDArray[np.float32]]) -> Iterator[Sequence[NDArray[np.float32]]]:
    return (rows[begin : begin + CHUNK] for begin in range(0, len(rows), CHUNK))


def _on_torch(scores: Scored) -> Transitions:
    import torch

    return Transitions(**{name: torch.from_numpy(array) for name, array in scores.items()})


def _padded(rows: Sequence[NDArray[np.float32]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as [rows, most words, labels], and the words of each."""
    import torch

    lengths = torch.tensor([len(row) for row in rows])
    batch = torch.zeros(len(rows), int(lengths.max()), rows[0].shape[1])
    for index, row in enumerate(rows):
        batch[index, : len(row)] = torch.from_numpy(row)
    return batch, lengths


def scores(runtime: Encodes, rows: Sequence[TaggedRow]) -> Iterator[RowScores]:
    """The distribution over the tags at each word that has a token."""
    import numpy as np

    for row, full in zip(rows, log_probabilities(runtime, rows), strict=True):
        truth = np.array([label for label, start in zip(row.labels, row.starts, strict=True) if start >= 0], np.int64)
        targets = np.take_along_axis(full, truth[:, None], 1)[:, 0]
        yield RowScores(targets, full.argmax(1).astype(np.int64), full, unit="tags")


# --- predictions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tagger:
    """`names`: tags by id. A prediction's text is its tags, parted by spaces."""

    names: tuple[str, ...]

    def predict(
        self, runtime: Encodes, rows: Sequence[TaggedRow], advance: Callable[[int], None] = lambda _: None
    ) -> list[Prediction]:
        """The tags of each row: the most likely one of each word, or with a CRF the most likely valid sequence. `entities`: what they name."""
        predictions = []
        for row, ids in zip(rows, self._ids(runtime, rows), strict=True):
            tags = self.with_all_words([self.names[number] for number in ids], row)
            predictions.append(Prediction(" ".join(tags), {"entities": named(row.words, tags)}))
            advance(1)
        return predictions

    def _ids(self, runtime: Encodes, rows: Sequence[TaggedRow]) -> Iterator[list[int]]:
        transitions = runtime.transitions()
        valid = constraint(self.names, Scheme.IOB2)
        for part in _parts(list(emissions(runtime, rows))):
            if transitions is None:
                yield from (logits.argmax(-1).tolist() for logits in part)
            else:
                yield from decode(_on_torch(transitions), *_padded(part), valid)

    def with_all_words(self, tags: Sequence[str], row: TaggedRow) -> list[str]:
        """Tags for all words: one without tokens is in an entity if the entity goes on after it, and else O."""
        given, spread = list(tags), []
        for start in reversed(row.starts):
            if start >= 0:
                spread.append(given.pop())
            else:
                after = spread[-1] if spread else OUTSIDE
                spread.append(after if after.startswith("I") else OUTSIDE)
        return spread[::-1]


def named(words: Sequence[str], tags: Sequence[str]) -> list[str]:
    """The entities of a sentence, such as "person: Ada Lovelace"."""
    return [f"{entity.type}: {' '.join(words[entity.begin : entity.end])}" for entity in entities(tags)]


class MostFrequent(Encodes):
    """A model without an input: the logits of each token are the logarithms of how many words of training have each tag."""

    def __init__(self, counts: Sequence[int]):
        self.counts = counts

    def logits(self, rows: Sequence[TextRow]) -> Iterator[NDArray[np.float32]]:
        import numpy as np

        prior = log_counts(self.counts)
        return (np.tile(prior, (len(row.input_ids), 1)) for row in rows)

    def memory_bytes(self) -> int:
        return 0


def open_most_frequent(data: Path) -> MostFrequent:
    """The baseline of a data folder."""
    content: dict[str, Any] = json.loads((data / LABELS).read_text(encoding="utf-8"))
    return MostFrequent([content["rows"]["train"][name] for name in content["names"]])
