"""Exact and near-duplicates: digests of texts, and MinHash signatures (from rensa) for similar texts.

Case, white space and Unicode composition are ignored.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Any

PERMUTATIONS = 128  # the estimate of a Jaccard similarity then has a standard error of 0.035 at 0.8
BANDS = (
    16  # of 8 values each: pairs at 0.8 are found with a probability of 95 %, at 0.6 of 24 % (and are then sorted out)
)
CROWD = 256  # a row with more similar rows than this is not indexed: comparing would become quadratic, and one of them suffices
NEAR = 0.8  # Jaccard similarity of word triples from which two rows count as nearly the same
WORD = re.compile(r"\w{1,8}")  # long runs are cut, since some scripts write no spaces
SEED = 42


def normalized(text: str) -> str:
    """Text without its case, white space and composition."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest(text: str) -> str:
    """sha256 of a text, in hexadecimal; what UTF-8 cannot hold is escaped."""
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def signature(text: str) -> Any:
    """rensa's MinHash of a text's word triples."""
    import rensa

    minhash = rensa.RMinHash(num_perm=PERMUTATIONS, seed=SEED)
    minhash.update(shingles(text))
    return minhash


def shingles(text: str) -> list[str]:
    """Word triples; a shorter text is one shingle."""
    words = WORD.findall(normalized(text))
    return [" ".join(words[i : i + 3]) for i in range(max(len(words) - 2, 1))]


class Index:
    """An index of signatures, each with a number."""

    def __init__(self) -> None:
        import rensa

        self._lsh = rensa.RMinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS, num_bands=BANDS)
        self._signatures: dict[int, Any] = {}

    def nearest(self, signature: Any) -> int | None:
        """The number of the most similar signature, if it counts as a near-duplicate."""
        similar = [(self._signatures[number].jaccard(signature), -number) for number in self._lsh.query(signature)]
        similarity, number = max(similar, default=(0.0, 0))
        return -number if similarity >= NEAR else None

    def add(self, number: int, signature: Any) -> int | None:
        """Add a signature, unless a near-duplicate is present: then return the number of that one."""
        alike = self._lsh.query(signature)
        if (similar := self.nearest(signature)) is not None:
            return similar
        if len(alike) <= CROWD:
            self.insert(number, signature)
        return None

    def insert(self, number: int, signature: Any) -> None:
        """Add a signature unconditionally."""
        self._lsh.insert(number, signature)
        self._signatures[number] = signature
