"""The checks of pairs: of single ones, and of the whole set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from qkit.plugins.checks import NAMED_ROWS, Check, Kind, SetRow
from qkit.tasks._conversation.checks.kinds import CONVERSATION_CHECKS

LONGER = (
    0.65  # share of pairs whose chosen answer is the longer one, from which on length alone predicts the preference
)
ENOUGH = 20  # pairs, for a share to say anything

PAIR_CHECKS: Mapping[str, Kind] = {
    **CONVERSATION_CHECKS,
    "prompt": Kind(
        "both answers of every pair follow the same prompt",
        "have no prompt that both of their answers follow, and are dropped",
        "warn",
        "give each pair one prompt, and each side one answer to it",
    ),
    "identical": Kind(
        "the answers of every pair differ",
        "have the same answer on both sides, and are dropped",
        "warn",
        "remove them: nothing is preferred there",
    ),
}


@dataclass(frozen=True)
class PairFacts:
    """What the checks of the whole set need of a pair: digests of both answers, and their tokens."""

    chosen: str
    rejected: str
    chosen_tokens: int
    rejected_tokens: int


def set_checks(rows: Sequence[SetRow]) -> Iterator[Check]:
    """Pairs that contradict each other, and whether the longer answer is the chosen one."""
    pairs = [(row, row.about) for row in rows if isinstance(row.about, PairFacts)]
    yield _contradictions(pairs)
    yield _length_bias([facts for row, facts in pairs if row.split == "train"])


def _contradictions(pairs: Sequence[tuple[SetRow, PairFacts]]) -> Check:
    """Pairs of one split that are there both ways round: the first that contradicts an earlier one, and so on."""
    first: dict[tuple[str, str, str, str], SetRow] = {}
    clashing = []
    for row, facts in pairs:
        first.setdefault((row.split, row.question, facts.chosen, facts.rejected), row)
        other = first.get((row.split, row.question, facts.rejected, facts.chosen))
        if other is not None:
            clashing.append((row, other))
    if not clashing:
        return Check("contradiction", "pass", "no pair is there both ways round")
    row, other = clashing[0]
    message = f"{len(clashing):,} pairs contradict another one: {row.place} prefers the answer that {other.place} rejects, to the same prompt"
    places = tuple(place for row, other in clashing[:NAMED_ROWS] for place in (row.place, other.place))
    return Check("contradiction", "warn", message, len(clashing), places, "decide on one of the two, or remove both")


def _length_bias(facts: Sequence[PairFacts]) -> Check:
    """In how many training pairs the chosen answer is longer, and the mean lengths."""
    unequal = [one for one in facts if one.chosen_tokens != one.rejected_tokens]
    if not unequal:
        return Check("length_bias", "skipped", "no two answers of a training pair have different lengths")
    longer = sum(one.chosen_tokens > one.rejected_tokens for one in unequal)
    share = longer / len(unequal)
    means = [fmean(getattr(one, name) for one in facts) for name in ("chosen_tokens", "rejected_tokens")]
    message = (
        f"the chosen answer is longer in {longer:,} of {len(unequal):,} training pairs of unequal length ({share:.0%}); on average it has "
        f"{means[0]:,.1f} tokens, the rejected one {means[1]:,.1f}"
    )
    if len(unequal) < ENOUGH or 1 - LONGER < share < LONGER:
        return Check("length_bias", "pass", message, longer)
    taught = "long" if share > 0.5 else "short"
    remedy = f"the model will learn that {taught} answers are better; balance the lengths, or set preference.loss_type=sigmoid_norm"
    return Check("length_bias", "warn", message, longer, remedy=remedy)
