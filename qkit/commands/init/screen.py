"""What `qkit init` shows: the data, the machine, what it chose, and what to type next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qkit.commands.init import init
from qkit.commands.init.init import Proposal
from qkit.core.errors import printable, short

NAMED = 8  # labels


def screen(proposal: Proposal, file: Path) -> str:
    """The lines to print."""
    return printable("\n".join(_lines(proposal, file)))


def _lines(proposal: Proposal, file: Path) -> Iterator[str]:
    yield f"{proposal.dataset.name}: {init.facts(proposal)}"
    if proposal.lengths.reason:
        yield f"  the tokenizer could not be had: {short(proposal.lengths.reason)}"
    yield f"task      {proposal.reading.candidate.task}: {proposal.suggestion.why}"
    yield f"columns   {', '.join(f'{ours} = {theirs}' for ours, theirs in proposal.suggestion.columns.items())}"
    if proposal.reading.ignore:
        yield f"unread    {short(', '.join(proposal.reading.ignore))}"
    if proposal.labels:
        shown = ", ".join(f"{label} {count:,}" for label, count in proposal.labels.most_common(NAMED))
        more = f" and {len(proposal.labels) - NAMED} more" if len(proposal.labels) > NAMED else ""
        yield f"labels    {short(shown)}{more}"
    yield f"model     {proposal.base.source}: {proposal.base.why}"
    yield f"machine   {short(proposal.composed.planned)}"
    yield from (f"look      {trouble}" for trouble in proposal.troubles)
    for check in proposal.checks or ():
        yield f"fails     check {check['name']}: {check['message']}; {check['remedy']}"
    if not proposal.is_scored:
        yield "look      these rows have no answers to score, which `qkit run` needs: it also needs questions with answers in data.test"
    yield f"written   {file}"
    yield "next      " + "\n          ".join(proposal.commands(file))
