"""The chat templates that ship with qkit."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "templates"


def named() -> list[str]:
    """The templates that ship with qkit."""
    return sorted(file.stem for file in FOLDER.glob("*.jinja"))
