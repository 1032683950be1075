"""What the user asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """What is predicted. `target`: a run, a folder or a URL. `columns`: ours -> the file's; `keep`: columns that are copied.

    `top_k`: how many labels are named; -1: all. `artifact`: of a run; None: the best that passed its gate. `key`: of a server.
    """

    target: str
    file: str
    out: str
    columns: Mapping[str, str]
    keep: Sequence[str] = ()
    stdin_format: str = "jsonl"
    top_k: int = -1
    max_new_tokens: int | None = None
    artifact: str | None = None
    model: str | None = None
    overwrite: bool = False
    key: str = ""
