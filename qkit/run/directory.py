"""The run directory: the recipe as run, one folder per stage, and a manifest that is replaced atomically.

A stage works in `RUN/.work/STAGE`; its folder is moved into place last, so that a killed stage leaves nothing incomplete and is run again.
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
from qkit.recipe.labels import Bottleneck, Head, Layers, Loss
from qkit.recipe.load import load
from qkit.recipe.preference import Feedback, Preference
from qkit.recipe.schema import SPLITS, Recipe

MANIFEST_VERSION = 1
OWN_FILES = {".lock", ".holder", ".work", "logs"}  # files that a run killed at its start leaves
# Fields that earlier versions did not have, with the value that does what they did: a run of theirs stays up to date.
ADDED = {
    "method": "lora",
    "bottleneck": Bottleneck().model_dump(mode="json"),
    "peft": {},
    "head": Head().model_dump(mode="json"),
    "layers": Layers().model_dump(mode="json"),
    "loss.delta": 1.0,
    "loss": Loss().model_dump(mode="json", exclude={"delta"}),
    "feedback": Feedback().model_dump(mode="json"),
    "preference": Preference().model_dump(mode="json"),
    "train.bf16": True,
    "train.trainable": [],
    "lora.use_dora": False,
    "lora.init_lora_weights": True,
    "lora.init_from": None,
    "train.embedding_learning_rate": None,
    "train.lr_scheduler_kwargs": {},
    "train.optim_args": None,
    "train.adam_beta1": 0.9,
    "train.adam_beta2": 0.999,
    "train.adam_epsilon": 1e-8,
    "lora.loraplus_lr_ratio": None,
    "train.report_to": [],
    "train.run_name": None,
    "train.neftune_noise_alpha": None,
    "train.label_smoothing_factor": 0.0,
    "train.loss_type": "nll",
    "train.eval_strategy": "auto",
    "train.eval_steps": None,
    "train.eval_on_start": False,
    "train.eval_rows": None,
    "train.eval_score_rows": None,
    "train.metric_for_best_model": "loss",
    "train.load_best_model_at_end": None,
    "train.early_stopping_patience": None,
    "train.early_stopping_threshold": 0.0,
    "data.batch_rows": None,
    "data.label_separator": None,
    "data.stride": None,
    "data.weight": None,
    "evaluate.max_answer_tokens": 30,
    "evaluate.metrics": [],
}
UNTRAINED = ("report_to", "run_name")  # fields of the section train that change nothing that is trained
ADDED_TO_SOURCES = {"word_column": 0, "tag_column": -1, "delimiter": None}  # the same of each data set
KEY = ".key"  # in a work folder: the stage key that the work belongs to
DECIDED = "decided.json"  # in a stage's folder: its decisions where the recipe says `auto`, by recipe key
LOCK_HELD = "QKIT_RUN_LOCK"  # set for a stage that `qkit run` starts: it uses its parent's lock


@dataclass(frozen=True)
class Output:
    """One file of a stage. Size and mtime tell cheaply whether it is still the file that was hashed."""

    sha256: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class StageRecord:
    """The manifest's entry for a stage. `peak_bytes` has `predicted`, `measured` (bytes or null), `meter`, and both by `lines`.

    `sources`: the files read, by the file or folder that the recipe names. `decided`: decisions where the recipe says `auto`.
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
    """Peak memory in bytes, total and by line, from a stage that measures it itself or has a plan for it."""

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
        """Open an existing run directory, with its own recipe.

        Raises:
            MissingArtifact: not a run directory.
        """
        if not (root / "recipe.yaml").is_file():
            raise MissingArtifact(f"{root}: not a run directory (it has no recipe.yaml); `qkit run RECIPE` creates one")
        return cls(root, load(root / "recipe.yaml"), progress)

    @classmethod
    def create(cls, root: Path, recipe: Recipe, progress: Progress | None = None) -> Run:
        """A run directory for `recipe`: new or existing; finished stages are kept if they are still valid."""
        foreign = root.exists() and any(path.name not in OWN_FILES for path in root.iterdir())
        if foreign and not (root / "recipe.yaml").exists():
            raise MissingArtifact(
                f"{root}: contains other files and is not a run directory; set --out to another folder"
            )
        make_folder(root)
        return cls(root, recipe, progress)

    def folder(self, stage: str) -> Path:
        """The folder of a finished stage's results."""
        return self.root / stage

    def log(self, stage: str) -> Path:
        """The log file of a stage: the output of libraries."""
        make_folder(self.root / "logs")
        return self.root / "logs" / f"{stage}.log"

    def trained(self) -> Path:
        """The folder of what was trained: train/adapter, or train/model where all weights were.

        Raises:
            MissingArtifact: neither exists.
        """
        model = self.folder("train") / "model"
        return model if model.is_dir() else self.need("train", "adapter")

    def tuned(self) -> dict[str, float]:
        """The settings of predictions that `evaluate` chose with the trained model; every artifact predicts with them.

        Raises:
            MissingArtifact: nothing has been evaluated.
        """
        settings: dict[str, float] = read_json(self.need("evaluate", "scores.json")).get("tuned", {})
        return settings

    def need(self, stage: str, name: str) -> Path:
        """A file or folder made by an earlier stage.

        Raises:
            MissingArtifact: it does not exist.
        """
        path = self.folder(stage) / name
        if not path.exists():
            raise MissingArtifact(f"{path} is missing: `qkit {stage} {self.root}` creates it", path=path)
        return path

    def save_recipe(self) -> None:
        """Write the resolved recipe to `recipe.yaml`."""
        write_text(self.root / "recipe.yaml", self.recipe.to_yaml())

    # --- the manifest -------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """The content of `run.json`, or an empty manifest.

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
                f"{path} is damaged ({error}); restore a copy, or delete it (`qkit run {self.root}` then runs every stage again)",
                path=path,
            ) from None
        return loaded

    def record(self, stage: str, entry: StageRecord, environment: Mapping[str, Any]) -> None:
        """Write a stage's record to the manifest, atomically."""
        manifest = self.manifest()
        manifest["recipe_sha256"] = self.recipe.sha256()
        manifest["seed"] = self.recipe.seed
        manifest["environment"] = dict(environment)
        manifest["stages"][stage] = asdict(entry)
        write_text(self.root / "run.json", json.dumps(manifest, indent=1, sort_keys=True))

    def outputs(self, stage: str) -> dict[str, str]:
        """The sha256 of each file of a stage, by path relative to the run directory; empty if the stage is not done."""
        entry = self.manifest()["stages"].get(stage)
        return {name: output["sha256"] for name, output in entry["outputs"].items()} if entry else {}

    def whole(self, stage: str) -> bool:
        """Whether every file of a stage still exists as it was written."""
        entry = self.manifest()["stages"].get(stage)
        if entry is None or not self.folder(stage).is_dir():
            return False
        return all(_same(self.root / name, output) for name, output in entry["outputs"].items())

    def sources_changed(self, stage: str) -> bool:
        """Whether source files of a stage have changed. A missing source counts as unchanged: runs are copied without their sources."""
        recorded = _sources(self.manifest()["stages"].get(stage, {}))
        if not recorded:
            return False
        from qkit.run.source_files import named_files  # not needed by `qkit plan`, which has to start fast

        current = named_files(self.recipe).items()
        return any(_differ(files, recorded[str(named)]) for named, files in current if str(named) in recorded)

    def refresh_mtimes(self) -> None:
        """Record the new mtimes of copied files whose content is unchanged, so that they are not hashed again each time."""
        manifest = self.manifest()
        refreshed = False
        for entry in manifest["stages"].values():
            for files in (entry["outputs"], *_sources(entry).values()):
                for name, output in files.items():
                    path = self.root / name
                    if _same(path, output) and path.stat().st_mtime_ns != output["mtime_ns"]:
                        output["mtime_ns"] = path.stat().st_mtime_ns
                        refreshed = True
        if refreshed:
            write_text(self.root / "run.json", json.dumps(manifest, indent=1, sort_keys=True))

    def changed(self, stage: str) -> list[str]:
        """Files of a stage whose content has changed since they were written; paths are relative to the run directory."""
        outputs = self.outputs(stage).items()
        return [
            name
            for name, digest in outputs
            if not (self.root / name).is_file() or sha256_of(self.root / name) != digest
        ]

    def hash_sources(self) -> dict[str, dict[str, Output]]:
        """Hash the local files that the recipe names."""
        from qkit.run.source_files import named_files

        return {
            str(named): {str(file): _output(file) for file in files}
            for named, files in named_files(self.recipe).items()
        }

    def hash_outputs(self, stage: str) -> dict[str, Output]:
        """Hash the files in a stage's work folder, by the path that `commit` gives them.

        Checkpoints and the best step (only needed to resume) and the model card (which later stages extend) are left out.
        """
        work = self.root / ".work" / stage
        files = sorted(p.relative_to(work) for p in work.rglob("*") if p.is_file())
        kept = (p for p in files if not {"checkpoints", "best"} & {*p.parts} and p.name not in (KEY, "README.md"))
        return {str(Path(stage) / p): _output(work / p) for p in kept}

    # --- working in it ------------------------------------------------------------------------------------------

    def work_folder(self, stage: str, key: str, resumes: bool) -> Path:
        """The work folder of a stage: empty, except that a stage that resumes finds what a killed attempt with the same key left."""
        work = self.root / ".work" / stage
        note = work / KEY
        if work.exists() and not (resumes and note.exists() and note.read_text() == key):
            shutil.rmtree(work)
        make_folder(work)
        note.write_text(key)
        return work

    def rekey(self, stage: str, key: str) -> None:
        """Assign the work of a killed attempt to another stage key."""
        note = self.root / ".work" / stage / KEY
        if note.exists():
            write_text(note, key)

    def commit(self, stage: str) -> None:
        """Replace the stage's folder by the finished work folder; a kill at any point leaves one or the other."""
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
        """Lock this run directory.

        Raises:
            RunBusy: another process holds the lock.
            MissingArtifact: the folder is not writable.
        """
        if os.environ.get(LOCK_HELD) == str(self.root.resolve()):
            yield
            return
        import filelock

        lock = filelock.FileLock(self.root / ".lock")
        try:
            with writing(self.root):
                lock.acquire(timeout=2)  # a killed run releases its lock a moment later
        except filelock.Timeout:
            holder = (self.root / ".holder").read_text() if (self.root / ".holder").exists() else "unknown"
            raise RunBusy(
                f"{self.root}: process {holder} is using this run directory; wait for it, or set --out to another folder",
                holder=int(holder) if holder.isdecimal() else None,
            ) from None
        try:
            with writing(self.root):
                (self.root / ".holder").write_text(str(os.getpid()))
            yield
        finally:
            lock.release()


def stage_key(stage: str, recipe: Recipe, sections: tuple[str, ...], inputs: Mapping[str, str]) -> str:
    """A hash of everything a stage depends on: its recipe sections and its inputs. If the key is unchanged, there is nothing to do."""
    dumped = recipe.model_dump(mode="json")
    for path, default in ADDED.items():
        *above, name = path.split(".")
        section = functools.reduce(lambda found, key: found[key], above, dumped)
        if section[name] == default:
            del section[name]
    for name in UNTRAINED:
        dumped["train"].pop(name, None)
    for source in (source for split in SPLITS for source in dumped["data"][split]):
        for name, default in ADDED_TO_SOURCES.items():
            if source[name] == default:
                del source[name]
    content = {"stage": stage, "recipe": {n: dumped[n] for n in sections if n in dumped}, "inputs": dict(inputs)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def decisions(folder: Path) -> dict[str, Any]:
    """A stage's earlier decisions, from its folder; empty if they cannot be read."""
    try:
        decided: dict[str, Any] = read_json(folder / DECIDED)
    except (FileNotFoundError, ValueError):
        return {}
    return decided


def _output(path: Path) -> Output:
    status = path.stat()
    return Output(sha256_of(path), status.st_size, status.st_mtime_ns)


def _sources(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The sources of a manifest entry; earlier versions did not record them."""
    sources: Mapping[str, Any] = entry.get("sources", {})
    return sources


def _differ(files: Sequence[Path], recorded: Mapping[str, Any]) -> bool:
    return {*map(str, files)} != recorded.keys() or not all(_same(file, recorded[str(file)]) for file in files)


def _same(path: Path, output: Mapping[str, Any]) -> bool:
    """Whether a file is unchanged: by size and mtime, or by content if the mtime differs, as in a copied run."""
    if not path.exists():
        return False
    status = path.stat()
    if status.st_size != output["bytes"]:
        return False
    return bool(status.st_mtime_ns == output["mtime_ns"] or _hashed(path, status.st_mtime_ns) == output["sha256"])


@functools.cache
def _hashed(path: Path, mtime_ns: int) -> str:
    """Hash each version of a file once per process."""
    return sha256_of(path)
