"""Sentences whose tags their words decide, for tiny_labelled's models; and recipes and runs of `task: tag` on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from helpers.tiny_labelled import FILLING, settings
from qkit.recipe.load import load
from qkit.run.directory import Run

if TYPE_CHECKING:
    from qkit.core.progress import Progress

Sentence = tuple[tuple[str, ...], tuple[str, ...]]  # words and tags
TAGS = ("O", "B-fruit", "I-fruit", "B-tree", "I-tree")


def sentence(number: int) -> Sentence:
    """Words with a fruit of one word, or a tree of two or three; that of `number` is no other's."""
    filling = [(FILLING[(number * step + step) % len(FILLING)], "O") for step in range(1, 4 + number % 5)]
    longer = [("plum", "B-tree"), (FILLING[number % 30], "I-tree"), ("pear", "I-tree")]
    entity = [("apple", "B-fruit")] if number % 3 == 0 else longer[: 2 + number % 3 % 2] if number % 3 == 1 else longer
    place = number % (len(filling) + 1)
    pairs = [*filling[:place], *entity, *filling[place:]]
    return tuple(word for word, _ in pairs), tuple(tag for _, tag in pairs)


def sentences(count: int) -> list[Sentence]:
    return [sentence(number) for number in range(count)]


def write_conll(file: Path, given: Iterable[Sentence], separator: str = "\t") -> Path:
    """Sentences as two columns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    blocks = ["".join(f"{word}{separator}{tag}\n" for word, tag in zip(*one, strict=True)) for one in given]
    file.write_text("\n".join(blocks), encoding="utf-8")
    return file


def tagged_run(
    root: Path, model: Path, progress: Progress | None = None, given: Sequence[Sentence] | None = None, **sections: Any
) -> Run:
    """A run directory for a recipe on the model in `model`; nothing has been run. `given`: 96 of `sentences` if None; 24 are held out."""
    file = write_conll(root / "rows.conll", sentences(96) if given is None else given)
    recipe = settings(model, file, **{"task": "tag", **sections})
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return Run.create(root / "run", load(root / "recipe.yaml"), progress)
