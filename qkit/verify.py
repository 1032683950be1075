"""The stage `verify`: each artifact against the live adapter on the held-out rows.

Per completion token of the reference answers: KL(live || artifact) and top-1 agreement; and the task's score. Measured, not yet judged.

    verify/parity.json   parity and scores by artifact
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit import model, scoring
from qkit.artifacts import artifacts, open_artifact
from qkit.device import detect
from qkit.errors import ParityFailed
from qkit.run import Run, need_disk, read_json, write_json
from qkit.runtime import Row, RowScores, Runtime, open_runtime
from qkit.task import open_task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONTRACT_ROWS = 8
LIVE_BYTES = 4 * 2**30  # parity is measured on as many rows as the live model's log-probabilities fit here


def run(run: Run, out: Path) -> None:
    """Compare the merged model and every export with the live adapter; never two models in memory at once."""
    held_out = scoring.read_held_out(run.need("data", "test.parquet"))
    live = _record_live(run, held_out.rows, out / "live.f32")
    tokenizer = model.tokenizer_of(run.recipe.model)
    parity, scores = {}, {}
    for artifact in run.progress.track(artifacts(run), "verify", 1 + len(run.recipe.export.formats)):
        run.progress.say(f"verify: {artifact.name}")
        with open_artifact(run, artifact, "verify") as runtime:
            contract = _check_contract(runtime, held_out) if hasattr(runtime, "prompt_ids") else None
            completions = _completions(run, runtime, held_out)
            parity[artifact.name], losses = _parity(live, runtime.score(held_out.rows))
        parity[artifact.name]["prompts_equal"] = contract
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        scores[artifact.name] = _score(run, texts, losses, held_out)
    (out / "live.f32").unlink()
    write_json(out / "parity.json", {"parity": parity, "scores": scores})


def _record_live(run: Run, rows: Sequence[Row], file: Path) -> list[RowScores]:
    """The live adapter's log-probabilities over the whole vocabulary, on disk, for the first rows that fit LIVE_BYTES."""
    folder, adapter = model.resolve(run.recipe.model), run.need("train", "adapter")
    run.progress.say("verify: the live adapter")
    with open_runtime("transformers", folder, detect(), recipe=run.recipe, adapter=adapter) as runtime:
        return list(_recorded(runtime.score(rows), file))


def _recorded(scores: Iterator[RowScores], file: Path) -> Iterator[RowScores]:
    import numpy as np

    need_disk(file.parent, LIVE_BYTES, "verify")
    begin = 0
    for row in scores:
        assert row.full is not None
        if begin + row.full.nbytes > LIVE_BYTES:
            return
        with file.open("ab") as sink:
            sink.write(row.full.tobytes())
        yield replace(row, full=np.memmap(file, np.float32, "r", begin, row.full.shape))
        begin += row.full.nbytes


def _completions(run: Run, runtime: Runtime, held_out: scoring.HeldOut) -> list[list[int]]:
    """The artifact's own greedy answers to the held-out prompts."""
    section = run.recipe.evaluate
    stop = frozenset(read_json(run.need("data", "tokens.json"))["stop"])
    return runtime.generate([row.prompt for row in held_out.rows], section.max_new_tokens, stop, section.batch_size)


def _score(
    run: Run, texts: Sequence[str], losses: list[NDArray[np.float32]], held_out: scoring.HeldOut
) -> dict[str, float]:
    section = run.recipe.evaluate
    right = scoring.grade(texts, held_out, open_task(run.recipe.task), section)
    return asdict(scoring.score(right, losses, section, run.recipe.seed))


def _parity(live: Sequence[RowScores], others: Iterator[RowScores]) -> tuple[dict[str, Any], list[NDArray[np.float32]]]:
    """Mean and 99th percentile KL and top-1 agreement with the live adapter; and the artifact's own token log-probabilities."""
    import numpy as np

    divergences, agreements, targets, over = [], [], [], ""
    for index, other in enumerate(others):
        targets.append(other.targets)
        over = "all tokens" if other.top is None else f"the server's top {other.top.shape[1]} and the rest as one"
        if index < len(live):
            divergences.append(scoring.divergence(live[index], other))
            agreements.append(live[index].top1 == other.top1)
    kl = np.concatenate(divergences)
    if not np.isfinite(kl).all():
        raise ParityFailed("the artifact gives log-probabilities that are no numbers: it is broken")
    figures = {
        "kl_mean": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1": float(np.concatenate(agreements).mean()),
        "status": "measured",
        "rows": len(divergences),
        "tokens": len(kl),
        "over": over,
    }
    return figures, targets


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
