"""`qkit inspect` on one screen: where the rows come from, how long they are, what they cost, and what is likely wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qkit.core.device import detect
from qkit.core.errors import ModelError
from qkit.data.inspection.view import Inspection, RowView
from qkit.plan import screen as plan_screen
from qkit.plan import solve

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text


STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}
SUSPECTS = 5
BINS = 10
BAR = 40  # columns
SOURCES = 8  # of more, the rest is counted


CONTROL = {
    code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"
}  # shown as symbols: a row must not control the terminal


def plain(text: str) -> str:
    """Text of a row that is safe to print on a terminal."""
    return text.translate(CONTROL)


def to_dict(inspection: Inspection, row: RowView | None, losses: Mapping[str, Any] | None) -> dict[str, Any]:
    """For `--json`. `checks`: name, status, message, found, rows (source, line), remedy."""
    splits = inspection.summary["splits"]
    counts = {name: sum(split[name] for split in splits.values()) for name in ("records", "kept", "dropped")}
    result = {
        "checks": inspection.summary["checks"],
        "counts": {**counts, "by_rule": inspection.summary["dropped"]},
        "tokens": inspection.summary["budget"],
        "splits": splits,
        "sources": inspection.summary["sources"],
        "lengths": inspection.summary["lengths"],
    }
    if losses is not None:
        result["losses"] = losses
    return {**result, **asdict(row)} if row else result


def screen(inspection: Inspection, losses: Mapping[str, Sequence[Mapping[str, Any]]] | None) -> RenderableType:
    """The whole report without single rows."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [
        *_sources(inspection.summary["sources"]),
        _splits(inspection.summary["splits"]),
        Text(_template(inspection)),
        Text(_budget(inspection.summary["budget"])),
        *map(Text, histogram(inspection.summary["lengths"], inspection.recipe.data.max_length)),
        Text(),
        *_choices(inspection),
        Text(),
        _checks(inspection.summary["checks"]),
        *_suspects(inspection.summary["checks"]),
    ]
    if losses is not None:
        parts += map(Text, _losses(losses))
    return Group(*parts)


def _sources(sources: Sequence[Mapping[str, Any]]) -> Iterator[Text]:
    from rich.text import Text

    for source in sources[:SOURCES]:
        formats = ", ".join(f"{name}" for name in source["formats"])
        yield Text(f"{source['split']:<11}{source['records']:>9,} records  {formats:<18} {source['source']}")
    if len(sources) > SOURCES:
        yield Text(
            f"{'':<11}{sum(s['records'] for s in sources[SOURCES:]):>9,} records in {len(sources) - SOURCES} more sources"
        )
    yield Text()


def _splits(splits: Mapping[str, Mapping[str, int]]) -> Table:
    from rich.table import Table

    columns = ("records", "kept", "dropped", "rows", "tokens", "labelled_tokens", "truncated_tokens")
    table = Table(box=None, pad_edge=False)
    table.add_column("split")
    for name in columns:
        table.add_column(
            {"labelled_tokens": "carry loss", "truncated_tokens": "truncated"}.get(name, name), justify="right"
        )
    for split, counts in splits.items():
        if counts["records"]:
            table.add_row(split, *(f"{counts[name]:,}" for name in columns))
    return table


def _template(inspection: Inspection) -> str:
    template = inspection.summary["template"]
    if "end_of_turn" not in template:  # texts with labels
        return f"\npadding: {template['pad']}; labels: {', '.join(inspection.labels)}"
    return (
        f"\ntemplate: {template['name']}; end of turn: {template['end_of_turn']}; padding: {template['pad']}; "
        f"loss: {inspection.recipe.data.loss}; packing: {'on' if inspection.recipe.data.packing else 'off'}"
    )


def _budget(budget: Mapping[str, int]) -> str:
    computed = max(budget["computed"], 1)
    return (
        f"one epoch: {budget['batches']:,} batches, {budget['computed']:,} tokens computed: {budget['labelled'] / computed:.0%} carry loss, "
        f"{(budget['real'] - budget['labelled']) / computed:.0%} context, {budget['padding'] / computed:.1%} padding\n"
    )


def histogram(lengths: Sequence[Sequence[int]], max_length: int) -> Iterator[str]:
    """Training rows by length, before the rule for long ones. `lengths`: [tokens, rows, labelled tokens] each."""
    if not lengths:
        return
    total, longest = sum(rows for _, rows, _ in lengths), lengths[-1][0]
    width = max(-(-(longest + 1) // BINS), 1)
    bins = [
        sum(rows for tokens, rows, _ in lengths if tokens // width == index) for index in range(longest // width + 1)
    ]
    shares = "  ".join(f"p{share} {solve.percentile(lengths, share / 100):,}" for share in (50, 90, 99))
    yield f"tokens per row: {shares}  longest {longest:,}  (max_length {max_length:,})"
    for index, rows in enumerate(bins):
        bar = "█" * -(-rows * BAR // max(bins)) if rows else ""
        yield f"{index * width:>7,} {bar:<{BAR}} {rows:,} ({rows / total:.0%})"


def _choices(inspection: Inspection) -> Iterator[Table]:
    """What each choice of data.max_length keeps and costs; nothing where the model's shape is not known."""
    lengths = inspection.summary["lengths"]
    with suppress(ModelError):
        if lengths:
            yield plan_screen.choices(solve.length_table(lengths, inspection.recipe, detect(), len(inspection.labels)))


def _checks(checks: Sequence[Mapping[str, Any]]) -> Table:
    """The names of the checks that passed or were skipped."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for status in ("pass", "skipped"):
        names = ", ".join(check["name"] for check in checks if check["status"] == status)
        if names:
            table.add_row(Text(status, style=STYLES[status]), Text(names, style="dim"))
    return table


def suspects(checks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Failed checks before warnings, those with most rows first; duplicates come last because they do the least harm."""
    bad = [check for check in checks if check["status"] in ("fail", "warn")]
    return sorted(bad, key=lambda check: (check["status"] != "fail", "duplicate" in check["name"], -check["found"]))


def _suspects(checks: Sequence[Mapping[str, Any]]) -> Iterator[Text]:
    from rich.text import Text

    yield from (
        Text(plain(check["message"]), style="dim") for check in checks if check["status"] == "pass" and check["found"]
    )
    suspicious = suspects(checks)
    if not suspicious:
        yield Text("no problems found", style="green")
    for check in suspicious[:SUSPECTS]:
        yield Text.assemble(
            (f"{check['status']} ", STYLES[check["status"]]), (check["name"], "bold"), f": {plain(check['message'])}"
        )
        yield Text(f"     {check['remedy']}", style="dim")
    if len(suspicious) > SUSPECTS:
        yield Text(f"and {', '.join(check['name'] for check in suspicious[SUSPECTS:])}: see --json", style="dim")


def _losses(losses: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    for kind, title in (
        ("did_not_learn", "rows that were not learned"),
        ("suspiciously_low", "rows with a low loss before training"),
    ):
        yield f"\n{title}:"
        for row in losses[kind]:
            yield f"  loss {row['loss_before']:.3f} before, {row['loss_after']:.3f} after: row {row['row']} ({row['place']})"


def row_screen(view: RowView) -> RenderableType:
    """The row: what carries loss green and underlined, special tokens magenta, the rest dim."""
    from rich.text import Text

    loss = f"label {', '.join(view.names)}" if view.names else f"{sum(view.loss_mask)} carry loss"
    body = Text(f"{view.split} row {view.row} ({view.place}): {len(view.input_ids)} tokens, {loss}\n\n")
    for place, (text, trained, special) in enumerate(zip(view.texts, view.loss_mask, view.special, strict=True)):
        if place in view.titles:
            body.append(f"\n[{view.titles[place]}] ", style="bold")
        color = "magenta" if special else "green" if trained else "dim"
        body.append(plain(text), style=f"{color} underline" if trained else color)
    body.append("\n\n")
    body.append("trained", style="green underline")
    body.append("  context  ", style="dim")
    body.append("special", style="magenta")
    return body
