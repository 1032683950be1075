"""What is odd about the labels of a data set: rare ones, names that look like typos, texts with several labels.

Each function returns dataclasses with a message for people; nothing is dropped or changed here.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from qkit.core.errors import SHOWN, short

TRAIN = "train"
NAMED = 5  # places and labels that a message names
SEPARATORS = re.compile(r"[\s_\-./:]+")
ACCENTS = re.compile("[\u0300-\u036f]")  # and no marks that tell letters apart in other scripts
DIGIT = re.compile(r"\d")
SHORT_WORD, LONG_WORD = (
    5,
    9,
)  # letters from which one edit, and two, may be a typo: among shorter words too many are one edit apart


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A row with one label. `text`: a digest of its text; `place`: file and line, for messages."""

    text: str
    label: str
    split: str
    place: str


@dataclass(frozen=True)
class RareLabel:
    """A label with few rows to learn from."""

    label: str
    rows: int
    fewest: int

    @property
    def message(self) -> str:
        return f"label {_quoted(self.label)} has {_rows(self.rows)}, fewer than {self.fewest}"


@dataclass(frozen=True)
class NearNames:
    """Two labels whose names differ by little: by `edits` letters, or (0) only in case, separators or accents. `rare` has fewer rows."""

    rare: str
    common: str
    rare_rows: int
    common_rows: int
    edits: int

    @property
    def message(self) -> str:
        differ = (
            "only in case, separators or accents"
            if not self.edits
            else f"in {self.edits} letter{'s' * (self.edits > 1)}"
        )
        return (
            f"labels {_quoted(self.rare)} ({_rows(self.rare_rows)}) and {_quoted(self.common)} ({_rows(self.common_rows)}) "
            f"differ {differ}: if they mean the same, write them alike"
        )


@dataclass(frozen=True)
class Conflict:
    """A text that rows label differently. `labels`: the rows of each label, the most frequent first; `places`: of the rows, in order."""

    text: str
    labels: tuple[tuple[str, int], ...]
    places: tuple[str, ...]

    @property
    def rows(self) -> int:
        return len(self.places)

    @property
    def lost(self) -> int:
        """Rows that a classifier must get wrong: it gives one label to a text."""
        return self.rows - self.labels[0][1]

    @property
    def message(self) -> str:
        labels = ", ".join(f"{_quoted(label)} ({_rows(rows)})" for label, rows in self.labels[:NAMED])
        return f"one text has the labels {labels}: {', '.join(self.places[:NAMED])}"


@dataclass(frozen=True)
class Conflicts:
    """All texts with several labels among so many `rows`, those that cost most first."""

    texts: tuple[Conflict, ...]
    rows: int

    @property
    def best_accuracy(self) -> float:
        """The accuracy on these rows that no classifier can exceed, 0 to 1: each text has the label that most of its rows have."""
        return self.most_right / self.rows if self.rows else 1.0

    @property
    def most_right(self) -> int:
        """How many of these rows a classifier can get right."""
        return self.rows - sum(text.lost for text in self.texts)

    @property
    def message(self) -> str:
        if not self.texts:
            return "no text has different labels"
        texts = "1 text has" if len(self.texts) == 1 else f"{len(self.texts):,} texts have"
        share = f"{self.most_right:,} of these {self.rows:,} rows right ({100 * self.best_accuracy:.2f} %)"
        return f"{texts} different labels: no classifier can get more than {share}; {self.texts[0].message}"


def rare_labels(rows: Iterable[LabelledRow], fewest: int) -> list[RareLabel]:
    """Return the labels with fewer than `fewest` training rows, the rarest first. Those without any are `unseen_labels`."""
    counts = Counter(row.label for row in rows if row.split == TRAIN)
    rare = [RareLabel(label, count, fewest) for label, count in counts.items() if count < fewest]
    return sorted(rare, key=lambda label: (label.rows, label.label))


def conflicts(rows: Iterable[LabelledRow]) -> Conflicts:
    """Return the texts that have several labels. The rows may be those of one split: the bound on accuracy is for the rows given."""
    by_text: defaultdict[str, list[LabelledRow]] = defaultdict(list)
    count = 0
    for row in rows:
        by_text[row.text].append(row)
        count += 1
    texts = [_conflict(text, known) for text, known in by_text.items() if len({row.label for row in known}) > 1]
    return Conflicts(tuple(sorted(texts, key=lambda conflict: -conflict.lost)), count)


def _conflict(text: str, rows: Sequence[LabelledRow]) -> Conflict:
    labels = sorted(Counter(row.label for row in rows).items(), key=lambda item: (-item[1], item[0]))
    return Conflict(text, tuple(labels), tuple(row.place for row in rows))


def near_names(counts: Mapping[str, int]) -> list[NearNames]:
    """Return pairs of labels whose names are likely meant to be one, by name.

    Names are alike if they differ only in case, separators or accents; or if one word differs, which begins with the same letter, by one edit
    in words of SHORT_WORD letters or more, two in those of LONG_WORD or more. An edit adds, drops or changes a letter, or swaps two. A word
    with a digit must be the same: `label_1` and `label_2` are two labels. 3,000 names of one word take two seconds; of several words, less.

    Args:
        counts: rows by label.
    """
    pairs: dict[tuple[str, str], int] = {}
    for names in _same_when_joined(counts):
        pairs |= dict.fromkeys(combinations(names, 2), 0)
    for place, group in _same_but_for_a_word(counts):
        for one, other in combinations(group, 2):
            if edits := _edits(_words(one)[place], _words(other)[place]):
                pairs.setdefault((one, other), edits)
    return [_near(pair, edits, counts) for pair, edits in sorted(pairs.items())]


def _near(pair: tuple[str, str], edits: int, counts: Mapping[str, int]) -> NearNames:
    rare, common = sorted(pair, key=lambda label: counts[label])
    return NearNames(rare, common, counts[rare], counts[common], edits)


def _words(label: str) -> list[str]:
    """The words of a name, without case and accents."""
    letters = ACCENTS.sub("", unicodedata.normalize("NFKD", label.casefold()))
    return [word for word in SEPARATORS.split(unicodedata.normalize("NFC", letters)) if word]


def _same_when_joined(labels: Iterable[str]) -> Iterator[list[str]]:
    """Labels whose words are the same, however they are separated. Where there are digits, separators tell 1.12 from 11.2."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for label in sorted(labels):
        words = _words(label)
        groups[("\0" if DIGIT.search(label) else "").join(words)].append(label)
    yield from (group for name, group in groups.items() if name and len(group) > 1)


def _same_but_for_a_word(labels: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The place of a word, and labels that are the same except for it and begin it with the same letter."""
    groups: defaultdict[tuple[int, str, tuple[str, ...]], list[str]] = defaultdict(list)
    for label in sorted(labels):
        words = _words(label)
        for place, word in enumerate(words):
            if len(word) >= SHORT_WORD and not DIGIT.search(word):
                groups[place, word[0], (*words[:place], *words[place + 1 :])].append(label)
    yield from ((place, group) for (place, _, _), group in groups.items() if len(group) > 1)


def _edits(one: str, other: str) -> int:
    """The edits between two words, or 0 if they are the same or too many apart to be a typo."""
    most = 2 if min(len(one), len(other)) >= LONG_WORD else 1
    if abs(len(one) - len(other)) > most:
        return 0
    edits = _distance(one, other)
    return edits if edits <= most else 0


def _distance(one: str, other: str) -> int:
    """Edits between two words, where a swap of neighbours is one (optimal string alignment)."""
    before: list[int] = []
    last = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, target in enumerate(other, 1):
            edits = min(last[j] + 1, row[-1] + 1, last[j - 1] + (letter != target))
            if i > 1 and j > 1 and (letter, target) == (other[j - 2], one[i - 2]):
                edits = min(edits, before[j - 2] + 1)
            row.append(edits)
        before, last = last, row
    return last[-1]


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _quoted(label: str) -> str:
    return repr(short(label, SHOWN // 4))
