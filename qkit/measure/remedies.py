"""What to do when an artifact fails its gate: the advice for each gate, as far as the run's other measurements tell the cause."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qkit.core.files import read
from qkit.measure.evidence import PASSED, Breach, read_evidence
from qkit.plugins.exporter import exporter, is_quantized
from qkit.recipe.registry import MERGED, split
from qkit.run.directory import Run


@dataclass(frozen=True)
class GateRemedy:
    """`advice`: what to do about a breach of one artifact. `accepted`: the value of the gate that accepts a figure; None: no value does."""

    advice: Callable[[Run, str, Breach], str]
    accepted: Callable[[float], str] | None = None


def remedy(run: Run, name: str, breach: Breach) -> str:
    """What to do about a failed gate, and the override that accepts the figure where one does."""
    entry = REMEDIES[breach.gate]
    advice = entry.advice(run, name, breach)
    if entry.accepted is None:
        return advice
    return f"{advice} To accept it: --set verify.gates.{name}.{breach.gate}={entry.accepted(breach.figure or 0.0)}"


# --- the advice of each gate ------------------------------------------------------------------------------------------


def _too_far(run: Run, name: str, breach: Breach) -> str:
    """Advice for a distance or a score: wrong weights, or too few bits."""
    if inherited := _merged_failed(run, name):
        return inherited
    if _is_farther_than_base(run, breach):
        cause = "It is farther from the trained model than the untrained base is: rounding does not do that"
        return f"{cause}, and more bits may not help. {_leave_out(run, name)}."
    return _more_bits(run, name) if is_quantized(name) else _sixteen_bits(run, name)


def _some_rows(run: Run, name: str, _: Breach) -> str:
    cause = "Rounding does not move one row that far: some tokens, or lengths, are not computed as in training"
    return _merged_failed(run, name) or f"{cause}, and more bits may not help. {_leave_out(run, name)}."


def _not_its_source(run: Run, name: str, _: Breach) -> str:
    return f"It does not compute what it was made from, and no setting changes that. {_leave_out(run, name)}."


def _lost(run: Run, name: str, _: Breach) -> str:
    recipe = run.recipe
    if recipe.quantization.load_in_4bit and recipe.merge.base == "dequantized":
        other = "The fine-tune may survive on the base's 16-bit weights: --set merge.base=measured tries both"
        return f"No setting accepts this. {other}"
    return f"No setting accepts this. {_leave_out(run, name)}"


def _not_finite(run: Run, name: str, _: Breach) -> str:
    if "float16" in run.recipe.merge.dtypes[:1]:
        return "No setting accepts this. Values may be too large for float16: --set merge.dtype=bfloat16"
    return f"No setting accepts this. {_leave_out(run, name)}"


def _does_not_open(run: Run, _name: str, _: Breach) -> str:
    return f"After fixing that, measure again: `qkit verify {run.root}`"


def _other_conversations(run: Run, name: str, _: Breach) -> str:
    return (
        f"Its files are as the stage wrote them, so making them again changes nothing. {_leave_out(run, name)}; or, if the tokenizer, "
        "the template or a library changed after the rows were prepared, prepare and train again: `qkit run` with another --out"
    )


# --- causes -----------------------------------------------------------------------------------------------------------


def _merged_failed(run: Run, name: str) -> str:
    """Advice for what was made from a merged model that failed itself; empty otherwise."""
    if name == MERGED or MERGED not in read_evidence(run.root).failures():
        return ""
    return "The merged model that it was made from failed as well: fix that first."


def _is_farther_than_base(run: Run, breach: Breach) -> bool:
    """Whether an artifact's mean KL to the trained model is larger than that of the base model without the adapter."""
    table = read(run.folder("merge") / "candidates.json") or {}
    base = next((row["parity"] for row in table.get("beside", ()) if row["name"] == "base" and row["parity"]), None)
    return breach.gate == "kl_mean" and base is not None and (breach.figure or 0.0) > base["kl_mean"]


def _sixteen_bits(run: Run, name: str) -> str:
    if name != "vllm-adapter" and run.recipe.merge.dtypes == ("bfloat16",):
        return "bfloat16 rounds small changes away and float16 keeps more of them: --set merge.dtype=measured."
    folder = run.folder("merge") if name == MERGED else run.folder("export") / name
    return f"`qkit verify {run.root} {folder} --where` names the first layer that differs."


def _more_bits(run: Run, name: str) -> str:
    """A format of the same kind with more bits: one that this run has measured and that passed, or else the next one."""
    evidence, wider = read_evidence(run.root), _wider_formats(name)
    passed = [other for other in wider if evidence.status(other) == PASSED]
    if passed:
        return f"Its low precision costs this much; {passed[0]}, with more bits, passed: use that."
    if not wider:
        return f"Its low precision costs this much, and its kind has no wider format. {_leave_out(run, name)}."
    others = [other for other in run.recipe.export.formats if other != name]
    return (
        f"Its low precision costs this much. To export a wider one instead: {_with_formats(run, [*others, wider[0]])}."
    )


def _wider_formats(name: str) -> list[str]:
    """Formats of the same exporter with more bits, the next one first."""
    kind, variant = split(name)
    variants = [other for other in exporter(kind).VARIANTS if other != "adapter" and bits(other) > bits(variant)]
    return [other for _, other in sorted((bits(other), f"{kind}-{other}" if other else kind) for other in variants)]


def bits(variant: str) -> int:
    """Bits per weight by the name of a format's variant: int4, q8_0, w4a16, nf4, fp8, f16; 16 where the name does not tell."""
    found = re.search(r"(?:int|q|w|nf|fp|f)(\d+)", variant)
    return int(found[1]) if found else 16


# --- overrides --------------------------------------------------------------------------------------------------------


def _leave_out(run: Run, name: str) -> str:
    """The overrides without this format."""
    if name == MERGED and run.recipe.method != "lora":
        return "Keep more of what was trained: --set merge.dtype=float32"
    if name == MERGED:
        return f"Serve the adapter without merging it: {_with_formats(run, ['vllm-adapter'])}"
    return f"Leave it out: {_with_formats(run, [other for other in run.recipe.export.formats if other != name])}"


def _with_formats(run: Run, formats: Sequence[str]) -> str:
    """The overrides that export these formats and bench no other."""
    benched = run.recipe.bench.runtimes
    kept = [runtime for runtime in benched if runtime in formats or runtime not in run.recipe.export.formats]
    bench = "" if len(kept) == len(benched) else f" --set bench.runtimes=[{','.join(kept)}]"
    return f"--set export.formats=[{','.join(formats)}]{bench}"


def _at_most(figure: float) -> str:
    """A limit that this figure keeps, with 10 % of room."""
    return f"{figure * 1.1:.2g}"


def _at_least(figure: float) -> str:
    """A lower limit that this share keeps, with 1 % of room."""
    return f"{math.floor(figure * 990) / 1000:g}"


def _off(_: float) -> str:
    return "false"


REMEDIES: Mapping[str, GateRemedy] = {
    "kl_mean": GateRemedy(_too_far, _at_most),
    "kl_row": GateRemedy(_some_rows, _at_most),
    "kl_p99": GateRemedy(_too_far, _at_most),
    "top1": GateRemedy(_not_its_source, _at_least),
    "max_difference": GateRemedy(_not_its_source, _at_most),
    "score": GateRemedy(_too_far, _off),
    "lost": GateRemedy(_lost),
    "numbers": GateRemedy(_not_finite),
    "opens": GateRemedy(_does_not_open),
    "contract": GateRemedy(_other_conversations),
}
