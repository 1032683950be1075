"""`qkit ls`, `rm` and `gc`: what they say of a run, and what they delete; nothing that a result needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.command import qkit_here
from helpers.sample import SAMPLE, open_sample
from qkit.commands.housekeeping import disk, garbage, listing, removal, state
from qkit.core.errors import MissingArtifact, RunBusy, UserError
from qkit.core.files import sha256_of
from qkit.core.sources import mark_used
from qkit.run.directory import Run
from qkit.run.stages import stages_of

DAY = 86400.0


def copy(folder: Path, name: str) -> Run:
    """The sample run with a folder for each stage, so that it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    run = open_sample(folder)
    root = run.root.rename(folder / name)
    run = Run.open(root)
    for stage in stages_of(run.recipe):
        (root / stage.name).mkdir(exist_ok=True)
    manifest = run.manifest()
    for stage in stages_of(run.recipe):
        manifest["stages"].setdefault(stage.name, {"key": "k", "outputs": {}, "inputs": {}})
    for entry in manifest["stages"].values():
        entry["outputs"] = {}
    file = write(root / "train" / "metrics.jsonl")
    kept = {"sha256": sha256_of(file), "bytes": file.stat().st_size, "mtime_ns": file.stat().st_mtime_ns}
    manifest["stages"]["train"]["outputs"] = {"train/metrics.jsonl": kept}
    (root / "run.json").write_text(json.dumps(manifest))
    return run


def forget(run: Run, *stages: str) -> None:
    """Let stages be as if they had not run."""
    manifest = run.manifest()
    for stage in stages:
        del manifest["stages"][stage]
    (run.root / "run.json").write_text(json.dumps(manifest))


def write(file: Path, content: str = "x" * 1000, days: float = 0.0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    if days:
        for path in (file, file.parent):
            os.utime(path, (time.time() - days * DAY,) * 2)
    return file


def checkpoint(folder: Path, step: int, steps: int | None = None, sealed: bool = True) -> None:
    write(folder / f"checkpoint-{step}" / "weights")
    if steps:
        write(folder / f"checkpoint-{step}" / "trainer_state.json", json.dumps({"max_steps": steps}))
    if sealed:
        write(folder / f"checkpoint-{step}" / state.SEAL, "{}")


# --- ls ---------------------------------------------------------------------------------------------------------------


def test_a_list_has_the_newest_first_and_fits_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("first", "a-run-with-a-name-that-is-far-too-long-for-a-screen", "third")):
        run = copy(tmp_path / "runs", name)
        for sign in listing.SIGNS:
            if (run.root / sign).exists():
                os.utime(run.root / sign, (1e9 + number * 7200,) * 2)
    monkeypatch.chdir(tmp_path)
    done = qkit_here("ls", env={"COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert qkit_here("ls", env={"COLUMNS": "200"}).stdout.count("too-long-for-a-screen") == 1
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["run", "task", "model", "state", "score", "disk", "age"]
    third, long, first = (line.split()[0] for line in lines)
    assert (third, first) == ("runs/third", "runs/first") and long.startswith("\N{HORIZONTAL ELLIPSIS}")
    assert long.endswith("for-a-screen")
    assert max(map(len, done.stdout.splitlines())) <= 80 and "done" in lines[0] and "52 (42–62)" in lines[0]
    document = json.loads(qkit_here("ls", "--json", tmp_path / "runs" / "first").stdout)
    assert len(document) == 1 and document[0]["score"] == {"score": 52.0, "low": 42.0, "high": 62.0}
    assert document[0]["state"]["kind"] == "done" and document[0]["bytes"] == disk.size_of(tmp_path / "runs" / "first")
    assert (document[0]["task"], document[0]["model"], document[0]["changed_at"]) == ("chat", "tiny-llama", 1e9)


def test_states_of_runs(tmp_path: Path) -> None:
    run = copy(tmp_path, "r")
    assert state.state_of(run).text == "done"
    forget(run, "evaluate", "report")
    assert state.state_of(run).text == "stopped: evaluate"
    forget(run, "train")
    assert state.state_of(run).text == "stopped: train"
    work = run.root / ".work" / "train" / "checkpoints"
    checkpoint(work, 20, 100)
    checkpoint(work, 40, sealed=False)
    assert state.state_of(run).text == "stopped: train 20/100"
    checkpoint(work, 40)
    assert state.state_of(run).text == "stopped: train 40"
    with run.locked():
        assert state.state_of(run).text == "running: train 40"
    assert state.state_of(run).kind == state.STOPPED


def test_a_run_of_another_process_is_running(tmp_path: Path) -> None:
    run = copy(tmp_path, "r")
    code = (
        "import sys\nfrom pathlib import Path\nfrom qkit.run.directory import Run\n"
        "with Run.open(Path(sys.argv[1])).locked():\n    print('locked', flush=True)\n    sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(run.root)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"locked\n"
        assert state.is_running(run.root)
        with pytest.raises(RunBusy, match=rf"process {process.pid} is using this run directory; stop it first") as busy:
            removal.doomed([run.root])
        assert busy.value.holder == process.pid
        assert [one for one in garbage.leftovers([run.root], 1e9) if one.run] == []
        process.communicate()
    assert not state.is_running(run.root)


def test_a_run_that_cannot_be_read_is_in_the_list(tmp_path: Path) -> None:
    copy(tmp_path, "good")
    (copy(tmp_path, "damaged").root / "run.json").write_text("{")
    write(copy(tmp_path, "unknown").root / "recipe.yaml", "task: chat\nwhat: 1\n")
    runs = {Path(run.path).name: run for run in listing.listed([tmp_path])}
    assert {name: run.state.kind for name, run in runs.items()} == {
        "good": "done", "damaged": "unreadable", "unknown": "unreadable",
    }  # fmt: skip
    assert "is damaged" in runs["damaged"].state.why and "what" in runs["unknown"].state.why


def test_folders_that_hold_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert qkit_here("ls").stdout == "no runs below runs/: `qkit run RECIPE` makes one\n"
    write(tmp_path / "project" / "recipe.yaml")  # of somebody's project
    copy(tmp_path / "project" / ".hidden", "run")
    assert qkit_here("ls", "project", "--json").stdout == "[]\n"
    done = qkit_here("ls", "none")
    assert done.returncode == 2 and "none: no such folder" in done.stderr


def test_ls_opens_nothing_heavy(tmp_path: Path) -> None:
    copy(tmp_path, "r")
    code = (
        "import sys; sys.argv = ['qkit', 'ls', sys.argv[1]]\nfrom qkit.cli.app import main\ntry: main()\n"
        "finally: print('HEAVY', [m for m in ('torch', 'transformers', 'numpy', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout and "done" in done.stdout


def test_columns_give_way_in_order() -> None:
    row = (
        "runs/" + "n" * 30,
        "function_calling",
        "SmolLM2-135M-Instruct",
        "stopped: train 400/1000",
        "–",
        "1.2G",
        "3 d",
    )
    widths = listing._widths([row], 80)
    assert sum(widths.values()) + 6 == 80 and (widths["task"], widths["model"]) == (8, 9)
    assert widths["state"] == len(row[3]) and widths["run"] == 22
    assert listing._widths([row], 200) == {
        name: max(len(name), len(cell)) for name, cell in zip(listing.HEADERS, row, strict=True)
    }


def test_ages_and_sizes() -> None:
    assert [listing.age_text(s) for s in (-1, 0.5, 59, 60, 7200, 3 * DAY, 800 * DAY)] == [
        "0 s", "0 s", "59 s", "1 min", "2 h", "3 d", "2 y",
    ]  # fmt: skip
    sizes = (0, 999, 1000, 20_000, 1.5 * 2**20, 999.6 * 2**20, 40 * 2**30, 2.0**41)
    assert [listing.size_text(n) for n in sizes] == ["0B", "999B", "1.0K", "20K", "1.5M", "1000M", "40G", "2.0T"]


def test_a_file_with_two_names_takes_space_once(tmp_path: Path) -> None:
    first = write(tmp_path / "a" / "weights")
    (tmp_path / "b").mkdir()
    os.link(first, tmp_path / "b" / "weights")
    (tmp_path / "b" / "link").symlink_to(first)
    link = (tmp_path / "b" / "link").lstat().st_size
    assert disk.size_of(tmp_path) == 1000 + link == disk.size_of(tmp_path / "a", tmp_path / "b")
    assert disk.freed_by(tmp_path / "b") == link and disk.freed_by(tmp_path) == 1000 + link


# --- rm ---------------------------------------------------------------------------------------------------------------


def test_runs_are_deleted_after_a_yes_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = copy(tmp_path, "first").root, copy(tmp_path, "second").root
    write(first / "train" / "adapter" / "adapter_model.safetensors")
    done = qkit_here("rm", first)
    assert done.returncode == 2 and "--yes deletes without asking" in done.stderr and first.is_dir()
    assert f"{first}: " in done.stderr and "what it trained was never exported" in done.stderr
    done = qkit_here("rm", first, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    (gone,) = json.loads(done.stdout)
    assert gone["path"] == str(first) and gone["only_here"] is True and gone["bytes"] > 1000
    assert not first.exists() and second.is_dir()


@pytest.mark.parametrize(("answer", "left"), [("n\n", True), ("y\n", False)])
def test_a_terminal_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, left: bool) -> None:
    root, asked = copy(tmp_path, "r").root, []

    def confirm(question: str, err: bool) -> bool:
        asked.append(question)
        return answer == "y\n"

    monkeypatch.setattr("typer.confirm", confirm)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    done = qkit_here("rm", root)
    assert asked == ["Delete it?"] and root.exists() is left
    assert done.returncode == 0 and done.stdout == f"deleted: {'nothing' if left else root}\n"


def foreign(run: Run) -> Path:
    write(run.root / "notes.txt")
    return run.root


def linked(run: Run) -> Path:
    link = run.root.with_name("link")
    link.symlink_to(run.root)
    return link


def with_a_recipe_alone(run: Run) -> Path:
    root = run.root.with_name("project")
    write(root / "recipe.yaml", (run.root / "recipe.yaml").read_text())
    return root


def without_recipe(run: Run) -> Path:
    (run.root / "recipe.yaml").unlink()
    return run.root


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (foreign, UserError, r"contains notes\.txt, which qkit did not make"),
        (linked, UserError, "link: a link to .*name that folder"),
        (with_a_recipe_alone, MissingArtifact, "project: not a run directory"),
        (without_recipe, MissingArtifact, "not a run directory"),
    ],
)
def test_what_is_no_run_is_not_deleted(
    tmp_path: Path, change: Callable[[Run], Path], error: type[UserError], message: str
) -> None:
    """Nor any other that is named with it."""
    good, bad = copy(tmp_path, "good").root, change(copy(tmp_path, "r"))
    with pytest.raises(error, match=message):
        removal.doomed([good, bad])
    assert qkit_here("rm", good, bad, "--yes").returncode == 2 and good.is_dir() and bad.is_dir()


def test_a_run_whose_recipe_cannot_be_read_can_be_deleted(tmp_path: Path) -> None:
    root = copy(tmp_path, "r").root
    write(root / "recipe.yaml", "task: chat\nwhat: 1\n")
    assert qkit_here("rm", root, "--yes").returncode == 0 and not root.exists()


def test_the_folder_that_one_is_in_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = copy(tmp_path, "r").root
    monkeypatch.chdir(root / "train")
    with pytest.raises(UserError, match="is the folder that you are in"):
        removal.doomed([root])


def test_what_a_killed_deletion_leaves_can_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = copy(tmp_path, "r").root
    (run,) = removal.doomed([root])
    deleted: list[Path] = []
    real = disk.delete

    def killed(path: Path) -> None:
        if len(deleted) == 3:
            raise KeyboardInterrupt
        deleted.append(path)
        real(path)

    monkeypatch.setattr(disk, "delete", killed)
    with pytest.raises(KeyboardInterrupt):
        removal.remove(run)
    monkeypatch.setattr(disk, "delete", real)
    removal.remove(removal.doomed([root])[0])
    assert not root.exists()


# --- gc ---------------------------------------------------------------------------------------------------------------


def leftover(run: Run) -> dict[str, str]:
    return {str(Path(one.path).relative_to(run.root)): one.why for one in garbage.leftovers([run.root], 1e9) if one.run}


def test_checkpoints_of_a_finished_training_can_go_and_those_of_another_not(tmp_path: Path) -> None:
    run = copy(tmp_path, "r")
    assert leftover(run) == {}
    checkpoint(run.folder("train") / "checkpoints", 40)
    assert leftover(run) == {"train/checkpoints": "checkpoints of a finished training"}
    before = (run.folder("train") / "metrics.jsonl").read_text()
    write(run.folder("train") / "metrics.jsonl", "changed")
    assert leftover(run) == {}
    write(run.folder("train") / "metrics.jsonl", before)
    checkpoint(run.root / ".work" / "train" / "checkpoints", 20)
    write(run.root / ".work" / "train" / ".key", "another recipe's")
    assert [*leftover(run)] == ["train/checkpoints"]
    write(run.root / ".work" / "train" / ".key", run.manifest()["stages"]["train"]["key"])
    assert [*leftover(run)] == ["train/checkpoints", ".work/train"]
    (run.folder("train")).rename(run.root / "moved")  # a kill before the finished folder was moved into place
    assert leftover(run) == {}
    (run.root / "moved").rename(run.folder("train"))
    forget(run, "train")
    assert leftover(run) == {}
    (run.root / ".work" / "train" / "checkpoints" / "checkpoint-20" / state.SEAL).unlink()
    assert leftover(run) == {".work/train": "what a stopped training left, without a checkpoint to resume from"}


def test_the_best_step_of_a_finished_training_can_go_and_a_run_with_a_tracker_too(tmp_path: Path) -> None:
    run = copy(tmp_path, "r")
    write(run.folder("train") / "best" / "step-4" / "weights")
    write(run.root / "trackers" / "tensorboard" / "events")
    assert leftover(run) == {"train/best": "the best step of a finished training"}
    assert [one.path for one in removal.doomed([run.root])] == [str(run.root)]


def test_what_stopped_stages_left_can_go(tmp_path: Path) -> None:
    run = copy(tmp_path, "r")
    forget(run, "verify")
    write(run.root / ".work" / "merge" / "model.safetensors")
    write(run.root / ".work" / "reference" / "k" / "done.json")
    write(run.root / ".run.json.77.part")
    assert [*leftover(run)] == [".work/merge", ".run.json.77.part"]
    other = copy(tmp_path, "s")
    write(other.root / ".work" / "reference" / "k" / "done.json")
    assert [*leftover(other)] == [".work/reference"]


def test_gc_deletes_only_with_yes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("QKIT_CACHE", str(cache))
    run = copy(tmp_path / "runs", "r")
    checkpoint(run.folder("train") / "checkpoints", 40)
    made = ("models/old-0123456789ab-2", "datasets/parquet/default-0123456789abcdef")
    users = ("models/my-70b", "datasets/corp/v3")  # the cache may be a folder that has other things
    ages = {**dict.fromkeys((*made, *users, "wheels/old-1"), 40), "models/new-0123456789ab": 1, "models/.making-x": 2}
    for name, days in ages.items():
        write(cache / name / "file", days=days)
    write(cache / "datasets" / "a.lock", days=40)
    write(cache / "logs" / "old.log", days=40)
    write(cache / "environments" / "e" / "file", days=40)
    mark_used(cache / "wheels" / "old-1")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    listed = json.loads(qkit_here("gc", "--json").stdout)
    paths = [
        "runs/r/train/checkpoints",
        *(str(cache / n) for n in ("models/.making-x", *made)),
    ]
    assert listed["deleted"] is False and [one["path"] for one in listed["leftovers"]] == paths
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    text = qkit_here("gc").stdout
    assert text.splitlines()[-1].endswith("in all; --yes deletes it") and "not used for 40 days" in text
    done = qkit_here("gc", "--yes")
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("deleted: ")
    gone = before - {path for path in tmp_path.rglob("*") if path.is_file()}
    assert {path for path in gone if not any(path.is_relative_to(tmp_path / one) for one in paths)} == set()
    assert not any((tmp_path / one).exists() for one in paths)
    assert qkit_here("gc").stdout == "nothing to delete\n"


def test_a_run_that_started_in_the_meantime_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copy(tmp_path, "r")
    write(run.root / ".work" / "merge" / "model.safetensors")
    (one,) = [one for one in garbage.leftovers([run.root], 1e9) if one.run]

    def busy(self: Run) -> Any:
        raise RunBusy("busy")

    monkeypatch.setattr(Run, "locked", busy)
    assert garbage.delete(one) is False and (run.root / ".work" / "merge").is_dir()


def test_the_sample_is_a_run() -> None:
    assert yaml.safe_load((SAMPLE / "recipe.yaml").read_text())["task"] == "chat"
    assert [Path(run.path) for run in listing.listed([SAMPLE])] == [SAMPLE]
