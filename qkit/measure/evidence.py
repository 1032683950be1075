"""What has been measured of a run's artifacts, and whether it is of the files that are there now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.core.files import read, read_lines
from qkit.model.provenance import NOTE
from qkit.run.directory import Run


def made_of(manifest: Mapping[str, Any], stage: str, folder: str) -> bool:
    """Whether a stage that is done read the files below `folder`, such as `export/vllm/`, as they are now."""
    done, maker = manifest["stages"].get(stage), manifest["stages"].get(folder.partition("/")[0])
    if done is None or maker is None:
        return False
    then = {(name, digest) for name, digest in done["inputs"].items() if name.startswith(folder)}
    now = {(name, output["sha256"]) for name, output in maker["outputs"].items() if name.startswith(folder)}
    return then == now


PASSED, FAILED = "passed", "failed"


WORDS = {
    "kl_mean": "mean KL to the trained model beyond rounding and chance",
    "kl_row": "mean KL of the row that is farthest from the trained model, beyond rounding",
    "kl_p99": "99th percentile of the KL to the trained model",
    "top1": "share of tokens with the same most likely one as the model it was made from",
    "max_difference": "largest difference of a log-probability from the model it was made from",
    "score": "score against the reference model's on the same rows, upper end of the paired interval, in points",
    "lost": "distance to the base model smaller than to the trained one by more than chance: the fine-tune is not in it",
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
    def message(self) -> str:
        figures = "" if self.figure is None else f" {self.figure:.4g}"
        limit = "" if self.limit is None else f" (limit {self.limit:.4g})"
        return f"{WORDS[self.gate]}{figures}{limit}{self.detail and f': {self.detail}'}"


def reference_answers(run: Run) -> list[dict[str, Any]]:
    """The reference model's answers as `evaluate` kept them, in the order of the held-out rows."""
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


KEY = "prompts"  # in a folder's qkit.json


def differences(folder: Path) -> list[str] | None:
    """What a folder's note says of it; None where nobody has looked."""
    file = folder / NOTE
    note = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return list(note[KEY]["differ"]) if KEY in note else None


@dataclass(frozen=True)
class Measured:
    """What evaluate and verify found, by artifact; None and empty where that is still to come."""

    metric: str | None
    confidence: float | None
    interval: str | None
    scores: Mapping[str, Mapping[str, Any]]
    parity: Mapping[str, Mapping[str, Any]]


def measured(run: Run) -> Measured:
    """The figures of scores.json and parity.json.

    Raises:
        MissingArtifact: a file is there and is damaged.
    """
    evaluated = read(run.folder("evaluate") / "scores.json") or {}
    verified = read(run.folder("verify") / "parity.json") or {}
    scores = {**verified.get("scores", {}), **evaluated.get("scores", {})}
    metric, confidence, interval = (evaluated.get(key) for key in ("metric", "confidence", "interval"))
    return Measured(metric, confidence, interval, scores, verified.get("parity", {}))


def cost_of(entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """Seconds and peak bytes, planned and measured, of a stage's entry in the manifest; null where it has not run."""
    peak = (entry or {}).get("peak_bytes", {})
    return {
        "seconds": (entry or {}).get("seconds"),
        "peak_bytes": {
            **{key: peak.get(key) for key in ("predicted", "measured", "meter")},
            "lines": peak.get("lines") or {},
        },
    }
