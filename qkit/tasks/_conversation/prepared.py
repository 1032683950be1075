"""The conversations of prepared rows, read back from their columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PreparedConversations:
    """By row: the prompts as token ids, and the turns that they were rendered from.

    `calls`: tool calls of each answer. `variables`: chat template variables.
    """

    rows: tuple[Sequence[int], ...]
    prompts: tuple[Sequence[int], ...]
    messages: tuple[list[dict[str, Any]], ...]
    tools: tuple[list[dict[str, Any]], ...]
    answers: tuple[str, ...]
    calls: tuple[list[dict[str, Any]], ...]
    variables: tuple[dict[str, Any], ...]


def conversations(records: Sequence[Mapping[str, Any]]) -> PreparedConversations:
    """Read the columns of prepared rows; those of earlier versions may lack `calls` and `variables`."""
    return PreparedConversations(
        rows=tuple(r["input_ids"] for r in records),
        prompts=tuple(r["input_ids"][: r["start"]] for r in records),
        messages=tuple(json.loads(r["messages"]) for r in records),
        tools=tuple(json.loads(r["tools"]) for r in records),
        answers=tuple(r["answer"] for r in records),
        calls=tuple(json.loads(r.get("calls") or "[]") for r in records),
        variables=tuple(json.loads(r.get("variables") or "{}") for r in records),
    )
