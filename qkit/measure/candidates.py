"""Makes several variants of one artifact, measures each against the model that was trained, and keeps the best.

Which weights an adapter is best merged into depends on the adapter and on the target format, so it is measured and not asked. The merge stage,
`qkit merge --base` and the export stage all call `choose_best`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qkit.core.errors import ParityFailed
from qkit.core.files import read_json
from qkit.measure import gates
from qkit.measure import parity as measure_parity
from qkit.measure.parity import Parity, Reference
from qkit.plugins.runtime import RowScores
from qkit.recipe.schema import Base, Recipe
from qkit.recipe.section import Dtype
from qkit.run.directory import Run

FILE = "candidates.json"
ADAPTER = "adapter"  # the unmerged adapter on its base, in bf16; evaluate scores it under this name
DESCRIPTIONS: Mapping[Base, str] = {
    "dequantized": "merged into the base's 4-bit weights, dequantized: what the adapter was trained against",
    "16bit": "merged into the base's 16-bit weights",
}
FLOAT16_SUFFIX = "-fp16"
NOTICEABLE_KL = 1e-3  # mean KL in nats per token that a bfloat16 merge may cost before float16 is tried


@dataclass(frozen=True)
class Candidate:
    """A way to merge: into which weights of the base, and with which dtype.

    `dtype`: "float16" for a second attempt in the finer dtype; None for the first dtype that the recipe lists.
    """

    base: Base
    dtype: Dtype | None = None

    @classmethod
    def from_name(cls, name: str) -> Candidate:
        """The candidate that candidates.json or qkit.json calls `name`."""
        base: Base = "dequantized" if name.removesuffix(FLOAT16_SUFFIX) == "dequantized" else "16bit"
        return cls(base, "float16" if name.endswith(FLOAT16_SUFFIX) else None)

    @property
    def name(self) -> str:
        """Its name in candidates.json and in qkit.json."""
        return self.base + (FLOAT16_SUFFIX if self.dtype == "float16" else "")

    @property
    def description(self) -> str:
        """One line for reports."""
        return DESCRIPTIONS[self.base] + (", in float16" if self.dtype == "float16" else "")


@dataclass(frozen=True)
class CandidateResult:
    """What was measured of one candidate, or of a reference row such as the base model; `parity` is None if it was not measured.

    `score`: percent correct with its interval, and the task's further figures. `gain`: points above the reference model on the same rows, with
    their interval. `texts`: its answers.
    """

    name: str
    description: str
    parity: Parity | None = None
    score: Mapping[str, Any] | None = None
    gain: Mapping[str, float] | None = None
    note: str | None = None
    texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, candidate: Candidate, parity: Parity) -> CandidateResult:
        """The result of a candidate of which only the parity was measured."""
        return cls(candidate.name, candidate.description, parity)

    def to_dict(self) -> dict[str, Any]:
        """Its row in candidates.json, without the answers."""
        return {
            "name": self.name,
            "what": self.description,
            "parity": asdict(self.parity) if self.parity else None,
            "score": self.score,
            "gain": self.gain,
            "note": self.note,
            "lost": self.parity.lost if self.parity else None,
        }


@dataclass(frozen=True)
class Choice:
    """The best candidate, where it lies, and all results."""

    candidate: Candidate
    folder: Path
    result: CandidateResult
    results: tuple[CandidateResult, ...]
    rule: str

    def table(self, reference_rows: Sequence[CandidateResult] = ()) -> dict[str, Any]:
        """The contents of candidates.json. `reference_rows`: shown for comparison, never chosen."""
        return table(self.results, self.rule, reference_rows)

    def refuse_lost(self, artifact: str, label: str, advice: str) -> None:
        """Raise ParityFailed if even the best candidate has lost the fine-tune. `label`: the artifact's name in the message."""
        refuse_lost(self.result, artifact, label, advice)


def merge_candidates(recipe: Recipe) -> tuple[Candidate, ...]:
    """The merges to compare: into the base that the recipe names, or into each that exists."""
    if recipe.merge.base != "measured":
        return (Candidate(recipe.merge.base),)
    if recipe.quantization.load_in_4bit:
        return Candidate("dequantized"), Candidate("16bit")
    return (Candidate("16bit"),)


def choose_best(
    candidates: Sequence[Candidate],
    make: Callable[[Candidate], Path],
    measure: Callable[[Candidate, Path], CandidateResult],
    rule: str,
    finer: Callable[[Candidate, CandidateResult], Candidate | None] = lambda *_: None,
    notify: Callable[[str], None] = lambda _: None,
) -> Choice:
    """Make every candidate, then measure every one, then choose.

    `make` returns the folder that it wrote. `finer` may name one more candidate to try after the best of the others; their folders are deleted
    first to free the disk. If the finer one fails with ParityFailed (some models overflow in float16), it is left out.
    """
    folders = {candidate: make(candidate) for candidate in candidates}
    results = {candidate: measure(candidate, folder) for candidate, folder in folders.items()}
    best = _best(results, rule)
    if (extra := finer(best, results[best])) is not None:
        for candidate in candidates:
            if candidate != best:
                shutil.rmtree(folders[candidate])
        folders[extra] = make(extra)
        try:
            results[extra] = measure(extra, folders[extra])
        except ParityFailed as error:
            notify(f"{extra.name} is left out: {error}")
        best = _best(results, rule)
    return Choice(best, folders[best], results[best], tuple(results.values()), rule)


def _best(results: Mapping[Candidate, CandidateResult], rule: str) -> Candidate:
    best = choose(list(results.values()), rule)
    return next(candidate for candidate, result in results.items() if result is best)


def choose(results: Sequence[CandidateResult], rule: str) -> CandidateResult:
    """The result with the least mean KL to the reference model (rule `fidelity`) or with the best score (rule `score`).

    A candidate that has lost the fine-tune ranks last; one without a parity is never chosen.
    """

    def rank(result: CandidateResult) -> tuple[bool, float, float]:
        assert result.parity is not None
        score = float(result.score["score"]) if rule == "score" and result.score else 0.0
        return not result.parity.lost, score, -result.parity.kl_mean

    return max((result for result in results if result.parity), key=rank)


def rounds_too_much(recipe: Recipe, best: CandidateResult) -> bool:
    """Whether the best merge is noticeably far off and a finer dtype is left to try: bfloat16 rounds small deltas away.

    The limit is that of the default gate and not of the recipe's own: changing a gate changes what is accepted, not what is made.
    """
    limit = max(NOTICEABLE_KL, gates.default_gate("merged", recipe).kl_mean or 0.0)
    return len(recipe.merge.dtypes) > 1 and best.parity is not None and not best.parity.kl_mean <= limit


def finer_merge(run: Run) -> Callable[[Candidate, CandidateResult], Candidate | None]:
    """The `finer` of merges: the best one again in float16 if bfloat16 rounds too much away."""

    def finer(best: Candidate, result: CandidateResult) -> Candidate | None:
        if not rounds_too_much(run.recipe, result):
            return None
        assert result.parity is not None
        run.progress.notify(
            f"merge: trying float16: {best.name} in bfloat16 has lost part of the change (KL {result.parity.kl_mean:.4f})"
        )
        return replace(best, dtype=run.recipe.merge.dtypes[-1])

    return finer


def merged_parity(reference: Reference, folder: Path, scores: Iterable[RowScores]) -> Parity:
    """The parity of a merged model from its scores, with the rounding of its own dtype."""
    dtype = str(read_json(folder / "config.json")["dtype"])
    return measure_parity.measure(reference, scores, dtype, dtype)


def refuse_lost(result: CandidateResult, artifact: str, label: str, advice: str) -> None:
    """Raise ParityFailed if the fine-tune is lost in `result`. `label`: the artifact's name in the message."""
    parity = result.parity
    if parity is None or not parity.lost:
        return
    raise ParityFailed(
        f"{label} ({result.name}) has lost the fine-tune: its mean KL is {parity.kl_base:.2g} nats per token to the base model and "
        f"{parity.kl_base_live:.2g} to the adapter as trained. {advice}",
        artifact=artifact,
        gate="lost",
        figure=parity.kl_base_live,
    )


def table(
    results: Sequence[CandidateResult], rule: str, reference_rows: Sequence[CandidateResult] = ()
) -> dict[str, Any]:
    """The contents of candidates.json: all results, the chosen one, and what the other rule would have chosen if that differs."""
    best, other_rule = choose(results, rule), "score" if rule == "fidelity" else "fidelity"
    other = choose(results, other_rule) if all(result.score for result in results) else best
    return {
        "choose": rule,
        "chosen": best.name,
        "otherwise": None if other.name == best.name else _other_choice(best, other, other_rule),
        "candidates": [result.to_dict() for result in results],
        "beside": [result.to_dict() for result in reference_rows],
    }


def _other_choice(best: CandidateResult, other: CandidateResult, rule: str) -> dict[str, Any]:
    figures = {
        result.name: {
            "kl_mean": result.parity.kl_mean if result.parity else None,
            "score": result.score["score"] if result.score else None,
        }
        for result in (best, other)
    }
    compared = ", ".join(f"{name} has KL {f['kl_mean']:.4f} and score {f['score']:g}" for name, f in figures.items())
    return {
        "choose": rule,
        "chosen": other.name,
        "figures": figures,
        "words": f"merge.choose={rule} takes {other.name}: {compared}",
    }


# --- rows for comparison ----------------------------------------------------------------------------------------------


def base_row(reference: Reference) -> CandidateResult:
    """The base model without the adapter, from its recorded scores: how much there is to lose."""
    parity = measure_parity.measure(reference, reference.base) if reference.base else None
    return CandidateResult("base", "the base model without the adapter", parity)


def adapter_row(reference: Reference, score: Mapping[str, Any] | None) -> CandidateResult:
    """The unmerged adapter computed in bf16, as it was trained; all others are measured against the same in fp32."""
    return CandidateResult(ADAPTER, "the unmerged adapter on the base as trained, in bf16", reference.bf16, score)


# --- read by other stages ---------------------------------------------------------------------------------------------


def read_table(run: Run) -> dict[str, Any]:
    """candidates.json of the stage `merge`."""
    contents: dict[str, Any] = read_json(run.need("merge", FILE))
    return contents


def chosen_merge(run: Run) -> Candidate:
    """The candidate that the stage `merge` kept."""
    return Candidate.from_name(read_table(run)["chosen"])


def other_merges(run: Run) -> list[Candidate]:
    """The candidates that the stage `merge` measured and did not keep, each in the recipe's first dtype."""
    kept = chosen_merge(run).base
    return [candidate for candidate in merge_candidates(run.recipe) if candidate.base != kept]


def folder_of(work: Path, candidate: Candidate) -> Path:
    """Where a candidate lies while it is measured."""
    return work / ".candidates" / candidate.name
