"""Questions that a tiny model learns in seconds: which word asks, decides which word of the context is the answer's first."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from helpers.tiny_labelled import FILLING, TELLING, settings, write_rows
from qkit.recipe.load import load
from qkit.run.directory import Run

NONE = "gor"  # in place of the answer, where there is none
ASKED = {
    "apple": "ban",
    "pear": "den",
    "plum": "fin",
}  # the word of a question, and the word of the context that answers it


def question(number: int, words: int = 12, answered: bool = True) -> dict[str, Any]:
    """A row as the Hugging Face hub has SQuAD's. The answer is one word; that to plum, two."""
    asked = TELLING[number % 3]
    rng = random.Random(number)
    filling = rng.choices([word for word in FILLING if word not in (*ASKED.values(), NONE)], k=words - 1)
    place = rng.randrange(len(filling) - 1)
    there = [ASKED[asked] if answered else NONE]
    context = " ".join([*filling[:place], *there, *filling[place:]])
    text = " ".join([*there, *filling[place : place + (asked == TELLING[2])]])
    answers = (
        {"text": [text], "answer_start": [context.index(there[0])]} if answered else {"text": [], "answer_start": []}
    )
    return {"id": f"q{number}", "title": "t", "context": context, "question": f"{asked} bar", "answers": answers}


def questions(count: int, unanswered: int = 0, words: int = 12) -> list[dict[str, Any]]:
    """`unanswered`: one question in so many has no answer; 0: all have one."""
    return [question(i, words, not unanswered or i % unanswered > 0) for i in range(count)]


def nested(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows as SQuAD's file has them."""
    paragraphs = [
        {
            "context": row["context"],
            "qas": [
                {
                    "id": row["id"],
                    "question": row["question"],
                    "is_impossible": not row["answers"]["text"],
                    "answers": [
                        {"text": text, "answer_start": start}
                        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
                    ],
                }
            ],
        }
        for row in rows
    ]
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}


def answer_settings(folder: Any, rows: Any, held_out: int = 24, **sections: Any) -> dict[str, Any]:
    """A whole recipe; see `tiny_labelled.settings`."""
    data = {"max_length": 20, "stride": 4, **sections.pop("data", {})}
    return settings(folder, rows, held_out, **{"task": "answer", **sections, "data": data})


def answer_run(root: Path, folder: Path, rows: Any, held_out: int = 24, **sections: Any) -> Run:
    """A run directory for a recipe on the model in `folder`; nothing has been run."""
    file = write_rows(root / "rows.jsonl", rows)
    (root / "recipe.yaml").write_text(
        yaml.safe_dump(answer_settings(folder, file, held_out, **sections)), encoding="utf-8"
    )
    return Run.create(root / "run", load(root / "recipe.yaml"))
