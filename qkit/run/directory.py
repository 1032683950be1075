"""The run directory: the recipe as run, one folder per stage, and a manifest that is written by rename.

A stage works in `RUN/.work/STAGE` and its folder appears whole, last of all, so a killed stage leaves no half-truth and is run again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qkit.core.errors import MissingArtifact, RunBusy
from qkit.core.files import make_folder, read_json, sha256_of, write_text, writing
from qkit.core.progress import Progress
from qkit.recipe.load import load
from qkit.recipe.schema import Recipe

MANIFEST_VERSION = 1
OWN_FILES = {".lock", ".holder", ".work", "logs"}  # what a run that was killed in its first moments leaves
KEY = ".key"  # in a work folder: what the work is for
DECIDED = (
    "decided.json"  # in a stage's folder: what it decided where the recipe leaves it open, by the key in the recipe
)
LOCK_HELD = "QKIT_RUN_LOCK"  # a stage started by `qkit run` works under the lock of its parent


@dataclass(frozen=True)
class Output:
    """One file of a stage. Size and mtime tell cheaply that it is still the file that was hashed."""

    sha256: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class StageRecord:
    """What the manifest says of one stage. `peak_bytes` holds `predicted`, `measured` (bytes or null), `meter`, and both by `lines`.

    `sources`: by each file or folder that the recipe names and the stage read, its files. `decided`: what the recipe left open.
    """

    status: str
    key: str
    seconds: float
    started_at: str
    peak_bytes: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, Output] = field(default_factory=dict)
    sources: Mapping[str, Mapping[str, Output]] = field(default_factory=dict)
    decided: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Peak:
    """Peak memory of a stage that knows better than the meter of its own process, or that had a plan. Bytes, also by line."""

    measured: int
    meter: str
    predicted: int | None = None
    lines: Mapping[str, Mapping[str, int | None]] = field(default_factory=dict)


class Run:
    """A run directory. Reading needs no lock; a stage writes under `locked()`."""

    def __init__(self, root: Path, recipe: Recipe, progress: Progress | None = None):
        self.root = root
        self.recipe = recipe
        self.progress = progress or Progress()

    @classmethod
    def open(cls, root: Path, progress: Progress | None = None) -> Run:
        """An existing run directory, with the recipe it was made with.

        Raises:
            MissingArtifact: this is no run directory.
        """
        if not (root / "recipe.yaml").is_file():
            raise MissingArtifact(f"{root}: not a run directory (it has no recipe.yaml); `qkit run RECIPE` makes one")
        return cls(root, load(root / "recipe.yaml"), progress)

    @classmethod
    def create(cls, root: Path, recipe: Recipe, progress: Progress | None = None) -> Run:
        """A run directory for `recipe`: a new one, or one that exists and whose finished stages are kept where they still hold."""
        foreign = root.exists() and any(path.name not in OWN_FILES for path in root.iterdir())
        if foreign and not (root / "recipe.yaml").exists():
            raise MissingArtifact(f"{root}: holds other files and is not a run directory; give --out another folder")
        make_folder(root)
        return cls(root, recipe, progress)

    def folder(self, stage: str) -> Path:
        """Where a finished stage's results are."""
        return self.root / stage

    def log(self, stage: str) -> Path:
        """Where a stage's library output goes."""
        make_folder(self.root / "logs")
        return self.root / "logs" / f"{stage}.log"

    def need(self, stage: str, name: str) -> Path:
        """A file or folder that an earlier stage made.

        Raises:
            MissingArtifact: it is not there.
        """
        path = self.folder(stage) / name
        if not path.exists():
            raise MissingArtifact(f"{path} is missing: `qkit {stage} {self.root}` makes it")
        return path

    def save_recipe(self) -> None:
        """Write `recipe.yaml`, resolved."""
        write_text(self.root / "recipe.yaml", self.recipe.to_yaml())

    # --- the manifest -------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """`run.json`, or an empty one.

        Raises:
            MissingArtifact: it is damaged.
        """
        path = self.root / "run.json"
        if not path.exists():
            return {"manifest_version": MANIFEST_VERSION, "stages": {}}
        try:
            loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise MissingArtifact(
                f"{path}: is damaged ({error}); take it away (`qkit run {self.root}` then makes every stage again), or put a copy back"
            ) from None
        return loaded

    def record(self, stage: str, entry: StageRecord, environment: Mapping[str, Any]) -> None:
        """Put a stage's record into the manifest, by rename."""
        manifest = self.manifest()
        manifest["recipe_sha256"] = self.recipe.sha256()
        manifest["seed"] = self.recipe.seed
        manifest["environment"] = dict(environment)
        manifest["stages"][stage] = asdict(entry)
        write_text(self.root / "run.json", json.dumps(manifest, indent=1, sort_keys=True))

    def outputs(self, stage: str) -> dict[str, str]:
        """The files that a stage made, relative to the run directory, with their sha256; empty when it is not done."""
        entry = self.manifest()["stages"].get(stage)
        return {name: output["sha256"] for name, output in entry["outputs"].items()} if entry else {}

    def whole(self, stage: str) -> bool:
        """Whether a stage's folder, and every file in it, is still there as it was written."""
        entry = self.manifest()["stages"].get(stage)
        if entry is None or not self.folder(stage).is_dir():
            return False
        return all(_same(self.root / name, output) for name, output in entry["outputs"].items())

    def sources_changed(self, stage: str) -> bool:
        """Whether a stage would read other files today. What is not where it was read counts as unchanged: runs are copied without it."""
        if not (then := _sources(self.manifest()["stages"].get(stage, {}))):
            return False
        from qkit.run.source_files import named_files  # what `qkit plan` does not need, which is to be quick

        now = named_files(self.recipe).items()
        return any(_differ(files, then[str(named)]) for named, files in now if str(named) in then)

    def adopt(self) -> None:
        """Keep the new times of files that were copied and are what was hashed, so that they are not hashed at each look."""
        manifest = self.manifest()
        listed = [
            files for entry in manifest["stages"].values() for files in (entry["outputs"], *_sources(entry).values())
        ]
        outputs = [item for files in listed for item in files.items()]
        copied = [
            (self.root / name, output)
            for name, output in outputs
            if _same(self.root / name, output) and (self.root / name).stat().st_mtime_ns != output["mtime_ns"]
        ]
        for path, output in copied:
            output["mtime_ns"] = path.stat().st_mtime_ns
        if copied:
            write_text(self.root / "run.json", json.dumps(manifest, indent=1, sort_keys=True))

    def changed(self, stage: str) -> list[str]:
        """Files of a stage that are not as they were written, by their content; relative to the run directory."""
        made = self.outputs(stage).items()
        return [
            name for name, digest in made if not (self.root / name).is_file() or sha256_of(self.root / name) != digest
        ]

    def hash_sources(self) -> dict[str, dict[str, Output]]:
        """Hash the files on this machine that the recipe names."""
        from qkit.run.source_files import named_files

        return {
            str(named): {str(file): _output(file) for file in files}
            for named, files in named_files(self.recipe).items()
        }

    def hash_outputs(self, stage: str) -> dict[str, Output]:
        """Hash what a stage has made in its work folder, by the names that `commit` gives it.

        Not checkpoints, which are only for going on, nor the model card, which later stages add to.
        """
        work = self.root / ".work" / stage
        files = sorted(p.relative_to(work) for p in work.rglob("*") if p.is_file())
        kept = (p for p in files if "checkpoints" not in p.parts and p.name not in (KEY, "README.md"))
        return {str(Path(stage) / p): _output(work / p) for p in kept}

    # --- working in it ------------------------------------------------------------------------------------------

    def work_folder(self, stage: str, key: str, resumes: bool) -> Path:
        """The folder a stage works in: empty, but for what a killed attempt at the same work left to a stage that resumes."""
        work = self.root / ".work" / stage
        note = work / KEY
        if work.exists() and not (resumes and note.exists() and note.read_text() == key):
            shutil.rmtree(work)
        make_folder(work)
        note.write_text(key)
        return work

    def rekey(self, stage: str, key: str) -> None:
        """Let what a killed attempt left count as work on another key."""
        note = self.root / ".work" / stage / KEY
        if note.exists():
            write_text(note, key)

    def commit(self, stage: str) -> None:
        """Put the finished work folder in the place of the stage's folder; killed at any point, it is one or the other."""
        work, target = self.root / ".work" / stage, self.folder(stage)
        old = self.root / ".work" / f"{stage}.old"
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        work.rename(target)
        (target / KEY).unlink()
        shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this run directory alone.

        Raises:
            RunBusy: another process has it.
            MissingArtifact: it cannot be written.
        """
        if os.environ.get(LOCK_HELD) == str(self.root.resolve()):
            yield
            return
        import filelock

        lock = filelock.FileLock(self.root / ".lock")
        try:
            with writing(self.root):
                lock.acquire(timeout=2)  # a run that was just killed needs a moment to let go
        except filelock.Timeout:
            holder = (self.root / ".holder").read_text() if (self.root / ".holder").exists() else "unknown"
            raise RunBusy(
                f"{self.root}: process {holder} works on this run directory; wait for it, or give --out another folder"
            ) from None
        try:
            with writing(self.root):
                (self.root / ".holder").write_text(str(os.getpid()))
            yield
        finally:
            lock.release()


def stage_key(stage: str, recipe: Recipe, sections: tuple[str, ...], inputs: Mapping[str, str]) -> str:
    """What a stage's result depends on: its recipe sections and its inputs' hashes. The same key means: nothing to do."""
    dumped = recipe.model_dump(mode="json")
    what = {"stage": stage, "recipe": {name: dumped[name] for name in sections}, "inputs": dict(inputs)}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def decisions(folder: Path) -> dict[str, Any]:
    """What a stage has decided in its folder; where that cannot be read, it decides anew."""
    try:
        found: dict[str, Any] = read_json(folder / DECIDED)
    except (FileNotFoundError, ValueError):
        return {}
    return found


def _output(path: Path) -> Output:
    status = path.stat()
    return Output(sha256_of(path), status.st_size, status.st_mtime_ns)


def _sources(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a stage read; a run of an earlier version does not say."""
    found: Mapping[str, Any] = entry.get("sources", {})
    return found


def _differ(files: Sequence[Path], recorded: Mapping[str, Any]) -> bool:
    return {*map(str, files)} != recorded.keys() or not all(_same(file, recorded[str(file)]) for file in files)


def _same(path: Path, output: Mapping[str, Any]) -> bool:
    """Whether it is the file that was hashed: by size and time; in a run that was copied, where times are others, by content."""
    if not path.exists():
        return False
    status = path.stat()
    if status.st_size != output["bytes"]:
        return False
    return bool(status.st_mtime_ns == output["mtime_ns"] or _hashed(path, status.st_mtime_ns) == output["sha256"])


@functools.cache
def _hashed(path: Path, mtime_ns: int) -> str:
    """Once a process for each file as it stands."""
    return sha256_of(path)
