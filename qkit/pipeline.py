"""The stages in order. `run` starts each one as a process of its own and skips what is done."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.core.device import detect, out_of_memory
from qkit.core.errors import (
    DataError,
    DoesNotFit,
    MissingArtifact,
    OutOfMemory,
    QkitError,
    RecipeError,
    StageFailed,
    UserError,
)
from qkit.core.files import make_folder, read_json, writing
from qkit.core.memory_meter import PeakMeter
from qkit.measure import gates
from qkit.plan import deployable
from qkit.plan import fit as plan_fit
from qkit.recipe import idle
from qkit.recipe.schema import Data
from qkit.report import model_card
from qkit.run.directory import LOCK_HELD, Peak, Run, StageRecord, decisions, stage_key
from qkit.run.environment import environment
from qkit.run.stages import STAGES, stages_of

if TYPE_CHECKING:
    from qkit.run.stages import Stage


KILLED = -9  # SIGKILL, as a process's status
CARDED = ("merge", "export", "verify", "bench", "report")  # after these the model card has something new to say


def status(run: Run, stage: Stage) -> str:
    """done, stale (the recipe, an input or a file that the recipe names changed since, or a file of its own is gone), or missing."""
    found = _left(run, stage)
    return "stale" if found == "done" and run.sources_changed(stage.name) else found


def _left(run: Run, stage: Stage) -> str:
    """The status of what a stage left, whatever became of the files that it read: those may be edited while a run goes on."""
    entry = run.manifest()["stages"].get(stage.name)
    if entry is None:
        return "missing"
    return "done" if entry["key"] == _key(run, stage) and run.whole(stage.name) else "stale"


def statuses(run: Run) -> dict[str, str]:
    """Status of every stage of the run's recipe, in order."""
    return {stage.name: status(run, stage) for stage in stages_of(run.recipe)}


def _needs(run: Run, stage: Stage) -> list[Stage]:
    return [needed for needed in stages_of(run.recipe) if needed.name in stage.needs]


def _inputs(run: Run, stage: Stage) -> dict[str, str]:
    return {name: digest for needed in _needs(run, stage) for name, digest in run.outputs(needed.name).items()}


def _key(run: Run, stage: Stage) -> str:
    return stage_key(stage.name, run.recipe, stage.sections, _inputs(run, stage))


def execute(run: Run, name: str) -> None:
    """Run one stage in this process: check its inputs, work, write the manifest, then put the result in place.

    Raises:
        MissingArtifact: an earlier stage has not been run, or its files were changed since.
        UserError: what the stage found wrong; earlier results are untouched.
        OutOfMemory: it ran out of memory; what a stage that resumes has done so far is kept.
        StageFailed: anything else.
    """
    stage = STAGES[name]
    with run.locked():
        if run.log(name).exists():
            os.truncate(run.log(name), 0)
        run.save_recipe()
        run.adopt()
        _check_inputs(run, stage)
        _remark(run, stage)
        key, inputs = _key(run, stage), _inputs(run, stage)
        sources = (
            run.hash_sources() if stage.reads_sources else {}
        )  # before they are read: a change from here on is seen
        work = run.work_folder(name, key, stage.resumes)
        meter = PeakMeter(detect())
        started, begin = datetime.now(UTC), time.perf_counter()
        peak = _call(run, name, work) or Peak(meter.peak_bytes(), meter.meter)
        record = StageRecord(
            status="done",
            key=key,
            seconds=time.perf_counter() - begin,
            started_at=started.isoformat(timespec="seconds"),
            peak_bytes=asdict(peak),
            inputs=inputs,
            outputs=run.hash_outputs(name),
            sources=sources,
            decided=decisions(work),
        )
        # First the record, which says nothing while its files are not there: a kill in between leaves work to go on from.
        run.record(name, record, environment(detect().to_dict()))
        run.commit(name)
        if name in CARDED:
            model_card.write(run)


def _remark(run: Run, stage: Stage) -> None:
    """Say which values of the recipe nothing uses, in the stage that they are written for."""
    for key, text in idle.remarks(run.recipe):
        if key[0] == stage.name or (key[0] == "quantization" and stage.name == "train"):
            run.progress.say(f"{stage.name}: warning: {text}")


def _check_inputs(run: Run, stage: Stage) -> None:
    for needed in _needs(run, stage):
        found = _left(run, needed)
        if found != "done":
            what = "has not been run" if found == "missing" else "is out of date"
            raise MissingArtifact(
                f"{run.root}: `{stage.name}` needs the stage `{needed.name}`, which {what}: "
                f"`qkit run {run.root}` does all that is missing, `qkit {needed.name} {run.root}` this one"
            )


def _call(run: Run, name: str, work: Path) -> Peak | None:
    """The stage's own `run`, with foreign errors turned into ours."""
    try:
        peak: Peak | None = importlib.import_module(f"qkit.{name}.stage").run(run, work)
        return peak
    except QkitError:
        raise
    except Exception as error:
        import logging

        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise DoesNotFit(
                f"{name}: no space left on the disk of {run.root}; free some, or give --out another disk"
            ) from error

        logging.getLogger("qkit").exception("stage %s failed", name)
        text = f"{type(error).__name__}: {error}".strip()
        if out_of_memory(error):
            reason = f"out of memory: {text.splitlines()[0]}; {plan_fit.shortage(run.recipe, name, detect())}"
            raise OutOfMemory(name, run.root, run.log(name), reason) from error
        raise StageFailed(name, run.root, run.log(name), text[:2000]) from error


# --- all of them ----------------------------------------------------------------------------------------------------


def run_all(run: Run, options: Sequence[str] = (), fit: bool = False) -> list[str]:
    """Run every stage that is not done, each in a process of its own; returns the names of those that ran.

    `fit`: a training that runs out of memory goes on from its last checkpoint with a recipe that needs less, which is then the run's.

    Raises:
        RecipeError: before anything is done, when the recipe holds no rows out to score the result on.
        DataError: before anything is trained, when its rows leave none to score the result on.
        NotDeployable: before anything is done, when a format that the recipe names is known not to work.
        StageFailed, UserError: as the stage's own process reported it.
        ParityFailed: every stage is done, and an artifact failed its gate.
    """
    done = []
    plan_fit.check(run.recipe, detect())
    _check_held_out(run.recipe.data)
    deployable.check(run.recipe)
    with run.locked():
        run.save_recipe()
        run.adopt()
        serves, beside = STAGES["serve"] in stages_of(run.recipe), detect().server_can_share_memory
        with _Server(run, options) as server:
            for stage in stages_of(run.recipe):
                if stage.name == "report" or status(run, stage) == "done":
                    continue
                done.append(stage.name)
                if stage.name == "serve" or (stage.name in SERVED and serves and beside):
                    server.start()
                if stage.name == "train":
                    _check_test_rows(run)
                if stage.name == "train" and fit:
                    run = plan_fit.train(run, lambda given: _start(given, "train", options), _rekey)
                elif stage.name != "serve":
                    _start(run, stage.name, options)
                elif not beside:
                    server.stop()
        if status(run, STAGES["report"]) != "done":
            _start(run, "report", options)
            done.append("report")
    gates.check(run)
    return done


HOLD_OUT = "give data.test a source, or divide the rows: data.split={train: 0.95, test: 0.05}"


def _check_held_out(data: Data) -> None:
    if not data.test and not (data.split and data.split.test):
        raise RecipeError(
            "the recipe names no rows to score the result on, so `qkit run` would train and then stop: "
            f"{HOLD_OUT}; `qkit train` alone does without"
        )


def _check_test_rows(run: Run) -> None:
    summary = run.folder("data") / "summary.json"
    if summary.exists() and not read_json(summary)["splits"]["test"]["rows"]:
        raise DataError(
            f"{run.root}: no row is left in data.test to score the result on, so nothing is trained: {HOLD_OUT}; "
            f"`qkit inspect {run.root}` says what became of them"
        )


SERVED = ("verify", "bench")  # these ask a server; one that is up already is used by both


class _Server:
    """`qkit serve` as a child, started when first wanted; at the end, or by `stop`, it ends the server and writes its record."""

    def __init__(self, run: Run, options: Sequence[str]):
        self.run = run
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Server:
        return self

    def start(self) -> None:
        """Start it unless it is up, and wait until it says that it is ready."""
        if self.process is not None:
            return
        ready = self.run.root / ".work" / "serve" / "server.json"
        ready.unlink(missing_ok=True)
        self.process = _process(self.run, "serve", self.options)
        while not ready.exists():
            if self.process.poll() is not None:
                _raise_for("serve", self.run, self.process.returncode)
            time.sleep(0.1)

    def stop(self) -> None:
        """Close its standard input, and wait."""
        if self.process is None or self.process.stdin is None:
            return
        self.process.stdin.close()
        code = self.process.wait()
        self.process = None
        if code:
            _raise_for("serve", self.run, code)

    def __exit__(self, kind: object, *_: object) -> None:
        with contextlib.suppress(*([QkitError] if kind else [])):  # the first error is the one to tell
            self.stop()


def _start(run: Run, name: str, options: Sequence[str]) -> None:
    process = _process(run, name, options)
    try:
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if code:
        _raise_for(name, run, code)


def _rekey(run: Run) -> None:
    """Make the changed recipe the run's, and the checkpoints that are there its own."""
    run.save_recipe()
    run.rekey("train", _key(run, STAGES["train"]))


def _process(run: Run, name: str, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """A stage's process; it ends when we do, by the pipe on its standard input."""
    argv = [sys.executable, "-m", "qkit", name, str(run.root), "--child", *options]
    env = {**os.environ, LOCK_HELD: str(run.root.resolve())}
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env)


class Reported(UserError):
    """The stage's process has already said what was wrong; only its exit code is left to hand on."""

    def __init__(self, code: int):
        super().__init__("")
        self.exit_code = code


class ReportedShortage(OutOfMemory):
    """The stage's process has already said what memory it lacked."""

    def __str__(self) -> str:
        return ""


def _raise_for(name: str, run: Run, code: int) -> None:
    if code in (1, 2):
        raise Reported(code)
    if code == OutOfMemory.exit_code:
        raise ReportedShortage(name, run.root, run.log(name), "out of memory")
    if code == KILLED and name == "train":
        reason = f"{_death(code)}; {plan_fit.shortage(plan_fit.settled(run), name, detect())}"
        raise OutOfMemory(name, run.root, run.log(name), reason)
    raise StageFailed(name, run.root, run.log(name), _death(code))


def _death(code: int) -> str:
    if code == KILLED:
        return "its process was killed (SIGKILL); on Linux that is most often the system running out of memory"
    return f"its process ended with status {code}"


@contextlib.contextmanager
def captured(run: Run, name: str) -> Iterator[None]:
    """Send what libraries print to the stage's log; the command line keeps the terminal for itself.

    What an earlier attempt has written there goes when the stage begins: until then another process may be writing.
    """
    make_folder(run.root)
    with writing(run.log(name)):
        log = os.open(run.log(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    saved = os.dup(1), os.dup(2)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, source in zip((1, 2), saved, strict=True):
            os.dup2(source, target)
            os.close(source)
        os.close(log)
