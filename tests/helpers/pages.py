"""Reading the HTML of a report."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = """</pre><script>alert(1)</script>"><img src=x onerror='alert(2)'>{{ 7 * 7 }}"""
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """What the tests look at: tags with their attributes, tables by section, the text; and tags are balanced."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.section = ""
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.tables[self.section][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data
        if self.tables.get(self.section) and ("td" in self.open or "th" in self.open):
            self.tables[self.section][-1][-1] += data

    def row(self, section: str, *starts: str) -> list[str]:
        """The first row of a section's tables that begins with these cells."""
        rows = [[cell.strip() for cell in row] for row in self.tables[section]]
        return next(row for row in rows if row[: len(starts)] == list(starts))
