"""The stage `verify`: measures each artifact against the reference model on the held-out rows, and applies its gate.

Per completion token of the reference answers: KL(reference || artifact) and top-1 agreement; and the task's score. The stage completes even if
an artifact fails its gate: the failure is recorded, and `gates.check` raises it.

    verify/parity.json   parity, gate and scores by artifact
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qkit.core.device import detect
from qkit.core.errors import MissingArtifact, ModelError, ParityFailed, ServerError
from qkit.core.files import read_json, write_json
from qkit.measure import candidates, evidence, gates, label_contract
from qkit.measure import contract as measure_contract
from qkit.measure import held_out as measure_held_out
from qkit.measure import parity as measure_parity
from qkit.measure import reference as measure_reference
from qkit.measure import scores as measure_scores
from qkit.measure.answers import answered, further_figures
from qkit.measure.artifacts import Artifact, artifacts, open_artifact, rounding
from qkit.measure.parity import Parity
from qkit.measure.scores import Grades
from qkit.plugins.exporter import is_exact
from qkit.plugins.runtime import RowScores, Runtime, TokenRow, open_runtime
from qkit.plugins.task import open_task
from qkit.recipe.registry import MERGED, is_unmerged
from qkit.run.directory import Run

EXACT_ROWS = 32  # a wrong graph shows in every row, and each row more is scored by a second model, in fp32


@dataclass(frozen=True)
class ArtifactMeasurement:
    """What was measured of an artifact. `grades`: of its answers, by held-out row; `further`: the task's other figures."""

    parity: Parity
    grades: Grades
    further: Mapping[str, Any]
    exactness: gates.Exactness | None = None
    contract: tuple[measure_contract.ContractCheck, ...] = ()


def run(run: Run, out: Path) -> None:
    """Compare the merged model and every export with the reference model. One model is in memory at a time.

    Raises:
        MissingArtifact: an artifact's file changed after its stage wrote it.
    """
    _check_hashes(run)
    held_out = measure_held_out.held_out_of(run)
    distances, scores = {}, {}
    for artifact in run.progress.track(artifacts(run), "verify", 1 + len(run.recipe.export.formats)):
        run.progress.notify(f"verify: {artifact.name}")
        try:
            measured = known(run, artifact, held_out) or _measure(run, artifact, held_out)
        except ParityFailed:  # NaN or infinite log-probabilities
            distances[artifact.name] = _entry(evidence.FAILED, [evidence.Breach("numbers")])
            continue
        except (ModelError, ServerError) as error:  # go on with the other artifacts
            distances[artifact.name] = _entry(evidence.FAILED, [evidence.Breach("opens", detail=str(error))])
            continue
        distances[artifact.name] = _judged(run, artifact.name, measured, held_out)
        score = measure_scores.score(
            measured.grades, measured.parity.heldout_loss, run.recipe.evaluate, run.recipe.seed
        )
        scores[artifact.name] = asdict(score) | ({"metrics": measured.further} if measured.further else {})
    measure_reference.forget(run)
    write_json(out / "parity.json", {"parity": {**_rounding(run), **distances}, "scores": scores})


def _rounding(run: Run) -> dict[str, Any]:
    """The entry of the reference model computed in bf16: a distance that rounding alone causes. It has no gate."""
    if is_unmerged(run.recipe):  # nothing was merged, and so nothing measured beside it
        return {}
    rows = candidates.read_table(run)["beside"]
    parity = next((row["parity"] for row in rows if row["name"] == candidates.ADAPTER), None)
    return {run.recipe.trained_as: {"status": None, "failed": [], **parity}} if parity else {}


def _check_hashes(run: Run) -> None:
    for stage in ("merge", "export"):
        if changed := run.changed(stage):
            path = run.root / changed[0]
            raise MissingArtifact(
                f"{path}: its sha256 is not that of the file that the stage `{stage}` wrote: it is damaged, or from another run. "
                f"Delete {run.folder(stage)}, and `qkit {stage} {run.root}` makes it again",
                path=path,
            )


def known(run: Run, artifact: Artifact, held_out: measure_held_out.HeldOut) -> ArtifactMeasurement | None:
    """What the stage `merge` measured of the merged model when it chose it among the candidates; None for an export."""
    if artifact.name != MERGED:
        return None
    table = read_json(run.need("merge", candidates.FILE))
    chosen = next(row for row in table["candidates"] if row["name"] == table["chosen"])
    grades = measure_scores.grade(table["texts"], held_out, open_task(run.recipe.task), run.recipe.evaluate)
    contract = _contract_of(run)(run, artifact.path)
    further = (chosen["score"] or {}).get("metrics", {})
    return ArtifactMeasurement(Parity(**chosen["parity"]), grades, further, contract=contract.checks)


def _measure(run: Run, artifact: Artifact, held_out: measure_held_out.HeldOut) -> ArtifactMeasurement:
    """Open the artifact once, and measure everything."""
    reference = measure_reference.recorded(run, held_out.rows)
    task = open_task(run.recipe.task)
    with _source(run, artifact, held_out.rows[:EXACT_ROWS]) as source:
        distances, exactness = (
            measure_parity.ArtifactDistances(reference),
            ExactnessMeter(source, task.GATES["exact"].max_difference or 0.0),
        )
        with open_artifact(run, artifact, "verify") as runtime:
            contract = _contract(run, artifact, runtime)
            answers = answered(run, runtime, held_out)
            for row in task.outputs(runtime, held_out.rows):
                distances.add(row)
                exactness.add(row)
            parity = distances.parity(**rounding(run, artifact))
    further = further_figures(run, answers, held_out)
    return ArtifactMeasurement(parity, answers.grades, further, exactness.result(), contract)


def _contract_of(run: Run) -> Callable[[Run, Path], measure_contract.Contract]:
    """The check of a folder that belongs to the task's kind of head."""
    head = open_task(run.recipe.task).HEAD
    return measure_contract.check_folder if head.generates else label_contract.check_folder


def _contract(run: Run, artifact: Artifact, runtime: Runtime) -> tuple[measure_contract.ContractCheck, ...]:
    """What the server does with conversations; for a folder, what a server would do. A folder without a config.json is not checked."""
    if served := getattr(runtime, "server_description", None):
        return measure_contract.check(run, served["url"], served["model"]).checks
    return _contract_of(run)(run, artifact.path).checks if (artifact.path / "config.json").is_file() else ()


@contextmanager
def _source(run: Run, artifact: Artifact, rows: Sequence[TokenRow]) -> Iterator[tuple[RowScores, ...]]:
    """The scores of these rows, in fp32, of what an exact artifact was made from; none if the artifact is not exact.

    The merged model's are on disk while the context is open.
    """
    if not is_exact(artifact.name):
        yield ()
        return
    if is_unmerged(run.recipe):  # the file is made from base and adapter, which the reference model computes in fp32
        yield measure_reference.recorded(run, measure_held_out.held_out_of(run).rows).scores[: len(rows)]
        return
    merged, task = run.need("merge", "config.json").parent, open_task(run.recipe.task)
    with tempfile.TemporaryDirectory(dir=run.root / ".work") as folder:
        file = Path(folder) / "merged"
        with open_runtime("transformers", merged, detect(), dtype="float32", head=task.HEAD) as runtime:
            measure_reference.write(task.outputs(runtime, rows), file)
        yield tuple(measure_reference.read(file))


class ExactnessMeter:
    """Compares scores, row by row, with those of the model that they should equal; rows beyond these are ignored."""

    def __init__(self, source: Sequence[RowScores], tie: float):
        self.source = source
        self.tie = tie
        self.agreements: list[bool] = []
        self.differences: list[float] = []

    def add(self, row: RowScores) -> None:
        """The scores of the next row."""
        if len(self.differences) < len(self.source):
            wanted = self.source[len(self.differences)]
            self.agreements += _same_top(wanted, row, self.tie)
            self.differences.append(measure_parity.largest_difference(wanted, row) or 0.0)

    def result(self) -> gates.Exactness | None:
        """None if there was nothing to compare with."""
        if not self.agreements:
            return None
        top1 = sum(self.agreements) / len(self.agreements)
        return gates.Exactness(top1, max(self.differences), rows=len(self.differences))


def _same_top(wanted: RowScores, row: RowScores, tie: float) -> list[bool]:
    """By token: whether the most likely token is that of `wanted`, or is as likely there within `tie` nats: a tie is not a difference."""
    import numpy as np

    if wanted.full is None:
        return [bool(same) for same in wanted.top1 == row.top1]
    chosen = np.take_along_axis(wanted.full, row.top1[:, None], axis=1)[:, 0]
    same: list[bool] = (chosen >= wanted.full.max(axis=1) - tie).tolist()
    return same


def _judged(run: Run, name: str, measured: ArtifactMeasurement, held_out: measure_held_out.HeldOut) -> dict[str, Any]:
    """The artifact's entry in parity.json."""
    gate, change = gates.gate_of(name, run.recipe), gates.change_from_reference(run, measured.grades, held_out)
    failed = gates.judge(gate, measured.parity, change, measured.exactness, run.recipe.evaluate.confidence)
    broken = [check for check in measured.contract if check.status == measure_contract.DIFFERS]
    failed += [evidence.Breach("contract", detail=f"{check.name}: {check.detail}") for check in broken]
    return {
        **_entry(evidence.FAILED if failed else evidence.PASSED, failed),
        **measured.parity.to_dict(),
        "gate": gate.model_dump(exclude_none=True),
        "gain": {**gates.gain_over_reference(run, measured.grades, held_out), **change.to_dict()},
        "made_from": measured.exactness and asdict(measured.exactness),
        "contract": [asdict(check) for check in measured.contract],
    }


def _entry(status: str, failed: Sequence[evidence.Breach]) -> dict[str, Any]:
    return {"status": status, "failed": [asdict(breach) for breach in failed]}
