"""The encoder of conversations: tokenizer and chat template, opened once per process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from qkit.chat.template import ASKED, OFFERED, Renderer, compact, date_formats, renderer, special_tokens, texts
from qkit.model import added_tokens
from qkit.model import tokenizer as model_tokenizer
from qkit.plugins.checks import Check
from qkit.plugins.example import Conversation, Example, Reads, RowError
from qkit.recipe.schema import Recipe
from qkit.tasks._conversation import encode
from qkit.tasks._conversation.checks import of_rows
from qkit.tasks._conversation.rows import EncodedRow

COLUMNS: Mapping[str, str] = {
    "input_ids": "list<int32>",
    "labels": "list<int32>",
    "start": "int32",
    **dict.fromkeys(("messages", "tools", "variables", "answer", "calls", "reference"), "string"),
}


@dataclass(frozen=True)
class ConversationEncoder:
    """`facts`: what probes show that template and tokenizer do; `renderer`: the template with its tokenizer."""

    recipe: Recipe
    renderer: Renderer
    facts: of_rows.Facts

    @property
    def reads(self) -> Reads:
        """What the chat template reads."""
        return self.renderer.reads

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        return self.renderer.tokenizer

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.facts.vocabulary

    def encode(self, examples: Sequence[Example | RowError]) -> list[encode.Result]:
        """The rows of each example, or the error that drops it; all texts are tokenized in one call."""
        return encode.tokenize(self.renderer, examples, self.recipe.data)

    def examine(self, row: EncodedRow, thoroughly: bool) -> Iterator[tuple[str, str]]:
        """Everything found in a row: (check, message). `thoroughly`: also decode the row."""
        return of_rows.examine(self.renderer, self.facts, row, self.recipe.data.loss, thoroughly)

    def columns(self, row: EncodedRow, example: Example) -> dict[str, Any]:
        """The values of a prepared row, by COLUMNS."""
        reference = example.reference if isinstance(example, Conversation) else None
        return {
            "input_ids": row.input_ids,
            "labels": row.labels,
            "start": row.start,
            "messages": compact(list(row.messages)),
            "tools": compact(list(row.tools)),
            "variables": compact(row.variables),
            "answer": row.answer,
            "calls": compact(list(row.reply.get("tool_calls", ()))),
            "reference": compact(row.reference if reference is None else reference),
        }

    def special_tokens(self) -> dict[str, Any]:
        """The content of tokens.json: ids of the tokens that stop an answer, end a turn and pad."""
        return special_tokens(self.renderer, self.recipe.model.pad_token, self.vocabulary)

    def description(self, tokens: Mapping[str, Any]) -> dict[str, str]:
        """The name of the chat template, and the tokens that end a turn and pad."""
        text_of = self.tokenizer.convert_ids_to_tokens
        name = self.recipe.model.chat_template or "the tokenizer's"
        return {"name": name, "end_of_turn": text_of(tokens["end_of_turn"]), "pad": text_of(tokens["pad"])}

    def ids_in_every_row(self, tokens: Mapping[str, Any]) -> set[int]:
        """Ids that every data set uses: begin of text, end of turn, padding, and what the template writes."""
        written = self.renderer.encode(added_tokens.markers(self.tokenizer))
        begins = self.tokenizer("a")["input_ids"]
        ends = {*tokens["stop"], tokens["pad"], tokens["end_of_turn"]}
        return {*ends, *begins, *(number for ids in written for number in ids)}

    def setup_checks(self, tokens: Mapping[str, Any]) -> Iterator[Check]:
        """The checks of template and tokenizer as a whole."""
        from qkit.tasks._conversation.checks import of_setup

        return of_setup.checks(self.tokenizer, tokens, self.date_in_every_row())

    def date_in_every_row(self) -> str | None:
        """Today's date as the chat template writes it, or None if it does not."""
        formats = [text_format for template in texts(self.tokenizer) for text_format in date_formats(template)]
        offers: list[Sequence[Any]] = [(), (OFFERED,)] if self.renderer.offering else [()]
        text = "\n".join(self.renderer.render((ASKED,), tools) for tools in offers) if formats else ""
        today = datetime.now()
        written = [today.strftime(text_format) for text_format in formats]
        return written[0] if any(date in text for date in written) else None


def open_encoder(recipe: Recipe) -> ConversationEncoder:
    """Load the tokenizer and the chat template of a recipe's model, and probe them."""
    tokenizer = model_tokenizer.tokenizer_of(recipe.model)
    opened = renderer(tokenizer)
    return ConversationEncoder(
        recipe, opened, of_rows.facts(opened, model_tokenizer.vocabulary(recipe.model, tokenizer))
    )
