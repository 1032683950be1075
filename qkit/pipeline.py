"""Runs the stages. `run_all` starts each stage in a process of its own and skips those that are done; `execute` runs one in this process."""

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

from qkit.core import files
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
from qkit.model import provenance
from qkit.model.adapters import earlier
from qkit.plan import deployable
from qkit.plan import fit as plan_fit
from qkit.recipe import idle
from qkit.recipe.schema import Data
from qkit.report import model_card
from qkit.run.directory import LOCK_HELD, Peak, Run, StageRecord, decisions, stage_key
from qkit.run.environment import environment
from qkit.run.stages import STAGES, sections_of, stages_of
from qkit.tracking import trackers

if TYPE_CHECKING:
    from qkit.run.stages import Stage


KILLED = -9  # the return code of a process that SIGKILL ended


def status(run: Run, stage: Stage) -> str:
    """done, missing, or stale: the recipe, an input, a source file or a file of the stage itself has changed since."""
    recorded = _recorded_status(run, stage)
    return "stale" if recorded == "done" and run.sources_changed(stage.name) else recorded


def _recorded_status(run: Run, stage: Stage) -> str:
    """The status without regard to source files, which may be edited while a run continues."""
    entry = run.manifest()["stages"].get(stage.name)
    if entry is None:
        return "missing"
    return "done" if entry["key"] == _key(run, stage) and run.whole(stage.name) else "stale"


def statuses(run: Run) -> dict[str, str]:
    """The status of every stage of a run, in order."""
    return {stage.name: status(run, stage) for stage in stages_of(run.recipe)}


def _needs(run: Run, stage: Stage) -> list[Stage]:
    return [needed for needed in stages_of(run.recipe) if needed.name in stage.needs]


def _inputs(run: Run, stage: Stage) -> dict[str, str]:
    inputs = {name: digest for needed in _needs(run, stage) for name, digest in run.outputs(needed.name).items()}
    return inputs | (_earlier_adapter(run) if stage.name == "train" else {})


def _earlier_adapter(run: Run) -> dict[str, str]:
    """The content of the adapter that training begins with, so that another one under the same name counts."""
    named = run.recipe.lora.init_from
    if named is None:
        return {}
    try:
        return {"lora.init_from": provenance.adapter_sha256(earlier.folder_of(named))}
    except MissingArtifact:  # a finished training no longer needs it, and has recorded it
        note = files.read(run.folder("train") / "adapter" / provenance.NOTE) or {}
        return {"lora.init_from": note["init_from"]["sha256"]} if "init_from" in note else {}


def _key(run: Run, stage: Stage) -> str:
    return stage_key(stage.name, run.recipe, sections_of(stage, run.recipe), _inputs(run, stage))


def execute(run: Run, name: str) -> None:
    """Run one stage in this process: check its inputs, run it, write the manifest, then move the result into place.

    Raises:
        MissingArtifact: an earlier stage has not been run, or its files have changed since.
        UserError: an error that the user can fix; earlier results are untouched.
        OutOfMemory: the stage ran out of memory; a stage that resumes keeps its work.
        StageFailed: any other error.
    """
    stage = STAGES[name]
    with run.locked():
        if run.log(name).exists():
            os.truncate(run.log(name), 0)
        run.save_recipe()
        run.refresh_mtimes()
        _check_inputs(run, stage)
        _warn_of_idle_values(run, stage)
        record = _measured(run, stage)
        # The manifest first: it does not count until the files are in place, and after a kill in between there is work to continue from.
        run.record(name, record, environment(detect().to_dict()))
        run.commit(name)
        if stage.extends_card:
            model_card.write(run)


def _measured(run: Run, stage: Stage) -> StageRecord:
    """Run the stage in its work folder. Returns its record: time, memory, hashes."""
    key, inputs = _key(run, stage), _inputs(run, stage)
    # Sources are hashed before they are read, so that a change from here on is noticed.
    sources = run.hash_sources() if stage.reads_sources else {}
    work = run.work_folder(stage.name, key, stage.resumes)
    meter = PeakMeter(detect())
    started, begin = datetime.now(UTC), time.perf_counter()
    peak = _call(run, stage.name, work) or Peak(meter.peak_bytes(), meter.meter)
    return StageRecord(
        status="done",
        key=key,
        seconds=time.perf_counter() - begin,
        started_at=started.isoformat(timespec="seconds"),
        peak_bytes=asdict(peak),
        inputs=inputs,
        outputs=run.hash_outputs(stage.name),
        sources=sources,
        decided=decisions(work),
    )


def _warn_of_idle_values(run: Run, stage: Stage) -> None:
    """Warn of recipe values that have no effect, in the stage that they belong to."""
    for key, text in idle.remarks(run.recipe):
        if key[0] == stage.name or (key[0] == "quantization" and stage.name == "train"):
            run.progress.notify(f"{stage.name}: warning: {text}")


def _check_inputs(run: Run, stage: Stage) -> None:
    for needed in _needs(run, stage):
        recorded = _recorded_status(run, needed)
        if recorded != "done":
            problem = "has not been run" if recorded == "missing" else "is out of date"
            raise MissingArtifact(
                f"{run.root}: `{stage.name}` needs the stage `{needed.name}`, which {problem}: "
                f"`qkit run {run.root}` runs everything that is missing, `qkit {needed.name} {run.root}` only this stage"
            )


def _call(run: Run, name: str, work: Path) -> Peak | None:
    """Call the stage's `run` and translate errors of libraries."""
    try:
        peak: Peak | None = importlib.import_module(f"qkit.{name}.stage").run(run, work)
        return peak
    except QkitError:
        raise
    except Exception as error:
        import logging

        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise DoesNotFit(
                f"{name}: no space left on the disk of {run.root}; free some space, or set --out to a folder on another disk"
            ) from error

        logging.getLogger("qkit").exception("stage %s failed", name)
        text = f"{type(error).__name__}: {error}".strip()
        if out_of_memory(error):
            reason = f"out of memory: {text.splitlines()[0]}; {plan_fit.shortage(run.recipe, name, detect())}"
            raise OutOfMemory(name, run.root, run.log(name), reason) from error
        raise StageFailed(name, run.root, run.log(name), text[:2000]) from error


# --- all of them ----------------------------------------------------------------------------------------------------


def run_all(run: Run, options: Sequence[str] = (), fit: bool = False) -> list[str]:
    """Run every stage that is not done, each in a process of its own. Returns the names of the stages that ran.

    `options`: passed on to each process. `fit`: a training that runs out of memory continues from its last checkpoint with a recipe that
    needs less, which then becomes the run's recipe.

    Raises:
        RecipeError: before any stage, if the recipe holds out no rows to score the result on.
        MissingExtra: before any stage, if the package of a tracker is missing.
        DataError: before training, if the data stage left no such rows.
        NotDeployable: before any stage, if a format of the recipe is known not to work.
        StageFailed, UserError: as reported by the stage's process.
        ParityFailed: after all stages, if an artifact failed its gate.
    """
    done = []
    plan_fit.check(run.recipe, detect())
    _check_held_out(run.recipe.data)
    deployable.check(run.recipe)
    trackers.check(run.recipe)
    with run.locked():
        run.save_recipe()
        run.refresh_mtimes()
        with _Server(run, options) as server:
            for stage in stages_of(run.recipe):
                if stage.reads_server:
                    server.stop()
                if status(run, stage) == "done":
                    continue
                done.append(stage.name)
                run = _run_stage(run, stage, server, options, fit)
    gates.check(run)
    return done


def _run_stage(run: Run, stage: Stage, server: _Server, options: Sequence[str], fit: bool) -> Run:
    """Run one stage of `run_all`. Returns the run, whose recipe `fit` may have changed."""
    if stage.is_server:
        server.start()
        if not server.stays_up:
            server.stop()
        return run
    if stage.uses_server and server.stays_up:
        server.start()
    if stage.needs_test_rows:
        _check_test_rows(run)
    if stage.can_shrink and fit:
        return plan_fit.train(run, lambda smaller: _start(smaller, stage.name, options), _rekey)
    _start(run, stage.name, options)
    return run


HOLD_OUT = "set data.test to a source, or split the rows: data.split={train: 0.95, test: 0.05}"


def _check_held_out(data: Data) -> None:
    if not data.test and not (data.split and data.split.test):
        raise RecipeError(
            "the recipe holds out no rows, so the result cannot be evaluated: "
            f"{HOLD_OUT}; `qkit train` alone works without them"
        )


def _check_test_rows(run: Run) -> None:
    summary = run.folder("data") / "summary.json"
    if summary.exists() and not read_json(summary)["splits"]["test"]["rows"]:
        raise DataError(
            f"{run.root}: data.test has no rows left, so the result cannot be evaluated: {HOLD_OUT}; "
            f"`qkit inspect {run.root}` shows why each row was dropped"
        )


class _Server:
    """`qkit serve` as a child process. It is started when first needed; `stop` ends it, and it then writes its record."""

    def __init__(self, run: Run, options: Sequence[str]):
        self.run = run
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None
        # Where there is room for a server and a model at once, the stages that follow share one server.
        self.stays_up = STAGES["serve"] in stages_of(run.recipe) and detect().server_can_share_memory

    def __enter__(self) -> _Server:
        return self

    def start(self) -> None:
        """Start the server unless it is up, and wait until it is ready."""
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
        """Stop the server if it is up: close its standard input, and wait."""
        if self.process is None or self.process.stdin is None:
            return
        self.process.stdin.close()
        code = self.process.wait()
        self.process = None
        if code:
            _raise_for("serve", self.run, code)

    def __exit__(self, kind: object, *_: object) -> None:
        with contextlib.suppress(*([QkitError] if kind else [])):  # report the first error only
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
    """Save the changed recipe, and re-stamp existing checkpoints with its key."""
    run.save_recipe()
    run.rekey("train", _key(run, STAGES["train"]))


def _process(run: Run, name: str, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a stage's process. It ends when this process ends, through the pipe on its standard input."""
    argv = [sys.executable, "-m", "qkit", name, str(run.root), "--child", *options]
    env = {**os.environ, LOCK_HELD: str(run.root.resolve())}
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env)


class Reported(UserError):
    """The stage's process has already printed its error; only the exit code is passed on."""

    def __init__(self, code: int):
        super().__init__("")
        self.exit_code = code


class ReportedShortage(OutOfMemory):
    """The stage's process has already printed how much memory was missing."""

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
        return "its process was killed (SIGKILL); on Linux the usual cause is that the system ran out of memory"
    return f"its process exited with status {code}"


@contextlib.contextmanager
def captured(run: Run, name: str) -> Iterator[None]:
    """Redirect the output of libraries to the stage's log; only the command line writes to the terminal.

    The log of an earlier attempt is truncated when the stage begins, not here: another process may still be writing to it.
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
