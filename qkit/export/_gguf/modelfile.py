"""Ollama's Modelfile: the chat template in Ollama's own language where it can be said there, and what ends a turn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.export._gguf.tokenizer import stops, template_of

MARK = "\u2402{}\u2403"  # stands for a turn's text: in no template
ROLES = ("system", "user", "assistant")
NO_WORDS = (
    "# This chat template has no form in Ollama's language: Ollama takes what it knows of it from the file itself.\n"
)


@dataclass(frozen=True)
class Turns:
    """A template that puts fixed text around each turn. `default`: the system turn of a conversation that has none."""

    begin: str
    around: Mapping[str, tuple[str, str]]
    default: str | None = None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation that is left for the assistant to answer."""
        if self.default is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default}, *messages]
        said = (self.around[turn["role"]][0] + turn["content"] + self.around[turn["role"]][1] for turn in messages)
        return self.begin + "".join(said)


def write_modelfile(folder: Path, weights: str) -> None:
    """Write FOLDER/Modelfile."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    turns = turns_of(tokenizer) if template_of(folder) else None
    lines = [f"FROM ./{weights}\n", NO_WORDS if turns is None else _template(turns, tokenizer)]
    if turns and turns.default:
        lines.append(f'SYSTEM """{turns.default}"""\n')
    ends = (tokenizer.convert_ids_to_tokens(number) for number in stops(folder))
    lines += [
        f'PARAMETER stop "{text}"\n' for text in ends if text is not None
    ]  # the embedding may have more rows than there are tokens
    (folder / "Modelfile").write_text("".join(lines), encoding="utf-8")


def _template(turns: Turns, tokenizer: Any) -> str:
    """The same in Go's template language. What the file has llama.cpp put before every text is left out."""
    added = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    begin = turns.begin.removeprefix(tokenizer.bos_token) if added and tokenizer.bos_token else turns.begin
    branches = [
        f'{{{{ {"else if" if index else "if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        for index, (role, (before, after)) in enumerate(turns.around.items())
    ]
    return f'TEMPLATE """{begin}{{{{ range .Messages }}}}{"".join(branches)}{{{{ end }}}}{{{{ end }}}}"""\n'


def turns_of(tokenizer: Any) -> Turns | None:
    """The template as fixed text around turns, or None where it does more than that: seen by what it makes of four conversations."""
    system, user, answer = ({"role": role, "content": MARK.format(role)} for role in ROLES)
    talks = [[user], [system, user], [user, answer, user], [system, user, answer, user, answer, user]]
    try:
        texts = [str(tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True)) for t in talks]
    except Exception:  # a template is a program, and may refuse a system turn, or anything else, in any way
        return None
    once = tokenizer.bos_token or ""  # ChatML models name the mark of every turn so: then it is no beginning
    begin = once if texts[-1].startswith(once) and texts[-1].count(once) == 1 else ""
    found = _fitted(begin, texts[0].removeprefix(begin), texts[-1].removeprefix(begin))
    fits = found is not None and all(found.render(talk) == text for talk, text in zip(talks, texts, strict=True))
    return found if fits else None


def _fitted(begin: str, short: str, whole: str) -> Turns | None:
    """The text around turns, from a question alone and from a whole conversation, both without what they begin with."""
    pieces = re.split("|".join(re.escape(MARK.format(role)) for role in ROLES), whole)
    first = short.split(MARK.format("user"))
    if len(pieces) != 7 or len(first) != 2:
        return None
    head, after_system, after_user, after_answer = pieces[:4]
    asks = _common_end(_common_end(after_system, after_answer), first[0])  # what stands before each question
    around = {
        "system": (head, after_system.removesuffix(asks)),
        "user": (asks, after_user),
        "assistant": ("", after_answer.removesuffix(asks)),
    }
    left = first[0].removesuffix(asks)
    if left and not head.startswith(left):
        return Turns(begin, around, left.removeprefix(head).removesuffix(around["system"][1]))
    around["system"] = (head.removeprefix(left), around["system"][1])
    return Turns(begin + left, around)


def _common_end(left: str, right: str) -> str:
    pairs = zip(reversed(left), reversed(right), strict=False)
    size = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
    return left[len(left) - size :]
