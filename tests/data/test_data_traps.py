"""Each trap makes its own check fire, names its row, and makes no other check fire; without the trap none does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from helpers.data_traps.models import Tiny, build
from helpers.data_traps.prepared import Prepared, lines, prepare, recipe
from helpers.data_traps.table import HARMLESS, HELD_OUT, TRAPS, Harmless, Trap
from qkit.data.inspection.view import token_texts
from qkit.plugins.task import open_task

Build = Callable[[Tiny], Path]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The folder of a model, built once."""
    built: dict[Tiny, Path] = {}

    def get(wanted: Tiny) -> Path:
        if wanted not in built:
            built[wanted] = build(wanted, tmp_path_factory.mktemp("tiny"))
        return built[wanted]

    return get


def prepared(trap: Trap, model: Build, folder: Path) -> Prepared:
    (folder / trap.file).write_bytes(trap.content)
    (folder / "test.jsonl").write_bytes(lines(trap.test))
    sources = {"train": [folder / trap.file], "test": [folder / "test.jsonl"] if trap.test else []}
    return prepare(recipe(model(trap.model), sources, trap.settings), folder / "data")


@pytest.mark.slow
@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_a_trap_is_found_and_nothing_else(trap: Trap, model: Build, tmp_path: Path) -> None:
    made = prepared(trap, model, tmp_path)
    assert made.suspicious == {trap.check: trap.status, **trap.besides}
    check = made.check(trap.check)
    assert check["found"] == trap.found
    assert check["remedy"]
    if trap.place is None:
        assert not check["rows"]
    else:
        name, line = trap.place
        assert {"source": str(tmp_path / name), "line": line} in check["rows"]
        assert f"{name}:{line}" in check["message"]


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_without_the_trap_nothing_is_found(trap: Trap, model: Build, tmp_path: Path) -> None:
    assert prepared(replace(trap, **trap.cure), model, tmp_path).suspicious == {}


@pytest.mark.parametrize("odd", HARMLESS, ids=lambda odd: odd.name)
def test_what_is_odd_and_harmless_reads_as_the_plain_rows(odd: Harmless, model: Build, tmp_path: Path) -> None:
    made = []
    for name, file, content in (("odd", odd.file, odd.content), ("plain", "train.jsonl", lines(odd.rows))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / file).write_bytes(content)
        (folder / "test.jsonl").write_bytes(lines(HELD_OUT))
        sources = {"train": [folder / file], "test": [folder / "test.jsonl"]}
        made.append(prepare(recipe(model(Tiny()), sources), folder / "data"))
    assert [found.suspicious for found in made] == [{}, {}]
    odd_rows, plain_rows = ([(row["input_ids"], row["labels"]) for row in found.rows()] for found in made)
    assert odd_rows == plain_rows and len(odd_rows) == len(odd.rows)


def test_an_emoji_of_several_tokens_is_shown_with_the_first_of_them(model: Build) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(model(Tiny())))
    texts = list(token_texts(tokenizer, tokenizer.encode("a👍é!")))
    assert texts == ["a", "👍", "", "", "", "é", "", "!"]


def test_every_check_over_rows_has_a_trap() -> None:
    """`mask` finds faults of qkit itself: those are in test_mutations."""
    assert set(open_task("chat").CHECKS) - {trap.check for trap in TRAPS} == {"mask"}
