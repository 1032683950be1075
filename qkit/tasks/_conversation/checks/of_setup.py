"""Checks of the chat template and the tokenizer as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qkit.plugins.checks import Check


def checks(tokenizer: Any, tokens: Mapping[str, Any], date: str | None) -> Iterator[Check]:
    """Whether the padding token ends turns, and whether the template writes today's date, `date`."""
    yield _padding(tokenizer, tokens)
    yield _date(date)


def _padding(tokenizer: Any, tokens: Mapping[str, Any]) -> Check:
    name = tokenizer.convert_ids_to_tokens(tokens["pad"])
    if tokens["pad"] not in tokens["stop"]:
        return Check("padding", "pass", f"{name} is the padding token and does not end turns")
    message = (
        f"{name} is the padding token and also ends turns: qkit derives labels from lengths, so the end of a turn still carries loss; tools "
        "that mask every padding token would mask it"
    )
    return Check(
        "padding", "warn", message, remedy="set model.pad_token to a special token that the template does not use"
    )


def _date(date: str | None) -> Check:
    if date is None:
        return Check("date", "pass", "the chat template does not write a date")
    message = f"the chat template writes today's date ({date}): from tomorrow on, a server sends prompts that differ from training"
    return Check(
        "date",
        "warn",
        message,
        remedy="set model.chat_template to a copy of the template without the date, or with a fixed one",
    )
