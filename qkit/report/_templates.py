"""The Jinja templates of this package, with the filters that format figures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from qkit.core.figures import bytes_text, fixed, gib_text, kl_text, ms_text, percent, seconds_text, speed_text

if TYPE_CHECKING:
    from jinja2 import Template

FILTERS: Mapping[str, Callable[..., str]] = {
    function.__name__: function
    for function in (bytes_text, seconds_text, ms_text, gib_text, kl_text, percent, fixed, speed_text)
}


def markdown_cell(text: object) -> str:
    """Text on one line, with the pipes escaped, for a cell of a Markdown table."""
    return " ".join(str(text).replace("|", "\\|").split())


@functools.cache
def template(name: str) -> Template:
    """The template file `name` of this package. HTML is escaped in templates for HTML; an undefined name is an error."""
    from importlib import resources

    import jinja2

    environment = jinja2.Environment(
        autoescape=name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=name.endswith(".md.j2"),
    )
    environment.filters.update(FILTERS, cell=markdown_cell)
    return environment.from_string(resources.files("qkit.report").joinpath(name).read_text(encoding="utf-8"))
