"""The names that a recipe may use for tasks, formats of export and runtimes: the folders are the registry."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent
TASKS, FORMATS, RUNTIMES = "tasks", "export.formats", "runtimes"  # the folders, as Python imports them
MERGED = "merged"  # the artifact of the stage `merge`, where the name of an export format could stand


def format_names() -> Iterator[str]:
    """Every format that an exporter makes: its name, and its variant after a dash."""
    for kind in names(FORMATS):
        exporter: Any = importlib.import_module(f"qkit.{FORMATS}.{kind}")
        yield from ("-".join(filter(None, (kind, variant))) for variant in exporter.VARIANTS)


def names(folder: str) -> list[str]:
    """The names that a registry folder of the package offers."""
    return sorted(p.stem for p in (PACKAGE / folder.replace(".", "/")).glob("*.py") if not p.stem.startswith("_"))


def split(name: str) -> tuple[str, str]:
    """A format's name as its exporter's and its variant."""
    kind, _, variant = name.partition("-")
    return kind, variant


def accepts(name: str) -> bool:
    """Whether a format is one that its exporter makes: a variant of its list, or a longer name that spells out how (BY_HAND)."""
    kind, variant = split(name)
    if kind not in names(FORMATS):
        return False
    found: Any = importlib.import_module(f"qkit.{FORMATS}.{kind}")
    return variant in found.VARIANTS or variant in getattr(found, "BY_HAND", ())
