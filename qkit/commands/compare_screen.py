"""The result of `qkit verify A B` for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qkit.measure import contract

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qkit.commands.compare import Comparison, Side


# --- on a screen ----------------------------------------------------------------------------------------------------


def screen(found: Comparison, a: Side, b: Side) -> RenderableType:
    """The comparison as a short table."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for what, said in _lines(found):
        table.add_row(Text(what, style="dim"), Text(said))
    head = f"A  {a.words}\nB  {b.words}\non {found.rows:,} rows of {found.on}, {found.tokens:,} completion tokens\n"
    return Group(Text(head), table)


def _lines(found: Comparison) -> Iterator[tuple[str, str]]:
    yield (
        "KL(A || B)",
        f"mean {found.kl_mean:.4f}   p99 {found.kl_p99:.4f}   max {found.kl_max:.4f}   over {found.over}",
    )
    yield "same top token", f"{100 * found.top1:.1f} %"
    parts = "" if found.parting is None else f"; the others part at token {found.parting:g} (median)"
    yield "greedy answers", f"{found.identical} identical{parts}"
    change = 100 * (found.perplexity_b / found.perplexity_a - 1)
    yield "perplexity", f"A {found.perplexity_a:.4f}   B {found.perplexity_b:.4f}   ({change:+.2f} %)"
    if score := found.score:
        interval = f"interval {score['low']:+.1f} to {score['high']:+.1f}"
        yield found.metric, f"A {score['a']:.1f}   B {score['b']:.1f}   ({score['points']:+.1f} points, {interval})"
    for check in found.checks:
        if check.status == contract.DIFFERS:
            yield check.name, f"differ from training: {check.detail}"
