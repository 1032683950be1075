"""The report's section on pairs: those that the trained model has the wrong way round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qkit.core.errors import short
from qkit.plugins.sections import Cell, Column, Evaluated, Section, Table

WORST = 20  # pairs that are listed
TEXT = 200  # characters of a prompt


def sections_of_pairs(evaluated: Evaluated) -> Sequence[Section]:
    """One section; nothing before there are predictions."""
    if not evaluated.lines:
        return ()
    margins = [float(line["prediction"]) for line in evaluated.lines]
    wrong = sum(margin <= 0 for margin in margins)
    notes = (
        "The margin of a pair is how much more the trained model raised the log-probability of the chosen answer than that of the rejected "
        "one, in nats. A pair whose margin is not above 0 is the wrong way round.",
    )
    columns = (Column("row", "name"), Column("margin"), Column("chosen"), Column("rejected"), Column("prompt", "text"))
    caption = f"{wrong:,} of {len(margins):,} held-out pairs are the wrong way round; the pairs with the lowest margins"
    table = Table(caption, columns, list(_lowest(evaluated.lines)), sortable=True)
    return (Section("pairs", "Pairs of answers", notes, (table,)),)


def _lowest(lines: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Cell | str]]:
    for line in sorted(lines, key=lambda line: float(line["prediction"]))[:WORST]:
        figures = [
            float(line["prediction"]),
            float(line["chosen_log_probability"]),
            float(line["rejected_log_probability"]),
        ]
        yield (str(line["row"]), *(Cell(value, f"{value:.2f}") for value in figures), short(str(line["prompt"]), TEXT))
