"""How far an artifact may be from the model that was trained: one limit table, and what happens beyond it.

Every figure is measured against the live adapter, but for an fp32 file's `top1` and `max_difference`: the live adapter computes in bf16, and no
fp32 artifact can agree with that to 1e-3. They are measured against the merged model that it was made from, run in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qkit import scoring
from qkit.errors import ParityFailed
from qkit.export._job import exporter, split
from qkit.parity import Parity
from qkit.recipe import Gate, Recipe
from qkit.run import Run
from qkit.show import read, read_lines

PASSED, FAILED = "passed", "failed"

EXACT = Gate(top1=1.0, max_difference=1e-3)
SIXTEEN_BIT = Gate(kl_mean=1e-3)  # measured on the quickstart: merged 0.0004, through vLLM 0.0003
QUANTIZED = Gate(kl_mean=0.1, score=True)

WORDS = {
    "kl_mean": "mean KL to the live adapter",
    "kl_p99": "99th percentile of the KL to the live adapter",
    "top1": "share of tokens with the same most likely one as the model it was made from",
    "max_difference": "largest difference of a log-probability from the model it was made from",
    "score": "score against the live adapter's on the same rows, upper end of the paired interval, in points",
    "lost": "distance to the base model no larger than to the live adapter: the fine-tune is not in it",
    "numbers": "log-probabilities that are no numbers",
    "opens": "its runtime does not open it, or does not answer",
    "contract": "conversations are not handled as in training",
}


@dataclass(frozen=True)
class Breach:
    """A limit that an artifact does not keep. `figure` and `limit` are None where the gate is no number; then `detail` says what was seen."""

    gate: str
    figure: float | None = None
    limit: float | None = None
    detail: str = ""

    @property
    def words(self) -> str:
        figures = "" if self.figure is None else f" {self.figure:.4g}"
        limit = "" if self.limit is None else f" (limit {self.limit:.4g})"
        return f"{WORDS[self.gate]}{figures}{limit}{self.detail and f': {self.detail}'}"


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
    """Every limit that is not kept. `gain`: points over the live adapter's answers to the same rows, `low` to `high`."""
    found = [Breach("lost", measured.kl_base, measured.kl_base_live)] if measured.lost else []
    for key in ("kl_mean", "kl_p99"):
        limit, figure = getattr(gate, key), getattr(measured, key)
        if limit is not None and not figure <= limit:  # a NaN is beyond any
            found.append(Breach(key, figure, limit))
    if exactness and gate.top1 is not None and exactness.top1 < gate.top1:
        found.append(Breach("top1", exactness.top1, gate.top1))
    if exactness and gate.max_difference is not None and exactness.max_difference > gate.max_difference:
        found.append(Breach("max_difference", exactness.max_difference, gate.max_difference))
    if gate.score and gain is not None and gain["high"] < 0:
        found.append(Breach("score", gain["high"], 0.0))
    return found


def gain_over_live(run: Run, right: Sequence[bool]) -> dict[str, float]:
    """Points that an artifact's answers gain over the live adapter's on the same held-out rows, with their paired interval."""
    live = [bool(line["correct"]) for line in live_answers(run)]
    return scoring.paired_gain(live, right, run.recipe.evaluate.confidence, run.recipe.seed)


def live_answers(run: Run) -> list[dict[str, Any]]:
    """The live adapter's answers as `evaluate` kept them, in the order of the held-out rows."""
    return [
        answer for answer in read_lines(run.need("evaluate", "predictions.jsonl")) if answer["artifact"] == "adapter"
    ]


# --- afterwards -----------------------------------------------------------------------------------------------------


def failures(run: Run) -> dict[str, list[Breach]]:
    """By artifact: the limits that the last `verify` found broken; nothing when it has not run."""
    entries = (read(run.folder("verify") / "parity.json") or {}).get("parity", {})
    return {
        name: [Breach(**breach) for breach in entry.get("failed", ())]
        for name, entry in entries.items()
        if entry.get("status") == FAILED
    }


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
    return f"{run.root}: {name} failed its gate: {breach.words}. {_remedy(run, name, breach)}"


def _remedy(run: Run, name: str, breach: Breach) -> str:
    """What to do about a failed gate."""
    if breach.gate == "contract":
        return "The template, the tokenizer or the generation config changed on the way; `qkit export` makes the folder again"
    if breach.gate == "opens":
        return f"When that is put right, `qkit verify {run.root}` measures again"
    if breach.gate in ("lost", "numbers"):
        return f"Nothing allows this; leave {name} out of export.formats, or see merge.base"
    rounded = " Small deltas are lost in rounding to bf16: --set merge.dtype=float16 keeps more of them, where the server runs fp16."
    value = "false" if breach.gate == "score" else f"{(breach.figure or 0) * 1.1:.2g}"
    accept = f"--set verify.gates.{name}.{breach.gate}={value}"
    if split(name)[1] and not is_exact(name) and breach.gate != "top1":
        return f"Choose a wider format in export.formats, or accept it: {accept}"
    where = f"`qkit verify A B --where` names the layer where two models part; to accept it: {accept}."
    return where + (rounded if run.recipe.merge.dtypes == ("bfloat16",) and breach.gate == "kl_mean" else "")
