"""Chat: answer the last user turn. A prediction is correct if it, or the part that a pattern extracts, equals the reference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qkit.plugins.task import NO_MORE, Example, Reads, said
from qkit.recipe.schema import Data, Evaluate
from qkit.tasks._conversation import formats

METRIC = "exact match"


def example(record: Mapping[str, Any], accepted: Any, format: str, section: Data, reads: Reads = NO_MORE) -> Example:
    """A record of any format. Predictions are compared with the accepted answers, if there are any."""
    return formats.example(record, format, section, accepted, reads)


def correct(prediction: str, reference: Any, section: Evaluate) -> bool:
    """Whether they are equal after extraction by the pattern, ignoring reasoning, white space and thousands separators."""
    wanted = reference if isinstance(reference, list) else [reference]
    return _picked(said(prediction), section) in {_picked(said(str(text)), section) for text in wanted}


def _picked(text: str, section: Evaluate) -> str:
    if section.answer_pattern and (matches := list(re.finditer(section.answer_pattern, text))):
        whole, *groups = matches[-1][0], *matches[-1].groups()
        text = groups[0] if groups and groups[0] is not None else whole
    return " ".join(text.replace(",", "").split())
