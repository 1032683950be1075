"""Where the project's files are."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
PACKAGE = ROOT / "qkit"
SERVE = ROOT / "serve"
RECIPES = ROOT / "recipes"
GOLDEN = TESTS / "golden"
TEMPLATES = TESTS / "templates"
