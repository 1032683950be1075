"""Chat templates: which one a model has, how a conversation reads in it, and what ends a turn."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
FOLDER = Path(__file__).parent / "templates"
ASKED = {"role": "user", "content": "a"}
ANSWERED = {"role": "assistant", "content": "b"}


def named() -> list[str]:
    """The templates that ship with qkit."""
    return sorted(file.stem for file in FOLDER.glob("*.jinja"))


def choose(tokenizer: PreTrainedTokenizerBase, wanted: str | None, folder: Path) -> None:
    """Give the tokenizer the template that the recipe names (a file or one of ours), or see that it has its own.

    Raises:
        ModelError: there is none, or no such one.
    """
    if wanted is not None:
        tokenizer.chat_template = _text(wanted)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{folder}: this model has no chat template, so nobody can say how its turns are written; take its instruct version, "
            "or set model.chat_template=chatml (others: "
            f"{', '.join(named())}; or a file such as chat_template.jinja)"
        )


def _text(wanted: str) -> str:
    if wanted in named():
        return (FOLDER / f"{wanted}.jinja").read_text(encoding="utf-8")
    file = Path(wanted).expanduser()
    if not file.is_file():
        raise ModelError(f"model.chat_template={wanted}: neither a file nor one of {', '.join(named())}")
    return file.read_text(encoding="utf-8")


class TemplateRefusal(ValueError):
    """The template does not take this conversation; the message is its own."""


@dataclass(frozen=True)
class Renderer:
    """A tokenizer with what its template was seen to do.

    `suffix` is what the template writes after an answer, `ending` the part of it through the token that ends the turn, `end` that token's id
    (None: no special token ends a turn). `marks` finds special tokens in a text.
    """

    tokenizer: PreTrainedTokenizerBase
    special: frozenset[int]
    suffix: str
    ending: str
    end: int | None
    marks: re.Pattern[str]

    def render(self, messages: Messages, tools: Sequence[Any] = (), answered: bool = False) -> str:
        """Messages as the template writes them, ready for the assistant to go on unless `answered`.

        Raises:
            TemplateRefusal: the template raises an error on them.
        """
        return render(self.tokenizer, messages, tools, answered)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts; nothing is added."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids

    def through_end(self, answered: str) -> str:
        """An answered conversation up to the token that ends its last turn."""
        return answered.removesuffix(self.suffix) + self.ending if answered.endswith(self.suffix) else answered


def renderer(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """Try the template on one short conversation, and note how it ends a turn.

    Raises:
        ModelError: it refuses even that.
    """
    try:
        texts = [render(tokenizer, (ASKED, {**ANSWERED, "content": word}), answered=True) for word in ("b", "c")]
    except TemplateRefusal as error:
        raise ModelError(f"the chat template refuses a question and its answer: {error}") from None
    suffix = _common_suffix(*texts)
    special = special_ids(tokenizer)
    marks = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
    found = marks.search(suffix)
    ending = suffix[: found.end()] if found else suffix
    end = int(tokenizer.convert_tokens_to_ids(found.group())) if found else None
    return Renderer(tokenizer, frozenset(special.values()), suffix, ending, end, marks)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Special tokens and their ids: first those with a role (eos_token, pad_token ...), then those that tokenizer.json only marks as
    special, as Gemma's <end_of_turn> and Phi's <|end|> are."""
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    marked = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(named) | marked


def _common_suffix(left: str, right: str) -> str:
    count = next((i for i, (a, b) in enumerate(zip(reversed(left), reversed(right), strict=False)) if a != b), 0)
    return left[len(left) - count :]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Sequence[Any] = (), answered: bool = False
) -> str:
    """Messages as the tokenizer's template writes them.

    Raises:
        TemplateRefusal: the template raises an error on them.
    """
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=not answered
            )
        )
    except (TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        # a template is a program; on a conversation that it was not written for it may raise anything of these
        raise TemplateRefusal(f"{type(error).__name__}: {str(error)[:300]}") from error


def special_tokens(reader: Renderer, pad_token: str | None) -> dict[str, Any]:
    """`stop` (ids that end a turn), `pad`, and `end_of_turn`.

    The padding is a token that ends no turn, where there is one: other tools mask the end of an answer together with the padding.

    Raises:
        ModelError: model.pad_token names no token; or no special token ends a turn.
    """
    tokenizer = reader.tokenizer
    end = tokenizer.eos_token_id if reader.end is None else reader.end
    if end is None:
        raise ModelError(
            "no special token ends a turn and the tokenizer has no eos_token: the model could not learn to stop"
        )
    stop = sorted({end, tokenizer.eos_token_id} - {None})
    if pad_token is not None:
        return {"stop": stop, "pad": _known_id(tokenizer, pad_token), "end_of_turn": end}
    ids = [
        tokenizer.convert_tokens_to_ids(token)
        for token in (tokenizer.pad_token, tokenizer.unk_token, *special_ids(tokenizer))
        if token
    ]
    usable = [token for token in ids if token is not None and token not in stop]
    return {"stop": stop, "pad": (usable or [end])[0], "end_of_turn": end}


def _known_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise ModelError(f"model.pad_token={token}: the tokenizer has no such token")
    return int(found)


@functools.cache
def date_formats(template: str) -> tuple[str, ...]:
    """The strftime formats with which a template asks for today's date."""
    return tuple(re.findall(r"strftime_now\(\s*['\"](.*?)['\"]", template))


def compact(value: Any) -> str:
    """Messages or tools as JSON text."""
    return json.dumps(value, ensure_ascii=False)


def texts_of(messages: Iterable[Mapping[str, Any]]) -> str:
    """What is said in messages, tool calls included, one after the other."""
    return "\n".join(
        f"{m.get('content') or ''}{compact(m['tool_calls']) if m.get('tool_calls') else ''}" for m in messages
    )
