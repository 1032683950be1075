"""Deletes whole runs: `qkit rm`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qkit.commands.housekeeping import disk, state
from qkit.commands.housekeeping.listing import size_text
from qkit.core.errors import MissingArtifact, RunBusy, UserError, listed
from qkit.run.directory import OWN_FILES, Run
from qkit.run.stages import STAGES
from qkit.tracking import trackers

KNOWN = {*STAGES, *OWN_FILES, trackers.FOLDER, "recipe.yaml", "run.json"}


@dataclass(frozen=True)
class Doomed:
    """A run that would go. `only_here`: it holds an adapter or a model that was trained, and no export of it; `needed_by`: runs beside it
    whose recipes name something in it."""

    path: str
    bytes: int
    only_here: bool
    needed_by: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """`runs/a: 1.2G; what it trained was never exported`."""
        only = "; what it trained was never exported" if self.only_here else ""
        needed = f"; {listed(self.needed_by)} cannot do without it" if self.needed_by else ""
        return f"{self.path}: {size_text(self.bytes)}{only}{needed}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def doomed(roots: Sequence[Path]) -> list[Doomed]:
    """What would go. All are looked at before anything is deleted.

    Raises:
        MissingArtifact: one is no run directory.
        UserError: one is a link, or contains something that qkit did not make.
        RunBusy: one is running.
    """
    return [_checked(root) for root in dict.fromkeys(roots)]


def _checked(root: Path) -> Doomed:
    if root.is_symlink():
        raise UserError(f"{root}: a link to {root.resolve()}; name that folder, or delete the link itself")
    if not state.is_run(root):
        raise MissingArtifact(
            f"{root}: not a run directory, so nothing was deleted; `qkit ls` lists those that are there", path=root
        )
    if foreign := [path.name for path in root.iterdir() if not _is_ours(path.name)]:
        raise UserError(
            f"{root}: contains {listed(foreign)}, which qkit did not make; move it away, or delete the folder yourself"
        )
    if Path.cwd().resolve().is_relative_to(root.resolve()):
        raise UserError(f"{root}: is the folder that you are in; go elsewhere first")
    if state.is_running(root):
        raise _busy(root)
    trained = any((root / "train" / name).is_dir() for name in ("adapter", "model"))
    exported = any(path.is_dir() for path in (root / "export").glob("*"))
    return Doomed(str(root), disk.size_of(root), trained and not exported, tuple(_needing(root)))


def _needing(root: Path) -> Iterator[str]:
    """The runs beside a run whose model, or first adapter, lies in it."""
    for other in sorted(root.resolve().parent.iterdir()):
        run = state.opened(other) if other.name != root.name and state.is_run(other) else None
        if isinstance(run, Run):
            named = (run.recipe.model.source, run.recipe.lora.init_from)
            if any(name and Path(name).resolve().is_relative_to(root.resolve()) for name in named):
                yield other.name


def _is_ours(name: str) -> bool:
    """Whether a run has a file of this name, or leaves one that was being written when it was killed."""
    return name in KNOWN or (name.startswith(".") and name.endswith(".part"))


def _busy(root: Path) -> RunBusy:
    holder = (root / ".holder").read_text() if (root / ".holder").exists() else "unknown"
    return RunBusy(
        f"{root}: process {holder} is using this run directory; stop it first",
        holder=int(holder) if holder.isdecimal() else None,
    )


def remove(run: Doomed) -> None:
    """Delete a run; a kill leaves a run directory, which can be deleted again.

    Raises:
        RunBusy: it is running by now.
        MissingArtifact: it cannot be written.
    """
    root = Path(run.path)
    with state.locked(root):
        last = {"recipe.yaml", ".lock"}
        for path in root.iterdir():
            if path.name not in last:
                disk.delete(path)
        disk.delete(root / "recipe.yaml")
        disk.delete(root / ".lock")
    with contextlib.suppress(OSError):  # a run that began in the meantime keeps its folder
        root.rmdir()
