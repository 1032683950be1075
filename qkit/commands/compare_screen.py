"""The result of `qkit verify A B` for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qkit.measure import contract

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qkit.commands.compare import Comparison, Side


# --- on a screen ----------------------------------------------------------------------------------------------------


def screen(comparison: Comparison, a: Side, b: Side) -> RenderableType:
    """The comparison as a short table."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for label, value in _lines(comparison):
        table.add_row(Text(label, style="dim"), Text(value))
    head = (
        f"A  {a.description}\nB  {b.description}\n"
        f"on {comparison.rows:,} rows of {comparison.on}, {comparison.tokens:,} {_positions(comparison)}\n"
    )
    return Group(Text(head), table)


def _positions(comparison: Comparison) -> str:
    """What a distance is measured at."""
    return "completion tokens" if comparison.unit == "tokens" else "outputs"


def _of_tokens(comparison: Comparison) -> Iterator[tuple[str, str]]:
    yield "same top token", f"{100 * comparison.top1:.1f} %"
    parts = "" if comparison.parting is None else f"; the others first differ at token {comparison.parting:g} (median)"
    yield "greedy answers", f"{comparison.identical} identical{parts}"
    change = 100 * (comparison.perplexity_b / comparison.perplexity_a - 1)
    yield "perplexity", f"A {comparison.perplexity_a:.4f}   B {comparison.perplexity_b:.4f}   ({change:+.2f} %)"


def _of_labels(comparison: Comparison) -> Iterator[tuple[str, str]]:
    yield "same most likely", f"{100 * comparison.top1:.1f} %"
    yield "predictions", f"{comparison.identical} identical"
    yield "loss", f"A {comparison.loss_a:.4f}   B {comparison.loss_b:.4f}   nats"


def _lines(comparison: Comparison) -> Iterator[tuple[str, str]]:
    yield (
        "KL(A || B)",
        f"mean {comparison.kl_mean:.4f}   p99 {comparison.kl_p99:.4f}   max {comparison.kl_max:.4f}   over {comparison.over}",
    )
    yield from _of_tokens(comparison) if comparison.unit == "tokens" else _of_labels(comparison)
    if score := comparison.score:
        interval = f"interval {score['low']:+.1f} to {score['high']:+.1f}"
        yield (
            comparison.metric,
            f"A {score['a']:.1f}   B {score['b']:.1f}   ({score['points']:+.1f} points, {interval})",
        )
    for check in comparison.checks:
        if check.status == contract.DIFFERS:
            yield check.name, f"differs from training: {check.detail}"
