"""A record as a rated answer: a conversation of any format, and a column `label` that says whether its last turn is good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qkit.core.errors import listed, nearest, short
from qkit.plugins.checks import Check, Kind, SetRow
from qkit.plugins.example import Conversation, Example, RatedConversation, Reads, RowError
from qkit.recipe.schema import Data, Recipe
from qkit.tasks._conversation import formats
from qkit.tasks._conversation.checks.kinds import CONVERSATION_CHECKS
from qkit.tasks._conversation.encode import Result, tokenize
from qkit.tasks._conversation.encoder import COLUMNS, open_encoder
from qkit.tasks._conversation.known_names import known_names as names_of_conversations
from qkit.tasks._conversation.rows import EncodedRow
from qkit.tasks._conversation.turns import shown
from qkit.tasks._preference.encoder import OfConversations

LABEL, DESIRABLE = "label", "desirable"
RATED_COLUMNS: Mapping[str, str] = {**COLUMNS, DESIRABLE: "int32"}
RATED_CHECKS: Mapping[str, Kind] = CONVERSATION_CHECKS
KINDS = ("undesirable", DESIRABLE)  # by label, the names of a row
TRUTH = {"true": True, "1": True, "false": False, "0": False}
FEW = 0.1  # share of the rarer kind, below which its losses deserve a weight


def rated(record: Mapping[str, Any], data_format: str, section: Data, reads: Reads) -> RatedConversation:
    """The conversation of a record, and whether its answer is good.

    Raises:
        RowError: it has no label, or no conversation that can be used.
    """
    column = section.columns.get(LABEL, LABEL)
    if column not in record or record[column] is None:
        raise RowError(
            f"has no {short(repr(column))} that says whether its answer is good (true) or bad (false); it has the columns {listed(record)}: "
            "map yours with data.columns, such as {label: liked}"
        )
    desirable = TRUTH.get(str(record[column]).strip().lower().removesuffix(".0"))
    if desirable is None:
        raise RowError(f"{column} is {shown(record[column])}, where it must be true or false")
    rest, given = _without_label(record, column, section)
    example: Example = formats.example(rest, data_format, given, None, reads)
    if not isinstance(example, Conversation):
        raise RowError("has no prompt and answer that could be rated: text and tokens have none")
    return RatedConversation(replace(example, trained=()), desirable, example.unread, example.ignored)


def _without_label(record: Mapping[str, Any], column: str, section: Data) -> tuple[dict[str, Any], Data]:
    columns = {ours: theirs for ours, theirs in section.columns.items() if ours != LABEL}
    stratify = None if section.stratify == LABEL else section.stratify
    given = section.model_copy(update={"columns": columns, "stratify": stratify})
    return {name: value for name, value in record.items() if name != column}, given


def format_of(record: Mapping[str, Any], section: Data) -> str | None:
    """The format of the conversation in a record; None if it has none."""
    try:
        return formats.recognised(*_without_label(record, section.columns.get(LABEL, LABEL), section))
    except RowError:
        return None


def unknown_column(section: Data, reads: Reads) -> str:
    """The error for a name in data.columns that nothing reads, or ""."""
    known = {*formats.KNOWN, *reads.variables, LABEL, *filter(None, (section.group, section.stratify))}
    for ours in section.columns:
        if ours not in known:
            return (
                f"data.columns maps {short(repr(ours))}, which is neither label nor a column of a format nor a variable of the chat "
                f"template{nearest(ours, sorted(known))}"
            )
    return ""


def known_names(name: str, data_format: str, reads: Reads) -> Iterator[str]:
    """The names that are read at the place of `name` in a record."""
    yield from names_of_conversations(name, data_format, reads)
    if "." not in name:
        yield LABEL


@dataclass(frozen=True)
class RatedEncoder(OfConversations):
    """The encoder of conversations; a row keeps its rating."""

    def encode(self, examples: Sequence[Example | RowError]) -> list[Result]:
        """The row of each conversation, or the error that drops it; all texts are tokenized in one call."""
        said = [one.conversation if isinstance(one, RatedConversation) else one for one in examples]
        results = tokenize(self.each.renderer, said, self.recipe.data)
        return [_named(example, result) for example, result in zip(examples, results, strict=True)]

    def examine(self, row: EncodedRow, thoroughly: bool) -> Iterator[tuple[str, str]]:
        """Everything found in a row: (check, message)."""
        return self.each.examine(row, thoroughly)

    def columns(self, row: EncodedRow, example: RatedConversation) -> dict[str, Any]:
        """The values of a prepared row, by RATED_COLUMNS."""
        return {**self.each.columns(row, example.conversation), DESIRABLE: int(example.desirable)}


def open_rated_encoder(recipe: Recipe) -> RatedEncoder:
    """Load the tokenizer and the chat template of a recipe's model, and probe them."""
    return RatedEncoder(recipe, open_encoder(recipe))


def _named(example: Example | RowError, result: Result) -> Result:
    if not isinstance(example, RatedConversation):
        return result
    return replace(result, rows=[replace(row, names=(KINDS[example.desirable],)) for row in result.rows])


def set_checks(rows: Sequence[SetRow]) -> Iterator[Check]:
    """Whether there are good and bad answers to learn from, and to measure with."""
    for split, name in (("train", "ratings"), ("test", "held_out_ratings")):
        kinds = [row.names[0] for row in rows if row.split == split and row.names]
        if kinds:
            yield _ratings(name, split, kinds)


def _ratings(name: str, split: str, kinds: Sequence[str]) -> Check:
    good = kinds.count(DESIRABLE)
    message = f"{good:,} of {len(kinds):,} answers of data.{split} are good ({good / len(kinds):.0%})"
    if good in (0, len(kinds)):
        return Check(name, "fail", f"{message}: both kinds are needed", remedy="add rows of the other kind")
    if split == "train" and not FEW <= good / len(kinds) <= 1 - FEW:
        remedy = "give the rarer kind a weight: feedback.desirable_weight or feedback.undesirable_weight"
        return Check(name, "warn", message, good, remedy=remedy)
    return Check(name, "pass", message, good)
