"""The plan for a terminal: the verdict first, then the lines, the stages, the time, and what could be changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qkit.core.figures import GIB, gib
from qkit.plan.fixed_memory import BASE_BYTES
from qkit.plan.items import MemoryItem
from qkit.plan.plan import Plan, refusal
from qkit.plan.published import Anchor
from qkit.plan.remedies import Remedy
from qkit.plan.sheet import Sheet
from qkit.plan.solve import LengthTable, Solved
from qkit.plan.speed import Pace

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def screen(found: Sheet) -> RenderableType:
    """The whole sheet."""
    from rich.console import Group
    from rich.text import Text

    style = "bold green" if found.made.fits else "bold red"
    idle = [f"warning: {text}" for text in found.remarks]
    refused = [f"warning: not deployable as {refusal.format}: {refusal.reason}" for refusal in found.refused]
    after = [
        *idle,
        *refused,
        *([f"warning: {found.vocabulary}; `qkit inspect` says whether one comes up"] if found.vocabulary else []),
        *_notes(found),
        *_remedy_lines(found),
        *_other_stages(found),
        *_solved_lines(found.solved),
        *_anchor_lines(found.anchors),
    ]
    drawn: list[RenderableType] = [
        Text(verdict(found.made), style=style),
        Text(),
        _items(found.made),
        Text(),
        _stages(found),
    ]
    if found.lengths:
        drawn += [Text(), Text(_percentiles(found.lengths)), choices(found.lengths)]
    return Group(*drawn, *map(Text, after))


def verdict(made: Plan) -> str:
    """Whether it fits, in one line."""
    if not made.fits:
        return f"{made.stage} does not fit: {refusal(made)}"
    needs = f"needs {gib(made.peak_bytes)} of {gib(made.device_bytes)} on {made.device}"
    return f"{made.stage} fits: {needs}, {gib(made.device_bytes - made.peak_bytes)} to spare"


def explanation(items: Sequence[MemoryItem]) -> RenderableType:
    """The formula of a line, and of its parts, with the numbers in it."""
    from rich.console import Group
    from rich.text import Text

    lines = [
        f"{item.name} = {item.bytes:,} bytes{'' if item.exact else ' (estimate)'}: {item.formula}" for item in items
    ]
    return Group(*(Text(line if index == 0 else f"  {line}") for index, line in enumerate(lines)))


def _grid(*columns: tuple[str, bool]) -> Table:
    """A table without a frame; the columns whose flag is set hold figures."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, figures in columns:
        table.add_column(name, justify="right" if figures else "left", overflow="fold", no_wrap=figures)
    return table


def _items(made: Plan) -> Table:
    table = _grid(("line", False), ("GiB", True), ("how", False))
    for item in made.items:
        table.add_row(item.name, _size(item), item.formula)
        for part in item.parts:
            table.add_row(f"  {part.name}", _size(part), part.formula, style="dim")
    table.add_row(
        "peak", f"{made.peak_bytes / GIB:.2f}", f"of {made.device_bytes / GIB:.2f} on {made.device}", style="bold"
    )
    return table


def _size(item: MemoryItem) -> str:
    return f"{'' if item.exact else '~'}{item.bytes / GIB:.2f}"


def _stages(found: Sheet) -> Table:
    table = _grid(("stage", False), ("GiB", True), ("largest lines", False))
    for made in found.stages:
        largest = sorted(made.items, key=lambda item: -item.bytes)[:2]
        said = ", ".join(f"{item.name} {gib(item.bytes)}" for item in largest)
        table.add_row(made.stage, f"~{made.peak_bytes / GIB:.2f}", said if made.fits else f"DOES NOT FIT; {said}")
    return table


def _notes(found: Sheet) -> Iterator[str]:
    yield ""
    if not found.exact:
        why = "its family is not known, or tokens are added that may find spare rows"
        yield f"This model's parameters, and all that follows from them, are an estimate: {why}."
    if found.comes_quantized:
        size = gib(found.parameters * BASE_BYTES)
        yield f"The base comes quantized ({found.comes_quantized}): it is dequantized once, on the host, to {size} in 16 bit in the cache."
    counts = ", ".join(f"{count:,} of {length:,} tokens" for length, count in found.conversations)
    yield f"{found.parameters:,} parameters. A server holds at once, in conversations: {counts}."
    yield f"Gradient checkpointing is {'on' if found.checkpointing.on else 'off'}: {found.checkpointing.why}."
    yield _pace(found.pace)


def _pace(pace: Pace) -> str:
    if pace.tokens_per_second is None:
        return f"Time is not known: {pace.how}."
    most, least = ("at most ", "at least ") if pace.bound else ("", "")
    text = f"Training: {most}{pace.tokens_per_second:,.0f} tokens/s ({pace.how})"
    if pace.seconds is None:
        return f"{text}; how many tokens there are is known once the data stage has run, or with train.max_steps."
    return f"{text}; {pace.tokens:,} tokens in {pace.steps:,} steps take {least}{_duration(pace.seconds)}."


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _remedy_lines(found: Sheet) -> Iterator[str]:
    if found.made.remedies:
        yield ""
        yield " ".join(f"--set {text}" for remedy in found.made.remedies for text in remedy.set)
        yield from map(_remedy, found.made.remedies)
    chosen = {remedy.set for remedy in found.made.remedies}
    if others := [remedy for remedy in found.alternatives if remedy.set not in chosen]:
        yield "each alone:"
        yield from map(_remedy, others)


def _other_stages(found: Sheet) -> Iterator[str]:
    """What to do for the further stages that do not fit."""
    for made in found.short:
        if made.stage != found.made.stage:
            yield ""
            yield verdict(made)
            if made.peak_bytes - sum(remedy.saves_bytes for remedy in made.remedies) <= made.device_bytes:
                yield " ".join(f"--set {text}" for remedy in made.remedies for text in remedy.set)


def _remedy(remedy: Remedy) -> str:
    kept = "same result" if remedy.same_result else "another result"
    return f"  {' '.join(remedy.set)}  saves {gib(remedy.saves_bytes)}, {remedy.time_factor:.2f} times the time, {kept}: {remedy.price}"


def _solved_lines(solved: Solved | None) -> Iterator[str]:
    if solved is None:
        return
    yield ""
    if solved.plan is None:
        yield f"{solved.question}: nothing fits"
        return
    sets = "".join(f" --set {text}" for text in solved.set)
    yield f"{solved.question}: {solved.value} ({gib(solved.plan.peak_bytes)} of {gib(solved.plan.device_bytes)} on {solved.plan.device}){sets}"


def _anchor_lines(anchors: Sequence[Anchor]) -> Iterator[str]:
    for anchor in anchors:
        line = f"{anchor.fixed_bytes / 1e9:.3f} GB + {anchor.bytes_per_token / 1e6:.4f} MB per token"
        yield ""
        yield f"{anchor.name}, published for rank 32 and one row: {line} = {gib(anchor.peak_bytes)}; here {gib(anchor.ours_bytes)}"
        if anchor.why:
            yield f"  {anchor.why}"


def _percentiles(lengths: LengthTable) -> str:
    return "training rows in tokens: " + ", ".join(f"{name} {tokens:,}" for name, tokens in lengths.percentiles.items())


def choices(lengths: LengthTable) -> Table:
    """What each choice of data.max_length keeps of the rows, and what it needs."""
    table = _grid(("max_length", True), ("rows", True), ("tokens with loss", True), ("GiB", True), ("time", True))
    for choice in lengths.choices:
        table.add_row(
            f"{choice.max_length:,}",
            f"{choice.rows:,} ({choice.rows_share:.1%})",
            f"{choice.labelled:,} ({choice.labelled_share:.1%})",
            f"{choice.peak_bytes / GIB:.2f}{'' if choice.fits else ' does not fit'}",
            "" if choice.seconds is None else _duration(choice.seconds),
        )
    return table
