"""The stage `verify`: each artifact against what was trained, computed in fp32, on the held-out rows; and against its gate.

Per completion token of the reference answers: KL(trained || artifact) and top-1 agreement; and the task's score. An artifact that fails its
gate fails no measurement: it is kept with a mark, and whoever asks for the artifact is told (`gates.check`).

    verify/parity.json   parity, gate and scores by artifact
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qkit.core.device import detect
from qkit.core.errors import MissingArtifact, ModelError, ParityFailed, ServerError
from qkit.core.files import read_json, write_json
from qkit.measure import candidates, evidence, gates
from qkit.measure import contract as measure_contract
from qkit.measure import held_out as measure_held_out
from qkit.measure import parity as measure_parity
from qkit.measure import reference as measure_reference
from qkit.measure import scores as measure_scores
from qkit.measure.answers import answered
from qkit.measure.artifacts import MERGED, Artifact, artifacts, open_artifact, rounding
from qkit.measure.parity import Parity
from qkit.plugins.runtime import RowScores, Runtime, TokenRow, open_runtime
from qkit.plugins.task import open_task
from qkit.run.directory import Run

EXACT_ROWS = 32  # what a graph changes it changes in every row


@dataclass(frozen=True)
class Measured:
    """What was seen of an artifact. `right`: which of its answers count."""

    parity: Parity
    right: tuple[bool, ...]
    exactness: gates.Exactness | None = None
    contract: tuple[measure_contract.ContractCheck, ...] = ()


def run(run: Run, out: Path) -> None:
    """Compare the merged model and every export with the reference model; never two models in memory at once.

    Raises:
        MissingArtifact: an artifact's file is not the one that its stage wrote.
    """
    _check_hashes(run)
    held_out = measure_held_out.read_held_out(run.need("data", "test.parquet"))
    distances, scores = {}, {}
    for artifact in run.progress.track(artifacts(run), "verify", 1 + len(run.recipe.export.formats)):
        run.progress.say(f"verify: {artifact.name}")
        try:
            measured = known(run, artifact, held_out) or _measure(run, artifact, held_out)
        except ParityFailed:  # its log-probabilities are none
            distances[artifact.name] = _entry(evidence.FAILED, [evidence.Breach("numbers")])
            continue
        except (ModelError, ServerError) as error:  # the others are measured all the same
            distances[artifact.name] = _entry(evidence.FAILED, [evidence.Breach("opens", detail=str(error))])
            continue
        distances[artifact.name] = _judged(run, artifact.name, measured)
        score = measure_scores.score(measured.right, measured.parity.heldout_loss, run.recipe.evaluate, run.recipe.seed)
        scores[artifact.name] = asdict(score)
    measure_reference.forget(run)
    write_json(out / "parity.json", {"parity": {**_rounding(run), **distances}, "scores": scores})


def _rounding(run: Run) -> dict[str, Any]:
    """The row of what was trained itself, computed in bf16: so far from fp32 is what no artifact can be blamed for."""
    found = next((row for row in candidates.read_table(run)["beside"] if row["name"] == candidates.APART), None)
    return {candidates.APART: {"status": None, "failed": [], **found["parity"]}} if found and found["parity"] else {}


def _check_hashes(run: Run) -> None:
    for stage in ("merge", "export"):
        if changed := run.changed(stage):
            raise MissingArtifact(
                f"{run.root / changed[0]}: not the file that the stage `{stage}` wrote (its sha256 is another): damaged, or from another run; "
                f"delete {run.folder(stage)} and `qkit {stage} {run.root}` makes it again"
            )


def known(run: Run, artifact: Artifact, held_out: measure_held_out.HeldOut) -> Measured | None:
    """What the merge stage has measured of the merged model already, when it chose it among candidates."""
    if artifact.name != MERGED:
        return None
    table = read_json(run.need("merge", candidates.FILE))
    chosen = next(row for row in table["candidates"] if row["name"] == table["chosen"])
    right = measure_scores.grade(table["texts"], held_out, open_task(run.recipe.task), run.recipe.evaluate)
    return Measured(
        Parity(**chosen["parity"]), tuple(right), contract=measure_contract.check_folder(run, artifact.path).checks
    )


def _measure(run: Run, artifact: Artifact, held_out: measure_held_out.HeldOut) -> Measured:
    """Open it once, ask all, close it."""
    reference = measure_reference.recorded(run, held_out.rows)
    with _made_from(run, artifact, held_out.rows[:EXACT_ROWS]) as source:
        exact = _Exact(source)
        with open_artifact(run, artifact, "verify") as runtime:
            checks = _contract(run, artifact, runtime)
            own = answered(run, runtime, held_out)
            scores = exact.seen(runtime.score(held_out.rows))
            measured = measure_parity.measure(reference, scores, **rounding(run, artifact))
    return Measured(measured, own.right, exact.found(), checks)


def _contract(run: Run, artifact: Artifact, runtime: Runtime) -> tuple[measure_contract.ContractCheck, ...]:
    """What the server does with conversations; of a folder that is no server's, what it would do. A folder of one file is not asked."""
    if served := getattr(runtime, "server_description", None):
        return measure_contract.check(run, served["url"], served["model"]).checks
    return measure_contract.check_folder(run, artifact.path).checks if (artifact.path / "config.json").is_file() else ()


@contextmanager
def _made_from(run: Run, artifact: Artifact, rows: Sequence[TokenRow]) -> Iterator[tuple[RowScores, ...]]:
    """What the merged model says of these rows in fp32, on disk for as long as it is wanted; nothing for what is not held to it."""
    if not gates.is_exact(artifact.name):
        yield ()
        return
    merged = run.need("merge", "config.json").parent
    with tempfile.TemporaryDirectory(dir=run.root / ".work") as folder:
        file = Path(folder) / "merged"
        with open_runtime("transformers", merged, detect(), dtype="float32") as runtime:
            count = measure_reference.write(runtime.score(rows), file)
        yield tuple(measure_reference.read(file, rows[:count]))


class _Exact:
    """Compares scores with those of the model they should equal, as they pass by."""

    def __init__(self, source: Sequence[RowScores]):
        self.source = source
        self.agreements: list[float] = []
        self.differences: list[float] = []

    def seen(self, scores: Iterable[RowScores]) -> Iterator[RowScores]:
        for index, row in enumerate(scores):
            if index < len(self.source):
                wanted = self.source[index]
                self.agreements += _same_top(wanted, row)
                self.differences.append(measure_parity.largest_difference(wanted, row) or 0.0)
            yield row

    def found(self) -> gates.Exactness | None:
        if not self.agreements:
            return None
        return gates.Exactness(sum(self.agreements) / len(self.agreements), max(self.differences))


def _same_top(wanted: RowScores, row: RowScores) -> list[bool]:
    """By token: whether the most likely one is that of `wanted`, or ties with it there within what the numbers may differ by."""
    import numpy as np

    if wanted.full is None:
        return [bool(same) for same in wanted.top1 == row.top1]
    chosen = np.take_along_axis(wanted.full, row.top1[:, None], axis=1)[:, 0]
    same: list[bool] = (chosen >= wanted.full.max(axis=1) - (gates.EXACT.max_difference or 0.0)).tolist()
    return same


def _judged(run: Run, name: str, measured: Measured) -> dict[str, Any]:
    """The artifact's entry in parity.json."""
    gate, gain = gates.gate_of(name, run.recipe), gates.gain_over_reference(run, measured.right)
    failed = gates.judge(gate, measured.parity, gain, measured.exactness)
    broken = [check for check in measured.contract if check.status == measure_contract.DIFFERS]
    failed += [evidence.Breach("contract", detail=f"{check.name}: {check.detail}") for check in broken]
    return {
        **_entry(evidence.FAILED if failed else evidence.PASSED, failed),
        **measured.parity.to_dict(),
        "gate": gate.model_dump(exclude_none=True),
        "gain": gain,
        "made_from": measured.exactness and asdict(measured.exactness),
        "contract": [asdict(check) for check in measured.contract],
    }


def _entry(status: str, failed: Sequence[evidence.Breach]) -> dict[str, Any]:
    return {"status": status, "failed": [asdict(breach) for breach in failed]}
