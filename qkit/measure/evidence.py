"""What evaluate and verify measured of a run's artifacts, and whether that is of the files that are there now.

`read_evidence` is the only reader of evaluate/scores.json and verify/parity.json. An artifact that was made again after verify
measured it is in neither table; its name is in `stale`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.core.files import read, read_lines
from qkit.model.provenance import NOTE
from qkit.recipe.registry import BASELINES, MERGED, TRAINED
from qkit.run.directory import Run

# The verdict on an artifact: `status` in verify/parity.json, and in `qkit show --json`.
PASSED, FAILED = "passed", "failed"
STALE = "stale"  # only in `qkit show`: the files were made again after they were measured

DESCRIPTIONS = {
    "kl_mean": "mean KL to the trained model beyond rounding and chance",
    "kl_row": "mean KL of the row that is farthest from the trained model, beyond rounding",
    "kl_p99": "99th percentile of the KL to the trained model",
    "top1": "share of tokens with the same most likely token as the model it was made from",
    "max_difference": "largest difference of a log-probability from the model it was made from",
    "score": "score compared with the reference model's on the same rows, in points",
    "lost": "closer to the base model than to the trained one, by more than chance: the fine-tune is lost",
    "numbers": "NaN or infinite log-probabilities",
    "opens": "its runtime cannot open it, or does not answer",
    "contract": "conversations are not handled as in training",
}


@dataclass(frozen=True)
class Breach:
    """A limit that an artifact breaks. `figure` and `limit` are None for a gate without a number; `detail` then says what was observed."""

    gate: str
    figure: float | None = None
    limit: float | None = None
    detail: str = ""

    @property
    def message(self) -> str:
        figure = "" if self.figure is None else f" {self.figure:.4g}"
        limit = "" if self.limit is None else f" (limit {self.limit:.4g})"
        return f"{DESCRIPTIONS[self.gate]}{figure}{limit}{self.detail and f': {self.detail}'}"


@dataclass(frozen=True)
class Evidence:
    """Scores and distances by artifact, only of files that are there now. Empty, or None, for what was not measured.

    `stale`: artifacts that were made again after verify measured them.
    """

    metric: str | None
    confidence: float | None
    interval: str | None
    scores: Mapping[str, Mapping[str, Any]]
    parity: Mapping[str, Mapping[str, Any]]
    stale: frozenset[str]

    def status(self, artifact: str) -> str | None:
        """The verdict on the artifact's present files; None if they were not judged."""
        return self.parity.get(artifact, {}).get("status")

    def failures(self) -> dict[str, list[Breach]]:
        """The limits that each failed artifact breaks."""
        return {
            name: [Breach(**breach) for breach in entry.get("failed", ())]
            for name, entry in self.parity.items()
            if entry.get("status") == FAILED
        }


def read_evidence(root: Path) -> Evidence:
    """Read what was measured in the run directory `root`.

    Raises:
        MissingArtifact: a file is damaged.
    """
    manifest = read(root / "run.json") or {}
    evaluated = read(root / "evaluate" / "scores.json") or {}
    verified = read(root / "verify" / "parity.json") or {}
    parity, scores = verified.get("parity", {}), verified.get("scores", {})
    stale = frozenset(name for name in (*parity, *scores) if not is_current(manifest, "verify", name))
    return Evidence(
        evaluated.get("metric"),
        evaluated.get("confidence"),
        evaluated.get("interval"),
        {**_without(scores, stale), **evaluated.get("scores", {})},
        _without(parity, stale),
        stale,
    )


def merit(evidence: Evidence, artifact: str, rule: str) -> tuple[bool, float, float]:
    """For sorting: passed comes first; then the distance to the reference model, or the score if `rule` says so.

    By default the distance decides, since a few points of a score are chance.
    """
    score = evidence.scores.get(artifact, {}).get("score", float("-inf"))
    nearness = -evidence.parity.get(artifact, {}).get("kl_mean", float("inf"))
    passed = evidence.status(artifact) == PASSED
    return (passed, score, nearness) if rule == "score" else (passed, nearness, score)


def _without(entries: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: entry for name, entry in entries.items() if name not in names}


def is_current(manifest: Mapping[str, Any], stage: str, artifact: str) -> bool:
    """Whether `stage` read the artifact's files as they are now, by the hashes that the manifest (run.json) records.

    True also where the manifest does not record the stage: then nothing says that the files changed.
    """
    reader = manifest.get("stages", {}).get(stage)
    if reader is None or artifact in (*BASELINES, *TRAINED):
        return True
    maker, folder = ("merge", "merge/") if artifact == MERGED else ("export", f"export/{artifact}/")
    outputs = manifest["stages"].get(maker, {"outputs": {}})["outputs"]
    now = {name: output["sha256"] for name, output in outputs.items() if name.startswith(folder)}
    return {name: digest for name, digest in reader["inputs"].items() if name.startswith(folder)} == now


def reference_answers(run: Run) -> list[dict[str, Any]]:
    """The reference model's answers as `evaluate` recorded them, in the order of the held-out rows."""
    lines = read_lines(run.need("evaluate", "predictions.jsonl"))
    return [answer for answer in lines if answer["artifact"] in TRAINED]


KEY = "prompts"  # in a folder's qkit.json


def differences(folder: Path) -> list[str] | None:
    """How an export's own prompts differ from training's, as its qkit.json records; None where they were not compared."""
    file = folder / NOTE
    note = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return list(note[KEY]["differ"]) if KEY in note else None


def cost_of(entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """Seconds, and peak memory in bytes (planned and measured), from a stage's entry in the manifest; null if the stage has not run."""
    peak = (entry or {}).get("peak_bytes", {})
    return {
        "seconds": (entry or {}).get("seconds"),
        "peak_bytes": {
            **{key: peak.get(key) for key in ("predicted", "measured", "meter")},
            "lines": peak.get("lines") or {},
        },
    }
