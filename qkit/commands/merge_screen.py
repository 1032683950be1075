"""The terminal output of `qkit merge --base`: a table of candidates, and notes on what could not be checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qkit.measure.candidates import Candidate


def screen(result: Mapping[str, Any]) -> str:
    """The result of `merge_any.merge` as text."""
    return "\n".join(_lines(result))


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    rows = [row for row in [*result["candidates"], *result["beside"]] if row["parity"]]
    if rows:
        yield f"{'':>16} {'mean KL':>9} {'p99 KL':>8} {'top-1':>7} {'held-out loss':>14}"
    for row in rows:
        parity, mark = row["parity"], "  <- kept" if row["name"] == result["chosen"] else ""
        figures = (
            f"{parity['kl_mean']:9.4f} {parity['kl_p99']:8.3f} {parity['top1']:7.1%} {parity['heldout_loss']:14.4f}"
        )
        yield f"{row['name']:>16} {figures}{mark}"
    if rows:
        tokens = rows[0]["parity"]["tokens"]
        yield f"KL in nats per completion token to the unmerged adapter on its base, computed in fp32, over {tokens} tokens"
    yield from (f"note: {note}" for note in [*result["notes"], *filter(None, [result.get("note")])])
    bits = "4-bit" if Candidate.from_name(result["chosen"]).base == "dequantized" else "16-bit"
    yield f"{result['out']}: merged into the base's {bits} weights"
