"""What tasks of every family ask of a text."""

from __future__ import annotations

import re

from qkit.plugins.example import RowError
from qkit.recipe.schema import Data

SURROGATE = re.compile("[\ud800-\udfff]")
UNUSABLE = re.compile("[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\ufffd]")
NAMES = {"\x00": "NUL", "\ufffd": "the replacement character"}


def check_characters(text: str, where: str, section: Data) -> None:
    """Check a text for characters that it cannot have, or by data.clean.unicode should not.

    Raises:
        RowError: it contains one.
    """
    keep = section.clean.unicode == "keep"
    match = (SURROGATE if keep else UNUSABLE).search(text)
    if match:
        sign = match.group()
        name = NAMES.get(sign) or ("half a surrogate pair" if SURROGATE.match(sign) else "a control character")
        raise RowError(f"{where} contains U+{ord(sign):04X} ({name})", "malformed" if keep else "unicode")
