"""A conversation as a server hands it to a chat template: one rule for training, for evaluation and for our own server.

The rule is vLLM 0.32's, measured on it (vllm/renderers/chat_utils.py and hf.py; tests/chat/test_conversation.py asks the installed one again):

- text in parts is one text, a part to a line, without those that are empty; a template that goes through the parts of a turn gets the
  parts, of a turn of one text too. Results of tools are one text always.
- a call that was made before is {id, function: {arguments, name}, type}, in this order, its arguments an object.
- a function is {type, function: {name, description, parameters}}, in this order, null where it has none; of its other keys only `strict`
  and `defer_loading` are known.
- thinking is both `reasoning` and `reasoning_content`.
- a developer's turn is a system turn for a template that does not know developers, and all system turns are one then, the first.

An empty value counts as absent, however it is written (null, [], "" or no key).
"""

from __future__ import annotations

import functools
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import nodes


Turn = Mapping[str, Any]
Content = str | list[dict[str, str]]


TEXTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}  # by type: where a part has its text
FUNCTION = ("name", "description", "parameters")
OPTIONAL = ("strict", "defer_loading")
FUNCTION_KEYS = (*FUNCTION, *OPTIONAL)
REASONING = ("reasoning", "reasoning_content")  # what a server gives the thinking of a turn as
HARMONY = "<|channel|>"  # gpt-oss: a server writes its turns by itself, thinking included, and its template reads that by another name
THOUGHTS = (*REASONING, "thinking")  # the first that is there counts
OWN = frozenset({"role", "content", "tool_calls", "tool_call_id", *THOUGHTS})
NOTHING: tuple[Any, ...] = (None, "", [], {})


# --- what is said -----------------------------------------------------------------------------------------------------


class Parted(str):
    """What a turn says in several parts, as one text: a part to a line, without those that are empty."""

    parts: tuple[str, ...]

    def __new__(cls, parts: Iterable[str]) -> Parted:
        kept = tuple(parts)
        joined = super().__new__(cls, "\n".join(text for text in kept if text))
        joined.parts = kept
        return joined

    def __reduce__(self) -> tuple[type[Parted], tuple[tuple[str, ...]]]:
        return Parted, (self.parts,)


def content_of(value: Any, where: str, only: str) -> str:
    """The content of a turn as one text, which remembers its parts. `where`, `only`: for the message; what is read beside text, in words.

    Raises:
        ValueError: it is neither text nor a list of parts that are text.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError(f"content of {where} must be text or a list of parts: {reprlib.repr(value)}")
    read = [_text(part, f"part {number} of {where}", only) for number, part in enumerate(value, start=1)]
    texts = [text for text in read if text is not None]
    return "".join(texts) if len(texts) < 2 else Parted(texts)


def _text(part: Any, where: str, only: str) -> str | None:
    if not isinstance(part, Mapping):
        raise ValueError(f"{where} is not an object: {reprlib.repr(part)}")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in TEXTS:
        raise ValueError(f"{where} is of type {reprlib.repr(kind)}; {only}")
    text = part.get(TEXTS[kind])
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where} is not text: {reprlib.repr(text)}")
    return text


def texts_in(content: Content | None) -> Sequence[str]:
    """The texts of a content, a part each."""
    if isinstance(content, Parted):
        return content.parts
    return [part["text"] for part in content] if isinstance(content, list) else [content or ""]


def text_of(content: Content | None) -> str:
    """A content as one text."""
    return "\n".join(text for text in texts_in(content) if text)


def _in_parts(content: Content | None) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts_in(content)]


# --- turns and tools --------------------------------------------------------------------------------------------------


def served(
    messages: Sequence[Turn], template: str, thinking: Sequence[str] = REASONING, answered: bool = False
) -> list[dict[str, Any]]:
    """Turns as a server passes them to this template.

    `answered`: the last turn is the answer, not sent: its calls stay unchanged, and its reasoning gets the names `thinking`.
    """
    in_parts = goes_through_parts(template)
    last = len(messages) - 1 if answered else len(messages)
    sent_as = thinking if HARMONY in template else REASONING
    turns = [
        _turn(turn, in_parts, thinking if number == last else sent_as, number == last)
        for number, turn in enumerate(messages)
    ]
    knows = '"developer"' in template or "'developer'" in template
    return turns if knows or all(turn["role"] != "developer" for turn in turns) else _with_one_system(turns)


def sent(turn: Turn) -> dict[str, Any]:
    """A turn in the form that it has once it was sent to a server, whatever the template; its content as it is."""
    message = _turn(turn, in_parts=False, thinking=REASONING, answered=False)
    content = turn.get("content")
    return {**message, "content": _in_parts(content) if isinstance(content, Parted) else content or ""}


def _turn(turn: Turn, in_parts: bool, thinking: Sequence[str], answered: bool) -> dict[str, Any]:
    role, content = turn["role"], turn.get("content")
    message: dict[str, Any] = {"role": role, "content": _content(content, in_parts, role)}
    if role == "assistant":
        if calls := turn.get("tool_calls"):
            if in_parts and not text_of(content):
                message[
                    "content"
                ] = []  # clients send null beside calls; some send "", of which vLLM makes a part with nothing in it
            message["tool_calls"] = list(calls) if answered else [call_of(call) for call in calls]
        if thought := next((turn[name] for name in THOUGHTS if turn.get(name)), None):
            message |= dict.fromkeys(thinking, thought)
    elif role == "tool" and turn.get("tool_call_id"):
        message["tool_call_id"] = turn["tool_call_id"]
    return message | {key: value for key, value in turn.items() if key not in OWN and value not in NOTHING}


def _content(content: Content | None, in_parts: bool, role: str) -> Content:
    if not in_parts:
        return text_of(content)
    return "\n".join(texts_in(content)) if role == "tool" else _in_parts(content)


def call_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with the key order in which a server passes it on.

    Raises:
        ValueError: it has no function with a name, or its arguments are not an object.
    """
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool call must have a function with a name: {str(call)[:100]}")
    known = {"arguments": arguments_of(function.get("arguments")), "name": function["name"]}
    identity = {"id": call["id"]} if call.get("id") else {}
    ordered = {**identity, "function": known | _others(function, known), "type": "function"}
    return ordered | _others(call, {**ordered, "id": None})


def _others(given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key not in known}


def arguments_of(value: Any) -> Mapping[str, Any]:
    """The arguments of a call: an object, or the JSON text of one.

    Raises:
        ValueError: they are neither.
    """
    read = json.loads(value) if isinstance(value, str) and value.strip() else value
    if not read and not isinstance(read, list | int | float):
        return {}
    if not isinstance(read, Mapping):
        raise ValueError(f"the arguments of a tool call must be a JSON object: {str(value)[:100]}")
    return read


def _with_one_system(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Developers' turns as system turns, and these as one before all others where they are not that already."""
    turns = [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in turns]
    places = [number for number, turn in enumerate(turns) if turn["role"] == "system"]
    if places == [0]:
        return turns
    texts = ["\n".join(texts_in(turns[number]["content"])) for number in places]
    others = [turn for turn in turns if turn["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(text for text in texts if text)}, *others]


def tools_sent(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Functions as a server hands them to a template."""
    return [{"type": "function", "function": _function(tool.get("function") or tool)} for tool in tools or ()]


def _function(given: Mapping[str, Any]) -> dict[str, Any]:
    more = {key: given[key] for key in OPTIONAL if given.get(key) is not None}
    return {key: given.get(key) for key in FUNCTION} | more


# --- which form a template takes --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def goes_through_parts(template: str) -> bool:
    """Whether a server gives this template the parts of a turn: it does where it sees a loop over them in the template's text."""
    import jinja2

    try:
        tree = _environment().parse(template)
        return any(_loops_over_content(tree))
    except (jinja2.TemplateError, _Unforeseen):
        return False


class _Unforeseen(Exception):
    """Several names are bound at once where one is expected; the server takes such a template for one that wants a text."""


@functools.cache
def _environment() -> Any:
    from jinja2 import Environment, ext, nodes, parser

    class Generation(ext.Extension):
        """`{% generation %}`, which marks what an assistant says."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.If(nodes.Const(True), body, [], [], lineno=line)

    return Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])


def _loops_over_content(tree: nodes.Template) -> Iterator[bool]:
    """True for the first loop over what a turn says; over a parameter of a macro that is given it; or over a variable called so."""
    from jinja2 import nodes

    turns = _turn_names(tree)
    given: dict[int, set[str]] = {}  # a loop within a macro: the parameters that get a content
    for macro in tree.find_all(nodes.Macro):
        given |= dict.fromkeys(map(id, macro.find_all(nodes.For)), _given_content(tree, macro, turns))
    for loop in tree.find_all(nodes.For):
        name = loop.iter.name if isinstance(loop.iter, nodes.Name) else ""
        named = name in given[id(loop)] if id(loop) in given else name == "content"
        if named or any(_is_content(loop.iter, turn) for turn in turns):
            yield bool(_name(loop.target))


def _turn_names(tree: nodes.Template) -> list[str]:
    """What the template calls a turn in its loops over the turns, or over a part of them under another name."""
    from jinja2 import nodes

    lists = ["messages"]
    for known in lists:  # it grows
        for assigned in tree.find_all(nodes.Assign):
            if _is(assigned.node, known) and (name := _name(assigned.target)) not in lists:
                lists.append(name)
    return [_name(loop.target) for loop in tree.find_all(nodes.For) if any(_is(loop.iter, known) for known in lists)]


def _given_content(tree: nodes.Template, macro: nodes.Macro, turns: Sequence[str]) -> set[str]:
    """The parameters of a macro that some call hands a turn's content."""
    from jinja2 import nodes

    names = [argument.name for argument in macro.args]
    given = set()
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
            handed = [*zip(names, call.args, strict=False), *((word.key, word.value) for word in call.kwargs)]
            given |= {
                name for name, value in handed if name in names and any(_is_content(value, turn) for turn in turns)
            }
    return given


def _bare(node: nodes.Node | None) -> nodes.Node | None:
    """An expression without filters, tests and slices around it."""
    from jinja2 import nodes

    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    return node


def _is(node: nodes.Node | None, name: str) -> bool:
    return _is_name(_bare(node), name)


def _is_name(node: nodes.Node | None, name: str) -> bool:
    from jinja2 import nodes

    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name


def _is_content(node: nodes.Node, turn: str) -> bool:
    """Whether an expression is `turn.content` or `turn['content']`."""
    from jinja2 import nodes

    bare = _bare(node)
    if isinstance(bare, nodes.Getattr):
        named = bare.attr == "content"
    else:
        named = isinstance(bare, nodes.Getitem) and isinstance(bare.arg, nodes.Const) and bare.arg.value == "content"
    return named and isinstance(bare, nodes.Getattr | nodes.Getitem) and _is_name(bare.node, turn)


def _name(target: nodes.Node) -> str:
    from jinja2 import nodes

    if not isinstance(target, nodes.Name):
        raise _Unforeseen
    return target.name
