"""The checks over rows of texts with labels: what they find, how serious it is, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

from qkit.plugins.checks import COMMON, Kind

LABELLED_CHECKS: Mapping[str, Kind] = {
    "malformed": COMMON["malformed"],
    "unicode": COMMON["unicode"],
    "empty": COMMON["empty"],
    "duplicate": COMMON["duplicate"],
    "near_duplicate": COMMON["near_duplicate"],
    "rounded": COMMON["rounded"],
    "vocabulary": COMMON["vocabulary"],
    "unknown": Kind(
        "the tokenizer knows the words of every text",
        "consist mostly of words that the tokenizer does not know",
        "warn",
        "use a model for this language, or one whose tokenizer knows bytes",
    ),
    "length": Kind(
        "every text fits data.max_length",
        "are longer than data.max_length and dropped",
        "warn",
        "raise data.max_length, or set data.too_long=truncate",
    ),
    "text_cut": Kind(
        "no text is truncated",
        "lose the end of their text to data.max_length",
        "warn",
        "raise data.max_length, as far as the model has positions",
    ),
}
