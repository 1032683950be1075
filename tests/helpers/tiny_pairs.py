"""Pairs of answers that a tiny model can tell apart, and a recipe on them that runs in seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.tiny import tiny_settings

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def pair_rows(count: int) -> list[dict[str, Any]]:
    """Repeating the letter is preferred to shouting another one."""
    return [
        {
            "prompt": f"say {LETTERS[i % 26]} {'please ' * (i % 4)}",
            "chosen": LETTERS[i % 26] * 3,
            "rejected": LETTERS[(i + 7) % 26].upper() * (2 + i % 5),
        }
        for i in range(count)
    ]


def write_rows(file: Path, rows: Sequence[Any]) -> Path:
    """A file of JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def pair_settings(model: Path, rows: Path) -> dict[str, Any]:
    """A whole recipe that runs in seconds, on a file of 44 pairs or more."""
    settings = tiny_settings(model, rows)
    return {
        **settings,
        "task": "preference",
        "data": {
            "train": [{"source": str(rows), "rows": "12:"}],
            "test": [{"source": str(rows), "rows": ":12"}],
            "max_length": 192,
            "batch_tokens": 512,
            "max_overlap": 1.0,
        },
        "train": {"max_steps": 6, "learning_rate": 1e-2, "save_steps": 2},
        "export": {"formats": ["onnx-fp32"]},
        "verify": {},
        "bench": {**settings["bench"], "runtimes": ["transformers"]},
    }
