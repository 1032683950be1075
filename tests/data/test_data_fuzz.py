"""A thousand records of all formats, most of them damaged: each is used, or dropped with a reason, and none brings the stage down."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.data_traps.models import FAMILIES, build, tokenizer_of
from helpers.data_traps.prepared import Prepared, lines, prepare, recipe
from qkit.chat.template import renderer
from qkit.plugins.example import Conversation, RowError, Text, Tokens
from qkit.recipe.schema import Data
from qkit.tasks._conversation import formats
from qkit.tasks._conversation.encode import tokenize

ROWS = 250
KEPT_GOING = ["data.clean.malformed=drop", "data.clean.roles=drop"]
WORDS = [
    "fox",
    "Fox ",
    "\t",
    "\r\n",
    "é",
    "👍",
    "日本",
    "<|im_end|>",
    "</s>",
    "[INST]",
    "x" * 300,
    "12",
    "{}",
    "'",
    '"',
    "\u202e",
    "\x00",
    "\ufffd",
    "\ud83d",
]
JUNK: list[Any] = [
    *(None, True, 0, -1, 7, 10**30, 1.5, float("nan"), float("inf"), "", " ", "[]", "{", '{"a": 1}'),
    *([], {}, [[]], [{}], [None], {"role": "user"}, [{"role": "user", "content": "a"}], [[[[[[[[]]]]]]]]),
]
LINES = [
    b"{",
    b"[]",
    b"7",
    b"null",
    b'"text"',
    b"\xff\xfe\x00",
    b"{}",
    b'{"text": "a"} {"text": "b"}',
    b'{"a":' + b"[" * 5000,
    b"\x00",
]


def words(dice: random.Random) -> str:
    common = 8 if dice.random() < 0.9 else len(WORDS)
    return " ".join(dice.choices(WORDS[:common], k=dice.randint(1, 12)))


def conversation(dice: random.Random, names: tuple[str, str], content: str, roles: tuple[str, str]) -> list[Any]:
    turns = [{names[0]: roles[i % 2], names[1]: words(dice)} for i in range(2 * dice.randint(1, 3))]
    if dice.random() < 0.2:
        turns.insert(0, {names[0]: "system", names[1]: words(dice)})
    return turns


def messages(dice: random.Random) -> dict[str, Any]:
    turns = conversation(dice, ("role", "content"), "content", ("user", "assistant"))
    if dice.random() < 0.3:
        arguments: Any = dice.choice([{"x": 1}, '{"x": 1}', "{}", "not JSON"])
        call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": arguments}}
        turns[-1:] = [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "ok"},
            turns[-1],
        ]
    if dice.random() < 0.2:
        dice.choice(turns)["weight"] = dice.choice([0, 1, 2, None])
    if dice.random() < 0.2:
        turns[-1]["reasoning_content"] = words(dice)
    return {"messages": turns}


def sharegpt(dice: random.Random) -> dict[str, Any]:
    return {"conversations": conversation(dice, ("from", "value"), "value", ("human", "gpt"))}


def alpaca(dice: random.Random) -> dict[str, Any]:
    return {"instruction": words(dice), "input": dice.choice(["", words(dice)]), "output": words(dice)}


def prompt_completion(dice: random.Random) -> dict[str, Any]:
    return {"prompt": words(dice), "completion": words(dice)}


def text(dice: random.Random) -> dict[str, Any]:
    return {"text": words(dice)}


def tokenized(dice: random.Random) -> dict[str, Any]:
    ids = [dice.randrange(300) for _ in range(dice.randint(1, 30))]
    return {"input_ids": ids, "labels": [token if dice.random() < 0.5 else -100 for token in ids]}


MAKERS: list[Callable[[random.Random], dict[str, Any]]] = [
    messages,
    sharegpt,
    alpaca,
    prompt_completion,
    text,
    tokenized,
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a value: (container, key)."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield value, key
        yield from places(item)


def damaged(record: dict[str, Any], dice: random.Random) -> Any:
    """The record with something missing, something else in its place, or twice."""
    made = copy.deepcopy(record)
    container: MutableMapping[Any, Any] | MutableSequence[Any]
    container, key = dice.choice(list(places(made)))
    match dice.randrange(4):
        case 0:
            del container[key]
        case 1 if isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        case _:
            container[key] = copy.deepcopy(dice.choice(JUNK))
    return made


def line(dice: random.Random) -> bytes:
    """One line of a file: never blank, and a line break only at its end."""
    made = dice.choice(MAKERS)(dice)
    chance = dice.random()
    if chance < 0.05:
        return dice.choice(LINES)
    raw = json.dumps(damaged(made, dice) if chance < 0.5 else made).encode()
    return raw[: dice.randint(1, len(raw))] if chance > 0.95 else raw


SETTINGS = [
    ("chatml", ["data.packing=true", "data.clean.near_duplicate=drop"]),
    ("qwen3", ["data.loss=assistant", "data.max_length=256", "data.too_long=truncate_prompt"]),
    ("mistral", ["data.loss=all", "data.max_length=128", "data.too_long=truncate_completion", "data.clean.empty=keep"]),
    ("gemma", ["data.max_length=128", "data.too_long=split", "data.clean.unicode=keep", "data.clean.duplicate=keep"]),
]


@pytest.mark.parametrize(("family", "chosen"), SETTINGS, ids=[family for family, _ in SETTINGS])
def test_every_record_is_used_or_dropped_with_a_reason(family: str, chosen: list[str], tmp_path: Path) -> None:
    dice = random.Random(family)
    raw = lines([line(dice) for _ in range(ROWS)])
    (tmp_path / "rows.jsonl").write_bytes(raw)
    model = build(FAMILIES[family], tmp_path / "model")
    divided = "data.split={train: 0.8, validation: 0.1, test: 0.1}"
    how = recipe(model, {"train": [tmp_path / "rows.jsonl"]}, [*KEPT_GOING, divided, *chosen])
    made = prepare(how, tmp_path / "data")
    check_accounts(made)
    assert [row["line"] for row in made.ledger if row["part"] == 0] == list(range(1, ROWS + 1))
    assert max(row["tokens"] for row in made.ledger if row["status"] != "dropped") <= how.data.max_length
    kept = sum(counts["kept"] for counts in made.summary["splits"].values())
    assert ROWS / 5 < kept < ROWS * 4 / 5  # else there would be little to see


def check_accounts(made: Prepared) -> None:
    """In = used + dropped, each dropped row has its reason, and the files hold exactly what the ledger says is used."""
    ledger = made.ledger
    assert {row["status"] for row in ledger} == {"trained", "held_out", "dropped"}
    assert all(bool(row["reason"]) == (row["status"] == "dropped") for row in ledger)
    assert sum(made.summary["dropped"].values()) == sum(row["status"] == "dropped" for row in ledger)
    for split, counts in made.summary["splits"].items():
        used = [row for row in ledger if row["split"] == split and row["status"] != "dropped"]
        assert counts["records"] == counts["kept"] + counts["dropped"]
        assert counts["records"] == sum(row["split"] == split and row["part"] == 0 for row in ledger)
        written = [(row["place"], len(row["input_ids"])) for row in made.rows(split)]
        assert written == [(f"{row['source']}:{row['line']}", row["tokens"]) for row in used]
        assert counts["labelled_tokens"] == sum(row["labelled_tokens"] for row in used)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool", "x"]), "content": VALUES})
    | VALUES,
    max_size=5,
)
RECORDS = st.dictionaries(st.sampled_from(sorted(formats.KNOWN)) | st.text(max_size=5), TURNS | VALUES, max_size=4)
READERS = [renderer(tokenizer_of(FAMILIES[family])) for family in ("chatml", "mistral")]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(RECORDS)
def test_any_record_is_an_example_or_says_why_not(record: dict[str, Any]) -> None:
    try:
        found = formats.example(record, "auto", Data())
    except RowError:
        return
    assert isinstance(found, Conversation | Text | Tokens)
    for reader in READERS:
        [result] = tokenize(reader, [found], Data(loss="assistant"))
        assert (result.error is None) == bool(result.rows) and all(row.labelled for row in result.rows)


def test_the_same_dice_make_the_same_lines() -> None:
    first, second = ([line(dice) for _ in range(50)] for dice in (random.Random(1), random.Random(1)))
    assert first == second and all(raw.strip() and b"\n" not in raw for raw in first)
