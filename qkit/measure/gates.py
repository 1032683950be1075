"""How far an artifact may be from the model that was trained: which limits apply to an artifact, and the verdict.

A distance counts only beyond what rounding to 16 bits and the choice of rows do to an intact artifact (see parity.py): `kl_mean` limits that
excess. `top1` and `max_difference` of an fp32 file are measured against the merged model that it was made from, run in fp32. `score` fails when
fewer answers are right than the reference model has right, by more than chance: an exact sign test on the same rows (scores.sign_test).
The figures of the limits are `GATES` of the task (tasks/_conversation/task.py), which recipes override by `verify.gates`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qkit.core.errors import ParityFailed
from qkit.measure import scores
from qkit.measure.evidence import Breach, read_evidence, reference_answers
from qkit.measure.held_out import HeldOut
from qkit.measure.parity import Parity
from qkit.measure.remedies import remedy
from qkit.measure.scores import Grades, SignTest
from qkit.plugins.exporter import is_exact, is_quantized
from qkit.plugins.task import open_task
from qkit.recipe.schema import Gate, Recipe
from qkit.run.directory import Run


@dataclass(frozen=True)
class Exactness:
    """An fp32 artifact compared with the merged model in fp32, on the first `rows` held-out rows.

    `top1`: share of tokens with the same most likely token; `max_difference`: the largest difference of a log-probability.
    """

    top1: float
    max_difference: float
    rows: int


# --- the limits -------------------------------------------------------------------------------------------------------


def gate_of(name: str, recipe: Recipe) -> Gate:
    """The limits of an artifact: those of its kind, overridden by `verify.gates`."""
    overrides = recipe.verify.gates.get(name, Gate()).model_dump(exclude_none=True)
    return default_gate(name, recipe).model_copy(update=overrides)


def default_gate(name: str, recipe: Recipe) -> Gate:
    """The limits of an artifact's kind."""
    gates = open_task(recipe.task).GATES
    if is_quantized(name):
        return gates["quantized"]
    limits = gates["quantized" if _on_another_base(name, recipe) else "16-bit"]
    exact = gates["exact"].model_dump(include={"top1", "max_difference"})
    return limits.model_copy(update=exact) if is_exact(name) else limits


def _on_another_base(name: str, recipe: Recipe) -> bool:
    """Whether an artifact uses the base's 16-bit weights, by the recipe's choice, although it was trained on 4-bit weights.

    It then differs from training by the rounding of the base to 4 bits: the same kind of difference that quantizing an artifact makes.
    """
    by_choice = name == "vllm-adapter" or recipe.merge.base == "16bit" or recipe.merge.choose == "score"
    return recipe.quantization.load_in_4bit and by_choice


# --- the verdict ------------------------------------------------------------------------------------------------------


def judge(
    gate: Gate,
    measured: Parity,
    change: SignTest | None = None,
    exactness: Exactness | None = None,
    confidence: float = 0.95,
) -> list[Breach]:
    """The limits that an artifact breaks.

    `change`: its right answers compared with the reference model's; `confidence`: 1 minus the level of that test.
    """
    return [*_distances(gate, measured), *_exactness(gate, exactness), *_score(gate, change, confidence)]


def _distances(gate: Gate, measured: Parity) -> Iterator[Breach]:
    if measured.lost:
        yield Breach("lost", measured.kl_base, measured.kl_base_live)
    if is_far(gate, measured):
        yield Breach("kl_mean", measured.excess, gate.kl_mean, _composition(measured))
    if _above(measured.worst_row, gate.kl_row):
        yield Breach("kl_row", measured.worst_row, gate.kl_row)
    if _above(measured.kl_p99, gate.kl_p99):
        yield Breach("kl_p99", measured.kl_p99, gate.kl_p99)


def _exactness(gate: Gate, exactness: Exactness | None) -> Iterator[Breach]:
    if exactness is None:
        return
    if gate.top1 is not None and not exactness.top1 >= gate.top1:
        yield Breach("top1", exactness.top1, gate.top1)
    if _above(exactness.max_difference, gate.max_difference):
        yield Breach("max_difference", exactness.max_difference, gate.max_difference)


def _score(gate: Gate, change: SignTest | None, confidence: float) -> Iterator[Breach]:
    if gate.score and change is not None and change.worse(confidence):
        yield Breach("score", change.points, 0.0, change.message)


def is_far(gate: Gate, measured: Parity) -> bool:
    """Whether the mean distance exceeds its limit by more than rounding and chance."""
    return _above(measured.excess, gate.kl_mean)


def _above(figure: float | None, limit: float | None) -> bool:
    """Whether a figure that was measured breaks a limit that is set. NaN breaks every limit."""
    return figure is not None and limit is not None and not figure <= limit


def _composition(measured: Parity) -> str:
    """What the excess was computed from; empty where rounding was not measured."""
    if measured.rounding is None:
        return ""
    interval = "" if measured.kl_low is None else f" ({measured.kl_low:.4g} to {measured.kl_high:.4g})"
    return f"measured {measured.kl_mean:.4g}{interval}; the reference model computed in bf16 measures {measured.rounding:.4g}"


def change_from_reference(run: Run, grades: Grades, held_out: HeldOut) -> SignTest:
    """Compare an artifact's right answers with the reference model's, on the same held-out rows."""
    return scores.sign_test(_reference_grades(run, held_out).right, grades.right)


def gain_over_reference(run: Run, grades: Grades, held_out: HeldOut) -> dict[str, float]:
    """Points that an artifact's answers gain over the reference model's on the same held-out rows, with their paired interval."""
    reference = _reference_grades(run, held_out)
    return scores.paired_gain(reference, grades, run.recipe.evaluate.confidence, run.recipe.seed)


def _reference_grades(run: Run, held_out: HeldOut) -> Grades:
    """As `evaluate` recorded them."""
    lines = reference_answers(run)
    sample = open_task(run.recipe.task).sample([line["prediction"] for line in lines], held_out.references)
    return Grades(tuple(line["correct"] for line in lines), sample)


def check(run: Run, *names: str) -> None:
    """Raise if one of these artifacts (by default: any) failed its gate, as its present files were last measured.

    Raises:
        ParityFailed: with one line for each limit: artifact, figure, limit, and what to do. Its fields are of the first.
    """
    failures = read_evidence(run.root).failures()
    failed = [
        (name, breach) for name, breaches in failures.items() if name in (names or (name,)) for breach in breaches
    ]
    if failed:
        name, breach = failed[0]
        message = "\n".join(_line(run, *one) for one in failed)
        raise ParityFailed(message, artifact=name, gate=breach.gate, figure=breach.figure)


def _line(run: Run, name: str, breach: Breach) -> str:
    return f"{run.root}: {name} failed its gate: {breach.message}. {remedy(run, name, breach)}"
