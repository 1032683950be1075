"""Chat templates: which one a model uses, how it renders a conversation, and which token ends a turn."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.chat import conversation
from qkit.core.errors import ModelError, short
from qkit.core.sources import is_there
from qkit.plugins.example import THINKING, Reads
from qkit.recipe.chat_templates import FOLDER, named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Messages = Sequence[Mapping[str, Any]]
NO_VARIABLES: Mapping[str, Any] = {}
ASKED = {"role": "user", "content": "a"}
ANSWERED = {"role": "assistant", "content": "b"}
# Of several templates the one for all conversations, and the one for those that offer tools; and where they are in a model's folder: NAME.jinja
# is the template NAME to transformers and vLLM.
DEFAULT, WITH_TOOLS, OTHERS = "default", "tool_use", "additional_chat_templates"
OFFERED = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


def use_template_of_recipe(tokenizer: PreTrainedTokenizerBase, wanted: str | None, folder: Path) -> None:
    """Set the tokenizer's template to the one that the recipe names (a file or a built-in one), or check that it has one.

    Raises:
        ModelError: there is no template, or not the named one.
    """
    if wanted is not None:
        tokenizer.chat_template = _text(wanted)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{folder}: this model has no chat template, so the format of its turns is unknown; use its instruct version, "
            "or set model.chat_template=chatml (others: "
            f"{', '.join(named())}; or a file such as chat_template.jinja)"
        )
    if isinstance(tokenizer.chat_template, dict) and DEFAULT not in tokenizer.chat_template:
        raise ModelError(
            f"{folder}: none of its chat templates ({', '.join(sorted(tokenizer.chat_template))}) is called {DEFAULT}, so a server cannot "
            f"choose one; copy one to chat_template.jinja there, or set model.chat_template to a file"
        )


def texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The templates that a conversation may meet: one, or the one for all and the one for those that offer tools."""
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        return [str(templates)]
    return [templates[name] for name in (DEFAULT, WITH_TOOLS) if name in templates]


def _text(wanted: str) -> str:
    if wanted in named():
        return (FOLDER / f"{wanted}.jinja").read_text(encoding="utf-8")
    file = Path(wanted).expanduser()
    if not (is_there(file) and file.is_file()):
        raise ModelError(f"model.chat_template={short(wanted)}: must be a file or one of {', '.join(named())}")
    return file.read_text(encoding="utf-8")


# --- what a template reads --------------------------------------------------------------------------------------------


def reads(tokenizer: PreTrainedTokenizerBase) -> Reads:
    """What a tokenizer's template, or any of its named ones, reads of a record and of a turn."""
    templates = tokenizer.chat_template
    all_texts = tuple(templates.values()) if isinstance(templates, dict) else (templates or "",)
    given = {"messages", "tools", "add_generation_prompt", "continue_final_message", *tokenizer.special_tokens_map}
    of_each = [_reads(text) for text in all_texts]
    variables = frozenset[str]().union(*(one.variables for one in of_each)) - given
    values = frozenset[str]().union(*(one.variables - one.switches for one in of_each))
    return Reads(variables, frozenset[str]().union(*(one.keys for one in of_each)), variables - values)


@functools.lru_cache(maxsize=32)
def _reads(template: str) -> Reads:
    """Variables that are looked up before the template sets them itself, and the names that it takes from objects."""
    from jinja2 import TemplateError, ext, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols])
    environment.globals.update(raise_exception=None, strftime_now=None)  # transformers gives these two
    try:
        parsed = environment.parse(GENERATION.sub("", template))
        free = meta.find_undeclared_variables(parsed)
    except TemplateError:  # what is wrong with it is said when it is first rendered
        return Reads()
    first: dict[str, bool] = {}
    for name, loaded in _names(parsed):
        first.setdefault(name, loaded)
    variables = frozenset(name for name in free if first.get(name, True))
    return Reads(variables, frozenset(_keys(parsed)), variables - frozenset(_values(parsed)))


ASKS = ("defined", "undefined", "none", "true", "false", "boolean")  # tests that a switch is put to


def _values(node: Any, truth: bool = False) -> Iterator[str]:
    """Variables of which more is taken than whether they are true. `truth`: of this expression no more is asked."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name) and node.ctx == "load" and not truth:
        yield node.name
    for child in node.iter_child_nodes():
        yield from _values(child, _asks(node, child, truth))


def _asks(node: Any, child: Any, truth: bool) -> bool:
    """Whether a node asks of its child only whether it is true."""
    from jinja2 import nodes

    if isinstance(node, nodes.If | nodes.CondExpr) and child is node.test:
        return True
    if isinstance(node, nodes.Test):
        return node.name in ASKS
    if isinstance(node, nodes.Compare):
        sides = (node.expr, *(each.expr for each in node.ops))
        return any(isinstance(side, nodes.Const) and isinstance(side.value, bool) for side in sides)
    if isinstance(node, nodes.Assign):  # {% set x = x if x is defined else true %}
        return isinstance(node.target, nodes.Name) and any(name == node.target.name for name, _ in _names(node.node))
    passes = isinstance(node, nodes.And | nodes.Or | nodes.CondExpr) or (
        isinstance(node, nodes.Filter) and node.name in ("default", "d")
    )
    return isinstance(node, nodes.Not) or (passes and truth)


GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # transformers' own tag


def _names(node: Any) -> Iterator[tuple[str, bool]]:
    """Every variable in the order in which it is looked up (True) or set (False)."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name):
        yield node.name, node.ctx == "load"
    if isinstance(node, nodes.Assign):  # its target stands first, and is set last
        yield from _names(node.node)
        yield from _names(node.target)
        return
    for child in node.iter_child_nodes():
        yield from _names(child)


def _keys(parsed: Any) -> Iterator[str]:
    """What is taken from a turn by name: turn.key, turn['key'], turn.get('key'), 'key' in turn."""
    from jinja2 import nodes

    turns = _turns(parsed)
    for node in parsed.find_all((nodes.Getattr, nodes.Getitem, nodes.Call, nodes.Compare)):
        if isinstance(node, nodes.Getattr) and _is_turn(node.node, turns):
            yield from {node.attr} - {"get", "items", "keys"}
        elif isinstance(node, nodes.Getitem) and _is_turn(node.node, turns):
            yield from _literal(node.arg)
        elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "get":
            yield from (_literal(node.args[0]) if node.args and _is_turn(node.node.node, turns) else ())
        elif isinstance(node, nodes.Compare) and any(
            each.op in ("in", "notin") and _is_turn(each.expr, turns) for each in node.ops
        ):
            yield from _literal(node.expr)


def _turns(parsed: Any) -> set[str]:
    """Variables that stand for turns, or for lists of them: those made of `messages`, and what macros call them."""
    from jinja2 import nodes

    names = {"messages", "message", "msg", "m", "turn"}
    for node in parsed.find_all((nodes.Assign, nodes.For)):
        source = node.node if isinstance(node, nodes.Assign) else node.iter
        if _is_turn(source, names) and isinstance(node.target, nodes.Name):
            names.add(node.target.name)
    return names


def _is_turn(node: Any, turns: set[str]) -> bool:
    from jinja2 import nodes

    while isinstance(node, nodes.Getitem | nodes.Filter) and not list(_literal(getattr(node, "arg", None))):
        node = node.node
    return isinstance(node, nodes.Name) and node.name in turns


def _literal(node: Any) -> Iterator[str]:
    """The text that a node is."""
    value = getattr(node, "value", None)
    if isinstance(value, str):
        yield value


def _thinking(template: str) -> Sequence[str]:
    """The names under which the thinking of a turn is given to a template: a server's two, or the one that it reads where that is another."""
    read = [name for name in THINKING if name in _reads(template).keys]
    return read if read and not set(read) & set(conversation.REASONING) else conversation.REASONING


class TemplateRefusal(ValueError):
    """The template rejects this conversation; the message is the template's."""


@dataclass(frozen=True)
class Renderer:
    """A tokenizer and what probing shows about its template.

    `suffix` is what the template writes after an answer, `ending` the part of it through the token that ends the turn, `end` that token's id
    (None: no special token ends a turn). `marks` finds special tokens in a text. `offering`: the same of another template that conversations
    with tools meet.
    """

    tokenizer: PreTrainedTokenizerBase
    special: frozenset[int]
    suffix: str
    ending: str
    end: int | None
    marks: re.Pattern[str]
    offering: Renderer | None = None

    def meeting(self, tools: Sequence[Any]) -> Renderer:
        """The one for a conversation that offers these tools."""
        return self.offering if tools and self.offering else self

    def render(
        self,
        messages: Messages,
        tools: Sequence[Any] = (),
        answered: bool = False,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> str:
        """Messages as the template writes them with these variables, followed by the generation prompt unless `answered`.

        Raises:
            TemplateRefusal: the template raises an error on them.
        """
        return render(self.tokenizer, messages, tools, answered, variables)

    @property
    def reads(self) -> Reads:
        """What the template reads of a conversation in addition to what every template reads."""
        return reads(self.tokenizer)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts, without added special tokens."""
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
    """Try the template, or each of those that a conversation may meet, on one short conversation, and note how it ends a turn.

    Raises:
        ModelError: it refuses even that.
    """
    plain = _renderer(tokenizer, ())
    return replace(plain, offering=_renderer(tokenizer, (OFFERED,))) if len(texts(tokenizer)) > 1 else plain


def _renderer(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any]) -> Renderer:
    talks = [(ASKED, {**ANSWERED, "content": word}) for word in ("b", "c")]
    try:
        left, right = (render(tokenizer, talk, tools, answered=True) for talk in talks)
    except TemplateRefusal as error:
        raise ModelError(f"the chat template rejects a simple question with its answer: {error}") from None
    suffix = _common_suffix(left, right)
    special = special_ids(tokenizer)
    marks = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
    match = marks.search(suffix)
    ending = suffix[: match.end()] if match else suffix
    end = int(tokenizer.convert_tokens_to_ids(match.group())) if match else None
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
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: Sequence[Any] | None = (),
    answered: bool = False,
    variables: Mapping[str, Any] = NO_VARIABLES,
) -> str:
    """Messages as the tokenizer's template writes them once a server has handed them on; of several templates the one that it would choose.

    `variables`: what the template reads beside them, such as enable_thinking.

    Raises:
        TemplateRefusal: the template raises an error on them.
    """
    offered = conversation.tools_sent(tools) or None
    try:
        chosen = tokenizer.get_chat_template(tools=offered)
        turns = conversation.served(messages, chosen, _thinking(chosen), answered)
        options = {"add_generation_prompt": not answered, **variables}
        return str(tokenizer.apply_chat_template(turns, tools=offered, chat_template=chosen, tokenize=False, **options))
    except Exception as error:  # a template is a program: on what it was not written for it may raise anything
        raise TemplateRefusal(f"{type(error).__name__}: {str(error)[:300]}") from error


def special_tokens(renderer: Renderer, pad_token: str | None, rows: int) -> dict[str, Any]:
    """`stop` (ids that end a turn), `pad`, and `end_of_turn`. `rows`: of the model's embedding.

    The padding is a token that the embedding has and that ends no turn, where there is one: other tools mask the end of an answer together
    with the padding.

    Raises:
        ModelError: model.pad_token names no token, or one that the embedding lacks; or no special token ends a turn.
    """
    tokenizer = renderer.tokenizer
    end = tokenizer.eos_token_id if renderer.end is None else renderer.end
    if end is None:
        raise ModelError(
            "no special token ends a turn and the tokenizer has no eos_token, so the model could not learn to stop"
        )
    stop = sorted({end, renderer.meeting((OFFERED,)).end, tokenizer.eos_token_id} - {None})
    if pad_token is not None:
        return {"stop": stop, "pad": known_id(tokenizer, pad_token, rows), "end_of_turn": end}
    ids = [
        tokenizer.convert_tokens_to_ids(token)
        for token in (tokenizer.pad_token, tokenizer.unk_token, *special_ids(tokenizer))
        if token
    ]
    usable = [token for token in ids if token is not None and token < rows and token not in stop]
    return {"stop": stop, "pad": (usable or [end])[0], "end_of_turn": end}


def known_id(tokenizer: PreTrainedTokenizerBase, token: str, rows: int) -> int:
    """The id of model.pad_token. `rows`: of the model's embedding.

    Raises:
        ModelError: the tokenizer has no such token, or the embedding lacks it.
    """
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None:
        raise ModelError(f"model.pad_token={short(token)}: the tokenizer has no such token")
    if token_id >= rows:
        raise ModelError(
            f"model.pad_token={short(token)}: its id is {token_id}, but the model's ids are 0 to {rows - 1}; remove model.pad_token, or add a "
            f"row with model.add_tokens={json.dumps([token])}"
        )
    return int(token_id)


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
        f"{conversation.text_of(m.get('content'))}{compact(m['tool_calls']) if m.get('tool_calls') else ''}"
        for m in messages
    )
