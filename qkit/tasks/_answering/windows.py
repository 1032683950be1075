"""Questions to token ids: question and context in one row, and a long context in several windows that overlap.

A row's labels are the tokens where its answer begins and ends; its first token for both where the window does not hold the whole answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qkit.core.errors import ModelError, short
from qkit.model import tokenizer as model_tokenizer
from qkit.model.source import companions
from qkit.plugins.example import Example, Question, RowError
from qkit.plugins.runtime import TextRow
from qkit.recipe.schema import Data, Recipe
from qkit.tasks._encoder import encoder
from qkit.tasks._encoder.encoder import Result, TextEncoder, TooLong

COLUMNS: Mapping[str, str] = {
    **encoder.COLUMNS,  # `names`: the accepted answers; `text`: the question; `pair`: its context
    "begins": "list<int32>",
    "ends": "list<int32>",
    "window": "int32",
    "id": "string",
}
STRIDE = 128  # tokens that two windows share
OUTSIDE = -1  # in `begins` and `ends`, of a token that is not of the context
ANSWERED, UNANSWERED = "answer", "no answer"  # what questions are counted by


@dataclass(frozen=True)
class ContextRow(TextRow):
    """A window as a runtime and the predictor read it. `begins`, `ends` [tokens]: which characters of `context` a token is."""

    begins: Sequence[int] = ()
    ends: Sequence[int] = ()
    context: str = ""
    window: int = 0


def context_row(record: Mapping[str, Any]) -> ContextRow:
    """A prepared row as a window."""
    ids, types, labels = record["input_ids"], record["token_type_ids"], tuple(record["labels"])
    return ContextRow(ids, types, labels, record["begins"], record["ends"], record["pair"], record["window"])


@dataclass(frozen=True)
class Window:
    """One row: a question with a part of its context. Sequences have a value for each token.

    `begins`, `ends`: the characters of the context that a token is, OUTSIDE for others. `labels`: the first and the last token of the answer.
    `number`: counts the windows of a question from 0.
    """

    input_ids: Sequence[int]
    token_type_ids: Sequence[int]
    begins: Sequence[int]
    ends: Sequence[int]
    number: int = 0
    labels: tuple[int, int] = (0, 0)
    names: tuple[str, ...] = ()
    whole: int = 0
    findings: tuple[tuple[str, str], ...] = ()

    @property
    def labelled(self) -> int:
        """Values that the loss compares: where the answer begins, and where it ends."""
        return 2

    @property
    def whole_tokens(self) -> int:
        """Its length before anything was cut: windows lose nothing. Of a question that is dropped, that with its whole context."""
        return self.whole or len(self.input_ids)

    def with_answer(self, text: str, start: int, last: bool) -> Window:
        """The window with the answer's tokens as labels, if it holds the whole of it. `last`: it ends with the context's last token."""
        inside = [place for place, begin in enumerate(self.begins) if begin != OUTSIDE]
        end = start + len(text)
        first = next((place for place in inside if self.ends[place] > start), None)
        final = next((place for place in reversed(inside) if self.begins[place] < end), None)
        if first is None or final is None or final < first:
            return self
        cut_before = self.number > 0 and self.begins[inside[0]] > start
        cut_after = not last and self.ends[inside[-1]] < end
        return self if cut_before or cut_after else replace(self, labels=(first, final))


def context_of(row: Window, context: str) -> ContextRow:
    """A window as a runtime and the predictor read it."""
    return ContextRow(row.input_ids, row.token_type_ids, row.labels, row.begins, row.ends, context, row.number)


def stride_of(section: Data) -> int:
    """Tokens that two windows share."""
    return section.stride if section.stride is not None else min(STRIDE, section.max_length // 4)


def windows(
    tokenizer: Any, questions: Sequence[str], contexts: Sequence[str], section: Data
) -> list[list[Window] | TooLong]:
    """The windows of each question: its tokens with those of a part of its context, at most data.max_length in all.

    A question that leaves no room for new tokens beside those that windows share has an error instead.
    """
    whole = _tokenized(tokenizer, questions, contexts)
    made: list[list[Window] | TooLong] = [[_window(whole, place, 0)] for place in range(len(questions))]
    long = [place for place, ids in enumerate(whole["input_ids"]) if len(ids) > section.max_length]
    for place in long:
        if error := _refused(whole, place, section):
            made[place] = error
    long = [place for place in long if isinstance(made[place], list)]
    if long:
        cut = _tokenized(
            tokenizer, [questions[i] for i in long], [contexts[i] for i in long], truncation="only_second",
            max_length=section.max_length, stride=stride_of(section), return_overflowing_tokens=True,
        )  # fmt: skip
        parts: list[list[Window]] = [[] for _ in long]
        for place, sample in enumerate(cut["overflow_to_sample_mapping"]):
            parts[sample].append(_window(cut, place, len(parts[sample])))
        for place, own in zip(long, parts, strict=True):
            made[place] = own
    return made


def _refused(whole: Any, place: int, section: Data) -> TooLong | None:
    """Why a question that is longer than data.max_length makes no windows."""
    tokens, limit, stride = len(whole["input_ids"][place]), section.max_length, stride_of(section)
    asked = replace(_window(whole, place, 0), whole=tokens)
    if section.too_long == "drop":
        return TooLong(f"has {tokens} tokens, more than data.max_length={limit}", asked)
    room = limit - (tokens - whole.sequence_ids(place).count(1))
    if room > stride:
        return None
    return TooLong(
        f"has a question that leaves {max(room, 0)} of data.max_length={limit} tokens for the context; windows share {stride} (data.stride)",
        asked,
    )


def _tokenized(tokenizer: Any, questions: Sequence[str], contexts: Sequence[str], **options: Any) -> Any:
    return tokenizer(list(questions), list(contexts), return_offsets_mapping=True, verbose=False, **options)


def _window(encoded: Any, place: int, number: int) -> Window:
    offsets, sides = encoded["offset_mapping"][place], encoded.sequence_ids(place)
    spans = [
        span if side == 1 and span[0] < span[1] else (OUTSIDE, OUTSIDE)
        for span, side in zip(offsets, sides, strict=True)
    ]
    types = encoded.get("token_type_ids")
    begins, ends = ([span[edge] for span in spans] for edge in (0, 1))
    return Window(encoded["input_ids"][place], types[place] if types else [], begins, ends, number)


@dataclass(frozen=True)
class QuestionEncoder(TextEncoder):
    """Questions to windows."""

    def encode(self, examples: Sequence[Example | RowError]) -> list[Result]:
        """The windows of each question, or the error that drops it; all are tokenized in one call."""
        asked = [example for example in examples if isinstance(example, Question)]
        texts = [example.question for example in asked], [example.context for example in asked]
        made = iter(windows(self.tokenizer, *texts, self.recipe.data) if asked else [])
        return [
            _result(e, next(made)) if isinstance(e, Question) else Result(error=encoder.as_error(e)) for e in examples
        ]

    def columns(self, row: Any, example: Example) -> dict[str, Any]:
        """The values of a prepared row, by COLUMNS."""
        assert isinstance(example, Question)
        return {
            "input_ids": row.input_ids,
            "token_type_ids": row.token_type_ids,
            "labels": row.labels,
            "names": list(dict.fromkeys(text for text, _ in example.answers)),
            "text": example.question,
            "pair": example.context,
            "begins": row.begins,
            "ends": row.ends,
            "window": row.number,
            "id": example.key,
        }


def _result(example: Question, made: list[Window] | TooLong) -> Result:
    """The windows with their labels: those of the first of several accepted answers."""
    if isinstance(made, TooLong):
        return Result(error=made)
    if not example.answers:
        return Result([replace(row, names=(UNANSWERED,)) for row in made])
    text, start = example.answers[0]
    rows = [replace(row, names=(ANSWERED,)).with_answer(text, start, row is made[-1]) for row in made]
    holding = next((place for place, row in enumerate(rows) if row.labels != (0, 0)), None)
    if holding is None:
        return Result(error=_in_no_window(text, rows))
    findings = tuple(_findings(example, rows[holding]))
    rows[holding] = replace(rows[holding], findings=findings)
    return Result(rows)


def _in_no_window(text: str, rows: Sequence[Window]) -> RowError:
    shown = short(repr(text))
    if len(rows) == 1:
        return RowError(f"has the answer {shown}, of which the tokenizer makes no token")
    return TooLong(
        f"has the answer {shown}, which no window holds whole: raise data.stride to more tokens than it has", rows[0]
    )


def _findings(example: Question, row: Window) -> Iterator[tuple[str, str]]:
    """What is odd about a question's answer, in the window that holds it."""
    text = example.answers[0][0]
    first, last = row.labels
    taken = example.context[row.begins[first] : row.ends[last]].strip()
    if taken != text:
        yield "answer_tokens", f"has the answer {short(repr(text))}, and its tokens are {short(repr(taken))}"
    if not example.placed:
        yield "answer_place", f"has the answer {short(repr(text))} several times in its context, and no answer_start"


def open_encoder(recipe: Recipe) -> QuestionEncoder:
    """Load the tokenizer of a recipe's model.

    Raises:
        ModelError: there is no tokenizer, no token to pad with, or the tokenizer does not say which characters a token is.
    """
    folder = companions(recipe.model)
    tokenizer = encoder.open_tokenizer(recipe)
    if not tokenizer.is_fast:
        raise ModelError(
            f"{folder}: its tokenizer has no tokenizer.json, so nobody knows which characters a token is; task={recipe.task} needs a fast "
            "tokenizer",
            source=folder,
        )
    pad = model_tokenizer.padding_token(tokenizer, recipe.model, folder)
    return QuestionEncoder(recipe, tokenizer, pad, model_tokenizer.vocabulary(recipe.model, tokenizer))


def encoded(tokenizer: Any, record: Mapping[str, Any], section: Data) -> Iterator[tuple[str, Sequence[int]]]:
    """The ids and token types of a prepared row, as another tokenizer makes them; none where it makes other windows."""
    made = windows(tokenizer, [record["text"]], [record["pair"]], section)[0]
    number = record["window"]
    row = None if isinstance(made, TooLong) or number >= len(made) else made[number]
    return ((name, getattr(row, name) if row else []) for name in ("input_ids", "token_type_ids"))
