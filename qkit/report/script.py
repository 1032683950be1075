"""The one script of a report, which sorts tables: it is part of the page, and the page's policy allows it by its hash, and no other."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from importlib import resources

from qkit.plugins.sections import Section, Table


def is_needed(sections: Iterable[Section]) -> bool:
    """Whether a table of these sections can be sorted."""
    return any(isinstance(part, Table) and part.sortable for section in sections for part in section.parts)


def text() -> str:
    """The script's source."""
    return resources.files("qkit.report").joinpath("sort.js").read_text(encoding="utf-8")


def content_hash() -> str:
    """Its hash, as a content security policy has it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text().encode()).digest()).decode()}"
