"""Writes Ollama's Modelfile: the stop tokens, and the chat template in Ollama's language if that can express it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.export._gguf.tokenizer import stops, template_of

MARK = "\u2402{}\u2403"  # stands for the text of a turn; occurs in no template
ROLES = ("system", "user", "assistant")
UNTRANSLATED = "# This chat template cannot be expressed in Ollama's language: Ollama uses what it recognizes of the one in the .gguf file.\n"


@dataclass(frozen=True)
class Turns:
    """A template that puts fixed text around each turn. `default`: the system message of a conversation without one."""

    begin: str
    around: Mapping[str, tuple[str, str]]
    default: str | None = None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render a conversation up to the point where the assistant answers."""
        if self.default is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default}, *messages]
        turns = (self.around[turn["role"]][0] + turn["content"] + self.around[turn["role"]][1] for turn in messages)
        return self.begin + "".join(turns)


def write_modelfile(folder: Path, weights: str) -> None:
    """Write FOLDER/Modelfile."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    turns = turns_of(tokenizer) if template_of(folder) else None
    lines = [f"FROM ./{weights}\n", UNTRANSLATED if turns is None else _template(turns, tokenizer)]
    if turns and turns.default:
        lines.append(f'SYSTEM """{turns.default}"""\n')
    ends = (tokenizer.convert_ids_to_tokens(number) for number in stops(folder))
    # The config may name an id that the tokenizer does not have
    lines += [f'PARAMETER stop "{text}"\n' for text in ends if text is not None]
    (folder / "Modelfile").write_text("".join(lines), encoding="utf-8")


def _template(turns: Turns, tokenizer: Any) -> str:
    """Return the template in Go's template language, without the BOS token if llama.cpp adds it to every text."""
    added = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    begin = turns.begin.removeprefix(tokenizer.bos_token) if added and tokenizer.bos_token else turns.begin
    branches = [
        f'{{{{ {"else if" if index else "if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        for index, (role, (before, after)) in enumerate(turns.around.items())
    ]
    return f'TEMPLATE """{begin}{{{{ range .Messages }}}}{"".join(branches)}{{{{ end }}}}{{{{ end }}}}"""\n'


def turns_of(tokenizer: Any) -> Turns | None:
    """Return the template as fixed text around turns, inferred from four rendered conversations; None if it does more than that."""
    system, user, answer = ({"role": role, "content": MARK.format(role)} for role in ROLES)
    conversations = [[user], [system, user], [user, answer, user], [system, user, answer, user, answer, user]]
    try:
        texts = [
            str(tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True)) for t in conversations
        ]
    except Exception:  # a template is a program, and may reject a system turn, or anything else, with any error
        return None
    bos = tokenizer.bos_token or ""
    # ChatML models call the token that starts every turn their BOS token; then it does not belong to the beginning of the text.
    begin = bos if texts[-1].startswith(bos) and texts[-1].count(bos) == 1 else ""
    turns = _inferred(begin, texts[0].removeprefix(begin), texts[-1].removeprefix(begin))
    exact = turns is not None and all(turns.render(c) == text for c, text in zip(conversations, texts, strict=True))
    return turns if exact else None


def _inferred(begin: str, short: str, whole: str) -> Turns | None:
    """Infer the text around turns from a single question and from a whole conversation, both without `begin`."""
    pieces = re.split("|".join(re.escape(MARK.format(role)) for role in ROLES), whole)
    first = short.split(MARK.format("user"))
    if len(pieces) != 7 or len(first) != 2:
        return None
    head, after_system, after_user, after_answer = pieces[:4]
    asks = _common_end(_common_end(after_system, after_answer), first[0])  # the text before each question
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
    """Return the longest common suffix."""
    pairs = zip(reversed(left), reversed(right), strict=False)
    size = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
    return left[len(left) - size :]
