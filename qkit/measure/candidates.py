"""Ways to merge one adapter, each measured against the model that was trained, and the rule that takes one of them.

Onto which weights a merge is best has no answer that holds for all adapters and targets, so nobody is asked to know it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qkit.core.errors import ParityFailed
from qkit.core.files import read_json
from qkit.measure import parity as measure_parity
from qkit.measure.parity import Parity, Reference
from qkit.recipe.schema import Base, Recipe
from qkit.run.directory import Run

FILE = "candidates.json"
APART = "adapter"  # the adapter on its base as it was trained, in bf16; evaluate scores it under this name
WHAT = {
    "dequantized": "merged into the base's 4-bit weights, dequantized: what the adapter was trained against",
    "16bit": "merged into the base's 16-bit weights",
}
FINER = "-fp16"  # after the name of a base: merged into that, and rounded to float16, which has three bits more than bfloat16


@dataclass(frozen=True)
class Candidate:
    """One way, and what was measured of it; `parity` is None where it could not be.

    `score`: percent right with its interval, `gain`: points against the reference model on the same rows, with theirs. `texts`: its answers.
    """

    name: str
    what: str
    parity: Parity | None = None
    score: Mapping[str, float] | None = None
    gain: Mapping[str, float] | None = None
    note: str | None = None
    texts: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in asdict(self).items() if name != "texts"},
            "lost": self.parity.lost if self.parity else None,
        }


def bases(how: Recipe) -> tuple[Base, ...]:
    """Onto which weights to merge: the one that the recipe names, or all that there are."""
    if how.merge.base != "measured":
        return (how.merge.base,)
    return ("dequantized", "16bit") if how.quantization.load_in_4bit else ("16bit",)


def base_of(name: str) -> Base:
    """The base that a candidate of this name was merged into."""
    return "dequantized" if name.removesuffix(FINER) == "dequantized" else "16bit"


def describe(name: str) -> str:
    """What a candidate of this name is, in words."""
    return WHAT[base_of(name)] + (", in float16" if name.endswith(FINER) else "")


def choose(candidates: Sequence[Candidate], rule: str) -> Candidate:
    """The one with the least mean KL to the reference model, or (`score`) with the best score; one that has lost the fine-tune comes last."""

    def worth(candidate: Candidate) -> tuple[bool, float, float]:
        found = candidate.parity
        assert found is not None
        score = candidate.score["score"] if rule == "score" and candidate.score else 0.0
        return not found.lost, score, -found.kl_mean

    return max((candidate for candidate in candidates if candidate.parity), key=worth)


def refuse_lost(candidate: Candidate, what: str, advice: str) -> None:
    """Raise ParityFailed when the fine-tune is not in it."""
    found = candidate.parity
    if found is None or not found.lost:
        return
    raise ParityFailed(
        f"{what} ({candidate.name}) has lost the fine-tune: its mean KL is {found.kl_base:.2g} nats per token to the base model and "
        f"{found.kl_base_live:.2g} to the adapter that was trained. {advice}"
    )


def table(measured: Sequence[Candidate], rule: str, beside: Sequence[Candidate] = ()) -> dict[str, Any]:
    """What was measured and chosen, and what the other rule would have chosen where that is another one. `beside`: for comparison only."""
    best, other_rule = choose(measured, rule), "score" if rule == "fidelity" else "fidelity"
    scored = all(candidate.score for candidate in measured)
    other = choose(measured, other_rule) if scored else best
    return {
        "choose": rule,
        "chosen": best.name,
        "otherwise": None if other.name == best.name else _otherwise(best, other, other_rule),
        "candidates": [candidate.to_dict() for candidate in measured],
        "beside": [candidate.to_dict() for candidate in beside],
    }


def _otherwise(best: Candidate, other: Candidate, rule: str) -> dict[str, Any]:
    figures = {
        candidate.name: {
            "kl_mean": candidate.parity.kl_mean if candidate.parity else None,
            "score": candidate.score["score"] if candidate.score else None,
        }
        for candidate in (best, other)
    }
    words = ", ".join(f"{name} has KL {f['kl_mean']:.4f} and score {f['score']:g}" for name, f in figures.items())
    return {
        "choose": rule,
        "chosen": other.name,
        "figures": figures,
        "words": f"merge.choose={rule} takes {other.name}: {words}",
    }


def base_model(reference: Reference) -> Candidate:
    """The base model without the adapter, from what was recorded: how much there is to lose."""
    return Candidate(
        "base", "the base model alone", measure_parity.measure(reference, reference.base) if reference.base else None
    )


def apart(reference: Reference, score: Mapping[str, float] | None) -> Candidate:
    """The adapter kept apart on the base it was trained on, computed in bf16 as it was trained: all are measured against the same in fp32."""
    return Candidate(APART, "the adapter apart, on the base as it was trained, in bf16", reference.bf16, score)


# --- read by other stages ---------------------------------------------------------------------------------------------


def read_table(run: Run) -> dict[str, Any]:
    """The table that the stage `merge` left."""
    found: dict[str, Any] = read_json(run.need("merge", FILE))
    return found


def other_bases(run: Run) -> Iterator[Base]:
    """The ways that the run's merge has measured and not taken."""
    chosen = base_of(read_table(run)["chosen"])
    yield from (base for base in bases(run.recipe) if base != chosen)


def folder_of(work: Path, name: str) -> Path:
    """Where a candidate lies while it is measured."""
    return work / ".candidates" / name
