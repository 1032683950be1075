"""Uploads a model folder to the Hugging Face hub, if it records its provenance and did not fail its gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.core.errors import MissingArtifact, MissingExtra, ParityFailed, UserError
from qkit.core.network import reaching_hub
from qkit.core.sources import HUB_ID
from qkit.measure import candidates
from qkit.measure.evidence import read_evidence
from qkit.model.provenance import NOTE
from qkit.recipe.registry import MERGED

ANSWERS = candidates.FILE  # the model's answers to the held-out rows are in it
REMEDY = "check the network, log in with `hf auth login`, and see that HF_HUB_OFFLINE is not set"


@dataclass(frozen=True)
class Upload:
    """What goes where. `files`: path in the folder -> bytes."""

    folder: Path
    repo: str
    private: bool
    files: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.files.values())


def planned(folder: Path, repo: str, private: bool, force: bool = False) -> Upload:
    """What would be uploaded.

    Raises:
        UserError: `repo` is not a valid repository name.
        MissingArtifact: the folder does not exist, or has no provenance.
        ParityFailed: its gate failed, and `force` is not given.
    """
    if not HUB_ID.match(repo):
        raise UserError(f"{repo}: must be owner/name")
    if not folder.is_dir():
        raise MissingArtifact(f"{folder}: no such folder; name one below RUN/export, or RUN/merge")
    if not force:
        _check(folder)
    uploaded = sorted(
        p for p in folder.rglob("*") if p.is_file() and not _hidden(p.relative_to(folder)) and p.name != ANSWERS
    )
    return Upload(folder, repo, private, {str(p.relative_to(folder)): p.stat().st_size for p in uploaded})


def push(upload: Upload) -> str:
    """Create the repository if it does not exist, and upload. Returns the URL of the commit.

    Raises:
        MissingExtra: huggingface_hub is not installed.
        UserError: the hub cannot be reached, or refuses.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise MissingExtra("uploading needs huggingface_hub: pip install 'qkit[train]'") from None
    with reaching_hub(UserError, f"{upload.repo}: could not be uploaded", REMEDY):
        api = HfApi()
        api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        done = api.upload_folder(
            repo_id=upload.repo,
            folder_path=str(upload.folder),
            allow_patterns=list(upload.files),
            commit_message=f"{upload.folder.name}, by qkit",
        )
        return str(done.commit_url)


def to_dict(upload: Upload) -> dict[str, Any]:
    """For `--json`."""
    return {
        "folder": str(upload.folder),
        "repo": upload.repo,
        "private": upload.private,
        "files": dict(upload.files),
        "total_bytes": upload.total_bytes,
    }


def screen(upload: Upload) -> str:
    """One line per file, and the sum."""
    lines = [f"{size / 2**20:10.2f} MiB  {name}" for name, size in upload.files.items()]
    where = f"{upload.repo} ({'private' if upload.private else 'public'})"
    return "\n".join([*lines, f"{upload.total_bytes / 2**20:10.2f} MiB  {len(lines)} files to {where}"])


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _check(folder: Path) -> None:
    if not (folder / NOTE).is_file():
        raise MissingArtifact(
            f"{folder}: {NOTE} is missing, so the provenance of the model is unknown; `qkit export RUN` writes it, "
            "--force uploads without it"
        )
    run, name = _artifact(folder.resolve())
    if breaches := read_evidence(run).failures().get(name):
        messages = "; ".join(breach.message for breach in breaches)
        raise ParityFailed(
            f"{folder}: {name} failed its gate: {messages}; look at `qkit show`, or use --force to upload anyway",
            artifact=name,
            gate=breaches[0].gate,
            figure=breaches[0].figure,
        )


def _artifact(folder: Path) -> tuple[Path, str]:
    """The run directory that a folder is in, RUN/merge or RUN/export/NAME, and the artifact's name there."""
    return (folder.parent, MERGED) if folder.name == "merge" else (folder.parent.parent, folder.name)
