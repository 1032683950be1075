"""What `qkit merge --base` says: the table of ways to merge, and what could not be checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def screen(made: Mapping[str, Any]) -> str:
    """The result of `foreign.merge` as text."""
    return "\n".join(_lines(made))


def _lines(made: Mapping[str, Any]) -> Iterator[str]:
    rows = [row for row in [*made["candidates"], *made["beside"]] if row["parity"]]
    if rows:
        yield f"{'':>16} {'mean KL':>9} {'p99 KL':>8} {'top-1':>7} {'held-out loss':>14}"
    for row in rows:
        found, mark = row["parity"], "  <- kept" if row["name"] == made["chosen"] else ""
        yield (
            f"{row['name']:>16} {found['kl_mean']:9.4f} {found['kl_p99']:8.3f} {found['top1']:7.1%} {found['heldout_loss']:14.4f}{mark}"
        )
    if rows:
        yield f"KL in nats per completion token to the adapter apart on its base, computed in fp32, {rows[0]['parity']['tokens']} tokens"
    yield from (f"note: {note}" for note in [*made["notes"], *filter(None, [made.get("note")])])
    yield f"{made['out']}: merged into the base's {'4-bit' if made['chosen'].startswith('dequantized') else '16-bit'} weights"
