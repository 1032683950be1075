"""ChatTask: answer the last user turn. A prediction is correct if it, or the part that a pattern extracts, equals the reference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qkit.plugins.example import NO_MORE, Example, Reads, without_thinking
from qkit.recipe.schema import Data, Evaluate
from qkit.tasks._conversation.task import ConversationTask


class ChatTask(ConversationTask):
    """Records of any format; predictions are compared with the accepted answers, if there are any."""

    METRIC = "exact match"

    def example(
        self, record: Mapping[str, Any], accepted: Any, data_format: str, section: Data, reads: Reads = NO_MORE
    ) -> Example:
        """A record of any format."""
        from qkit.tasks._conversation import formats

        return formats.example(record, data_format, section, accepted, reads)

    def correct(self, prediction: str, reference: Any, section: Evaluate) -> bool:
        """Whether they are equal after extraction by the pattern, ignoring reasoning, white space and thousands separators."""
        accepted = reference if isinstance(reference, list) else [reference]
        texts = {_extracted(without_thinking(str(text)), section) for text in accepted}
        return _extracted(without_thinking(prediction), section) in texts


def _extracted(text: str, section: Evaluate) -> str:
    if section.answer_pattern and (matches := list(re.finditer(section.answer_pattern, text))):
        whole, *groups = matches[-1][0], *matches[-1].groups()
        text = groups[0] if groups and groups[0] is not None else whole
    return " ".join(text.replace(",", "").split())


TASK = ChatTask()
