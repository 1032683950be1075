"""`qkit plan` for a terminal: the verdict first, then the items, the stages, the time, and possible changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qkit.core.figures import GIB, gib
from qkit.plan.fixed_memory import BASE_BYTES
from qkit.plan.items import MemoryItem
from qkit.plan.plan import Plan, refusal
from qkit.plan.published import Anchor
from qkit.plan.remedies import Remedy
from qkit.plan.sheet import Evaluation, Sheet
from qkit.plan.solve import LengthTable, Solved
from qkit.plan.speed import Pace

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def screen(sheet: Sheet) -> RenderableType:
    """Everything that `qkit plan` shows."""
    from rich.console import Group
    from rich.text import Text

    style = "bold green" if sheet.plan.fits else "bold red"
    after = [
        *(f"warning: {text}" for text in sheet.remarks),
        *(f"warning: not deployable as {refusal.format}: {refusal.reason}" for refusal in sheet.refused),
        *(
            [f"warning: {sheet.vocabulary}; `qkit inspect` shows whether the data contains one"]
            if sheet.vocabulary
            else []
        ),
        *_notes(sheet),
        *_remedy_lines(sheet),
        *_other_stages(sheet),
        *_solved_lines(sheet.solved),
        *_anchor_lines(sheet.anchors),
    ]
    parts: list[RenderableType] = [
        Text(verdict(sheet.plan), style=style),
        Text(),
        _items(sheet.plan),
        Text(),
        _stages(sheet),
    ]
    if sheet.lengths:
        parts += [Text(), Text(_percentiles(sheet.lengths)), choices(sheet.lengths)]
    return Group(*parts, *map(Text, after))


def verdict(plan: Plan) -> str:
    """Whether the plan fits, in one line."""
    if not plan.fits:
        return f"{plan.stage} does not fit: {refusal(plan)}"
    needs = f"needs {gib(plan.peak_bytes)} of {gib(plan.device_bytes)} on {plan.device}"
    return f"{plan.stage} fits: {needs}, {gib(plan.device_bytes - plan.peak_bytes)} to spare"


def explanation(items: Sequence[MemoryItem]) -> RenderableType:
    """The formulas of an item and of its parts, with their numbers."""
    from rich.console import Group
    from rich.text import Text

    lines = [
        f"{item.name} = {item.bytes:,} bytes{'' if item.exact else ' (estimate)'}: {item.formula}" for item in items
    ]
    return Group(*(Text(line if index == 0 else f"  {line}") for index, line in enumerate(lines)))


def _grid(*columns: tuple[str, bool]) -> Table:
    """A table without a frame. `columns`: (heading, whether the column holds figures)."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, figures in columns:
        table.add_column(name, justify="right" if figures else "left", overflow="fold", no_wrap=figures)
    return table


def _items(plan: Plan) -> Table:
    table = _grid(("line", False), ("GiB", True), ("formula", False))
    for item in plan.items:
        table.add_row(item.name, _size(item), item.formula)
        for part in item.parts:
            table.add_row(f"  {part.name}", _size(part), part.formula, style="dim")
    table.add_row(
        "peak", f"{plan.peak_bytes / GIB:.2f}", f"of {plan.device_bytes / GIB:.2f} on {plan.device}", style="bold"
    )
    return table


def _size(item: MemoryItem) -> str:
    return f"{'' if item.exact else '~'}{item.bytes / GIB:.2f}"


def _stages(sheet: Sheet) -> Table:
    table = _grid(("stage", False), ("GiB", True), ("largest lines", False))
    for plan in sheet.stages:
        largest = sorted(plan.items, key=lambda item: -item.bytes)[:2]
        text = ", ".join(f"{item.name} {gib(item.bytes)}" for item in largest)
        table.add_row(plan.stage, f"~{plan.peak_bytes / GIB:.2f}", text if plan.fits else f"DOES NOT FIT; {text}")
    return table


def _notes(sheet: Sheet) -> Iterator[str]:
    yield ""
    if not sheet.exact:
        why = "the model family is unknown, added tokens may use spare rows of the embedding, or the labels have not been counted"
        yield f"The number of parameters, and everything derived from it, is an estimate: {why}."
    if sheet.comes_quantized:
        size = gib(sheet.parameters * BASE_BYTES)
        yield f"The base model is quantized ({sheet.comes_quantized}): qkit dequantizes it once, on the host, to {size} in the cache."
    counts = ", ".join(f"{count:,} of {length:,} tokens" for length, count in sheet.conversations)
    served = f" Conversations that a server holds at once: {counts}." if counts else ""
    yield f"{sheet.parameters:,} parameters.{served}"
    yield f"Gradient checkpointing is {'on' if sheet.checkpointing.on else 'off'}: {sheet.checkpointing.why}."
    yield _pace(sheet.pace)
    if sheet.evaluation:
        yield _evaluation(sheet.evaluation, sheet.pace.bound)


def _evaluation(evaluation: Evaluation, bound: bool) -> str:
    often = "Training" if evaluation.evaluations is None else f"{evaluation.evaluations:,} times, training"
    rows = "" if evaluation.tokens is None else f", {evaluation.tokens:,} tokens"
    text = f"{often} evaluates the validation rows{rows}"
    if evaluation.seconds is None:
        return f"{text}."
    return f"{text}: that takes {'at least' if bound else 'about'} {_duration(evaluation.seconds)}, without any answers that it generates."


def _pace(pace: Pace) -> str:
    if pace.tokens_per_second is None:
        return f"Training time is unknown: {pace.basis}."
    most, least = ("at most ", "at least ") if pace.bound else ("", "")
    text = f"Training: {most}{pace.tokens_per_second:,.0f} tokens/s ({pace.basis})"
    if pace.seconds is None:
        return f"{text}; the number of tokens is known after the data stage, or with train.max_steps."
    return f"{text}; {pace.tokens:,} tokens in {pace.steps:,} steps take {least}{_duration(pace.seconds)}."


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _remedy_lines(sheet: Sheet) -> Iterator[str]:
    if sheet.plan.remedies:
        yield ""
        yield " ".join(f"--set {text}" for remedy in sheet.plan.remedies for text in remedy.set)
        yield from map(_remedy, sheet.plan.remedies)
    chosen = {remedy.set for remedy in sheet.plan.remedies}
    if others := [remedy for remedy in sheet.alternatives if remedy.set not in chosen]:
        yield "Alternatives, each on its own:"
        yield from map(_remedy, others)


def _other_stages(sheet: Sheet) -> Iterator[str]:
    """Remedies for the other stages that do not fit."""
    for plan in sheet.short:
        if plan.stage != sheet.plan.stage:
            yield ""
            yield verdict(plan)
            if plan.peak_bytes - sum(remedy.saves_bytes for remedy in plan.remedies) <= plan.device_bytes:
                yield " ".join(f"--set {text}" for remedy in plan.remedies for text in remedy.set)


def _remedy(remedy: Remedy) -> str:
    result = "same result" if remedy.same_result else "different result"
    return f"  {' '.join(remedy.set)}  saves {gib(remedy.saves_bytes)}, {remedy.time_factor:.2f} times the time, {result}: {remedy.cost}"


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
        yield f"{anchor.name}, published for rank 32 and batch 1: {line} = {gib(anchor.peak_bytes)}; qkit {gib(anchor.ours_bytes)}"
        if anchor.why:
            yield f"  {anchor.why}"


def _percentiles(lengths: LengthTable) -> str:
    return "training rows in tokens: " + ", ".join(f"{name} {tokens:,}" for name, tokens in lengths.percentiles.items())


def choices(lengths: LengthTable) -> Table:
    """The choices of data.max_length: the rows that each keeps, and the memory and time that it needs."""
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
