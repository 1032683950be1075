"""How far an artifact may be from the model that was trained: one limit table, and what happens beyond it.

A distance counts as far as it is beyond what rounding to 16 bits and the choice of rows make of a whole artifact (see parity.py): `kl_mean`
is a limit of that excess. An fp32 file's `top1` and `max_difference` are measured against the merged model that it was made from, run in fp32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qkit.core.errors import ParityFailed
from qkit.core.files import read
from qkit.measure import scores
from qkit.measure.evidence import PASSED, Breach, failures, reference_answers
from qkit.measure.parity import Parity
from qkit.plugins.exporter import exporter
from qkit.recipe.registry import split
from qkit.recipe.schema import Gate, Recipe
from qkit.run.directory import Run

EXACT = Gate(top1=1.0, max_difference=1e-3)
# Beyond rounding and chance; benchmarks/results/gates.json has what whole artifacts and broken ones measure.
SIXTEEN_BIT = Gate(kl_mean=1e-4, kl_row=0.05)
QUANTIZED = Gate(kl_mean=0.1, kl_row=2.0, score=True)


@dataclass(frozen=True)
class Exactness:
    """An fp32 artifact beside the merged model in fp32: the share of equal top tokens, the largest difference of a log-probability."""

    top1: float
    max_difference: float


def is_exact(name: str) -> bool:
    """Whether a format keeps every bit of the merged model's weights and computes in fp32."""
    return name == "onnx-fp32"


def gate_of(name: str, recipe: Recipe) -> Gate:
    """The limits of an artifact: its kind's, with what `verify.gates` says in their place."""
    own = recipe.verify.gates.get(name, Gate()).model_dump()
    return default_gate(name, recipe).model_copy(update={key: limit for key, limit in own.items() if limit is not None})


def default_gate(name: str, recipe: Recipe) -> Gate:
    """The limits of an artifact's kind."""
    kind, variant = split(name)
    if kind != "merged" and variant in exporter(kind).QUANTIZED:
        return QUANTIZED
    limits = QUANTIZED if _on_another_base(name, recipe) else SIXTEEN_BIT
    return (
        limits.model_copy(update={"top1": EXACT.top1, "max_difference": EXACT.max_difference})
        if is_exact(name)
        else limits
    )


def _on_another_base(name: str, recipe: Recipe) -> bool:
    """Whether an artifact has the base's 16-bit weights though it was trained on 4-bit ones, because it was asked for so.

    The difference is the rounding of the base to 4 bit, taken back: of one kind with the difference that rounding an artifact makes.
    """
    asked = name == "vllm-adapter" or recipe.merge.base == "16bit" or recipe.merge.choose == "score"
    return recipe.quantization.load_in_4bit and asked


def judge(
    gate: Gate, measured: Parity, gain: Mapping[str, float] | None = None, exactness: Exactness | None = None
) -> list[Breach]:
    """Every limit that is not kept. `gain`: points over the reference model's answers to the same rows, `low` to `high`."""
    found = [Breach("lost", measured.kl_base, measured.kl_base_live)] if measured.lost else []
    if is_far(gate, measured):
        found.append(Breach("kl_mean", measured.excess, gate.kl_mean, _of_which(measured)))
    if gate.kl_row is not None and measured.worst_row is not None and not measured.worst_row <= gate.kl_row:
        found.append(Breach("kl_row", measured.worst_row, gate.kl_row))
    if gate.kl_p99 is not None and not measured.kl_p99 <= gate.kl_p99:  # a NaN is beyond any
        found.append(Breach("kl_p99", measured.kl_p99, gate.kl_p99))
    if exactness and gate.top1 is not None and exactness.top1 < gate.top1:
        found.append(Breach("top1", exactness.top1, gate.top1))
    if exactness and gate.max_difference is not None and exactness.max_difference > gate.max_difference:
        found.append(Breach("max_difference", exactness.max_difference, gate.max_difference))
    if gate.score and gain is not None and gain["high"] < 0:
        found.append(Breach("score", gain["high"], 0.0))
    return found


def is_far(gate: Gate, measured: Parity) -> bool:
    """Whether the mean distance is beyond its limit by more than rounding and chance."""
    return gate.kl_mean is not None and not measured.excess <= gate.kl_mean  # a NaN is beyond any


def _of_which(measured: Parity) -> str:
    if measured.rounding is None:
        return ""
    interval = "" if measured.kl_low is None else f" ({measured.kl_low:.4g} to {measured.kl_high:.4g})"
    return f"it is {measured.kl_mean:.4g}{interval}, and the reference model itself, computed in bf16, is at {measured.rounding:.4g}"


def gain_over_reference(run: Run, right: Sequence[bool]) -> dict[str, float]:
    """Points that an artifact's answers gain over the reference model's on the same held-out rows, with their paired interval."""
    adapter_right = [bool(line["correct"]) for line in reference_answers(run)]
    return scores.paired_gain(adapter_right, right, run.recipe.evaluate.confidence, run.recipe.seed)


def check(run: Run, *names: str) -> None:
    """See that these artifacts (all, if none is named) kept their limits when they were last measured.

    Raises:
        ParityFailed: naming artifact, figure, limit, and what to do.
    """
    failed = {name: breaches for name, breaches in failures(run).items() if name in (names or (name,))}
    if failed:
        raise ParityFailed(
            "\n".join(_line(run, name, breach) for name, breaches in failed.items() for breach in breaches)
        )


def check_served(run: Run, name: str) -> None:
    """As `check`, for who wants to serve it."""
    try:
        check(run, name)
    except ParityFailed as error:
        raise ParityFailed(f"{error}\n`qkit serve --force` serves it all the same") from None


def _line(run: Run, name: str, breach: Breach) -> str:
    return f"{run.root}: {name} failed its gate: {breach.message}. {remedy(run, name, breach)}"


def remedy(run: Run, name: str, breach: Breach) -> str:
    """What to do about a failed gate: what its cause asks for, as far as what was measured of the others tells the cause."""
    if breach.gate in CAUSES:
        return CAUSES[breach.gate].format(root=run.root, name=name, leave=_leave_out(run, name))
    if breach.gate in ("lost", "numbers"):
        return f"Nothing allows this. {_other_merge(run, name, breach)}"
    return f"{_cause(run, name, breach)} To accept it: {_accept(name, breach)}"


# Gates that no figure of a model is behind.
CAUSES = {
    "contract": "Its files are as the stage wrote them, so making them again changes nothing. {leave}; or, where tokenizer, template or "
    "libraries changed since the rows were prepared, prepare and train anew: `qkit run` with another --out",
    "opens": "When that is put right, `qkit verify {root}` measures again",
}


def _leave_out(run: Run, name: str) -> str:
    """The setting without this format."""
    if name == "merged":
        return f"Serve the adapter apart: {_with_formats(run, ['vllm-adapter'])}"
    return f"Leave it out: {_with_formats(run, [other for other in run.recipe.export.formats if other != name])}"


def _with_formats(run: Run, formats: Sequence[str]) -> str:
    """The overrides that make these formats and bench no other."""
    benched = run.recipe.bench.runtimes
    kept = [runtime for runtime in benched if runtime in formats or runtime not in run.recipe.export.formats]
    bench = "" if len(kept) == len(benched) else f" --set bench.runtimes=[{','.join(kept)}]"
    return f"--set export.formats=[{','.join(formats)}]{bench}"


def _other_merge(run: Run, name: str, breach: Breach) -> str:
    """Another way to merge, where there is one that was not tried."""
    how = run.recipe
    if breach.gate == "numbers" and "float16" in how.merge.dtypes[:1]:
        return "Its numbers may be too large for float16: --set merge.dtype=bfloat16"
    if breach.gate == "lost" and how.quantization.load_in_4bit and how.merge.base == "dequantized":
        return "On the base's 16-bit weights it may survive: --set merge.base=measured tries both"
    return _leave_out(run, name)


def _cause(run: Run, name: str, breach: Breach) -> str:
    """Why it is too far, and the setting that changes that."""
    if breach.gate in ("top1", "max_difference"):
        return f"It is not what it was made from, which no setting mends. {_leave_out(run, name)}."
    if name != "merged" and MERGED_FAILS in failures(run):
        return "The merged model that it was made from failed as well: begin there."
    if _farther_than_base(run, breach) or breach.gate == "kl_row":
        return f"{_more_than_rounding(breach)}, and more bits may be as wrong. {_leave_out(run, name)}."
    if name == "merged" or not _is_quantized(name):
        return _of_sixteen_bits(run, name)
    return _wider(run, name)


def _more_than_rounding(breach: Breach) -> str:
    if breach.gate == "kl_row":
        return (
            "One row is off by more than rounding does: some tokens, or lengths, are not computed as they were trained"
        )
    return "It is farther from the trained model than the untrained base is: that is more than rounding does"


MERGED_FAILS = "merged"


def _of_sixteen_bits(run: Run, name: str) -> str:
    if name != "vllm-adapter" and run.recipe.merge.dtypes == ("bfloat16",):
        return "bfloat16 rounds small changes away, float16 keeps more of them: --set merge.dtype=measured."
    merged = run.folder("merge")
    return f"`qkit verify {run.root} {merged if name == 'merged' else run.folder('export') / name} --where` names the layer where they part."


def _is_quantized(name: str) -> bool:
    kind, variant = split(name)
    return kind != "merged" and variant in exporter(kind).QUANTIZED


def _farther_than_base(run: Run, breach: Breach) -> bool:
    """Whether an artifact is farther from what was trained than the base without the adapter is."""
    table = read(run.folder("merge") / "candidates.json") or {}
    base = next((row["parity"] for row in table.get("beside", ()) if row["name"] == "base" and row["parity"]), None)
    return breach.gate == "kl_mean" and base is not None and (breach.figure or 0.0) > base["kl_mean"]


def _wider(run: Run, name: str) -> str:
    """A format of the same kind with more bits: one that this run has measured and that passed, or the next one."""
    entries = (read(run.folder("verify") / "parity.json") or {}).get("parity", {})
    wider = _wider_formats(name)
    passed = [other for other in wider if entries.get(other, {}).get("status") == PASSED]
    if passed:
        return f"Its low bits cost this much; {passed[0]}, with more of them, passed: take that."
    named = [other for other in run.recipe.export.formats if other != name]
    if not wider:
        return f"Its low bits cost this much, and there is no wider format of its kind. {_leave_out(run, name)}."
    return f"Its low bits cost this much. A wider one in its place: {_with_formats(run, [*named, wider[0]])}."


def _wider_formats(name: str) -> list[str]:
    """Formats of the same exporter with more bits, the next one first."""
    kind, variant = split(name)
    ranks = [
        (bits(other), f"{kind}-{other}" if other else kind) for other in exporter(kind).VARIANTS if other != "adapter"
    ]
    return [other for rank, other in sorted(ranks) if rank > bits(variant)]


def bits(variant: str) -> int:
    """Of a weight in a format's variant, as its name tells: int4, q8_0, w4a16, nf4, fp8, f16; 16 where it tells none."""
    found = re.search(r"(?:int|q|w|nf|fp|f)(\d+)", variant)
    return int(found[1]) if found else 16


def _accept(name: str, breach: Breach) -> str:
    """The override that lets this figure pass, with a little room."""
    key = f"--set verify.gates.{name}.{breach.gate}"
    if breach.gate == "score":
        return f"{key}=false"
    figure = breach.figure or 0.0
    if breach.gate == "top1":  # the least share, not the most
        return f"{key}={math.floor(figure * 990) / 1000:g}"
    return f"{key}={figure * 1.1:.2g}"
