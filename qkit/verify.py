"""The stage `verify`: each artifact against the live adapter on the held-out rows.

Per completion token of the reference answers: KL(live || artifact) and top-1 agreement; and the task's score. Measured, not yet judged.

    verify/parity.json   parity and scores by artifact
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qkit import live, model, parity, scoring
from qkit.artifacts import artifacts, open_artifact
from qkit.errors import ParityFailed
from qkit.run import Run, read_json, write_json
from qkit.runtime import Runtime
from qkit.task import open_task

CONTRACT_ROWS = 8


def run(run: Run, out: Path) -> None:
    """Compare the merged model and every export with the live adapter; never two models in memory at once."""
    held_out = scoring.read_held_out(run.need("data", "test.parquet"))
    reference = live.recorded(run, held_out.rows)
    tokenizer = model.tokenizer_of(run.recipe.model)
    distances, scores = {}, {}
    for artifact in run.progress.track(artifacts(run), "verify", 1 + len(run.recipe.export.formats)):
        run.progress.say(f"verify: {artifact.name}")
        with open_artifact(run, artifact, "verify") as runtime:
            contract = _check_contract(runtime, held_out) if hasattr(runtime, "prompt_ids") else None
            completions = _completions(run, runtime, held_out)
            measured = parity.measure(reference, runtime.score(held_out.rows))
        distances[artifact.name] = {**measured.to_dict(), "status": "measured", "prompts_equal": contract}
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        scores[artifact.name] = _score(run, texts, measured.heldout_loss, held_out)
    live.forget(run)
    write_json(out / "parity.json", {"parity": distances, "scores": scores})


def _completions(run: Run, runtime: Runtime, held_out: scoring.HeldOut) -> list[list[int]]:
    """The artifact's own greedy answers to the held-out prompts."""
    section = run.recipe.evaluate
    stop = frozenset(read_json(run.need("data", "tokens.json"))["stop"])
    return runtime.generate([row.prompt for row in held_out.rows], section.max_new_tokens, stop, section.batch_size)


def _score(run: Run, texts: Sequence[str], heldout_loss: float, held_out: scoring.HeldOut) -> dict[str, float]:
    section = run.recipe.evaluate
    right = scoring.grade(texts, held_out, open_task(run.recipe.task), section)
    return asdict(scoring.score(right, heldout_loss, section, run.recipe.seed))


def _check_contract(runtime: Any, held_out: scoring.HeldOut) -> int:
    """How many of the first rows the server renders to exactly the prompt ids that were trained on.

    Raises:
        ParityFailed: one that it renders to others.
    """
    for index, row in enumerate(held_out.rows[:CONTRACT_ROWS]):
        served = runtime.prompt_ids(held_out.messages[index], held_out.tools[index])
        if served != list(row.prompt):
            raise ParityFailed(
                f"held-out row {index}: the server's chat template makes {len(served)} prompt tokens where training saw {row.start}: "
                "the template or the tokenizer changed on the way to the server"
            )
    return min(CONTRACT_ROWS, len(held_out.rows))
