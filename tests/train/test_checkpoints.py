"""Going on from checkpoints of which the newest are damaged, each in another way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.training import Heard, _losses, _run
from qkit.core.errors import MissingArtifact
from qkit.run.directory import DECIDED, Run, decisions
from qkit.train import checkpoints
from qkit.train import stage as train_stage

pytestmark = pytest.mark.slow

STEPS = 6
ADAPTER = "adapter/adapter_model.safetensors"
FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
    checkpoints.SEAL,
)
SETTINGS = {"ledger": {"losses": True}, "train": {"max_steps": STEPS, "save_steps": 2, "save_total_limit": 2}}


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _zero(file: Path) -> None:
    """As a power cut leaves files whose size was written before their bytes."""
    file.write_bytes(bytes(file.stat().st_size))


HARMS = (_cut, _empty, _zero, Path.unlink)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    run, out = _run(tmp_path_factory.mktemp("straight"), tiny_model, **SETTINGS)
    train_stage.run(run, out)
    return out


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run that was stopped in its fifth step, and has checkpoints of the second and the fourth."""
    run, out = _run(tmp_path_factory.mktemp("interrupted"), tiny_model, Heard(stop_at=5), **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        train_stage.run(run, out)
    assert _names(out) == ["checkpoint-2", "checkpoint-4"]
    return run.root


def _names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("checkpoint-*"))


def _again(interrupted: Path, root: Path, tiny_model: Path) -> tuple[Run, Path, Heard]:
    shutil.copytree(interrupted, root)
    heard = Heard()
    run, out = _run(root, tiny_model, heard, **SETTINGS)
    return run, out, heard


@pytest.mark.parametrize("harm", HARMS, ids=["cut in half", "empty", "zeros", "missing"])
def test_any_damage_to_any_file_is_seen(interrupted: Path, tmp_path: Path, harm: Callable[[Path], None]) -> None:
    found = sorted(file.name for file in (interrupted / "train/checkpoints/checkpoint-4").iterdir())
    assert [name for name in found if not name.endswith((".md", ".jinja")) and "token" not in name] == sorted(FILES)
    for name in found:
        shutil.copytree(interrupted / "train/checkpoints", folder := tmp_path / name)
        harm(folder / "checkpoint-4" / name)
        said: list[str] = []
        assert checkpoints.newest_whole(folder, said.append) == folder / "checkpoint-2"
        assert len(said) == 1 and said[0].startswith("checkpoint-4 is incomplete (") and name in said[0]


def test_training_goes_on_from_the_newest_whole_one_to_the_same_result(
    interrupted: Path, straight: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run, out, heard = _again(interrupted, tmp_path / "run", tiny_model)
    for file in (out / "checkpoints/checkpoint-4").iterdir():
        _cut(file)
    _cut(out / "losses.parquet")
    train_stage.run(run, out)
    assert [line for line in heard.lines if "incomplete" in line or "resuming" in line] == [
        f"train: warning: checkpoint-4 is incomplete ({checkpoints.SEAL} is not readable); training does not resume from it",
        "train: resuming from checkpoint-2",
    ]
    assert (out / ADAPTER).read_bytes() == (straight / ADAPTER).read_bytes()
    assert _losses(out) == _losses(straight)
    assert json.loads((out / "sums.json").read_text()) == json.loads((straight / "sums.json").read_text())


def test_training_begins_anew_where_no_checkpoint_is_whole(
    interrupted: Path, straight: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run, out, heard = _again(interrupted, tmp_path / "run", tiny_model)
    _empty(out / "checkpoints/checkpoint-4/trainer_state.json")
    (out / "checkpoints/checkpoint-2/optimizer.pt").unlink()
    train_stage.run(run, out)
    assert (
        "train: starting from the beginning" in heard.lines and sum("incomplete" in line for line in heard.lines) == 2
    )
    assert (out / ADAPTER).read_bytes() == (straight / ADAPTER).read_bytes()


def test_the_last_whole_one_stays_until_the_next_is_whole(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the end of a save, before the seal: with save_total_limit 1 the older one is still there."""
    settings = {"train": {**SETTINGS["train"], "save_total_limit": 1}}
    run, out = _run(tmp_path, tiny_model, **settings)
    whole = checkpoints.seal

    def killed(checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-4":
            raise KeyboardInterrupt
        whole(checkpoint)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "seal", killed)
        with pytest.raises(KeyboardInterrupt):
            train_stage.run(run, out)
    assert checkpoints.newest_whole(out / "checkpoints") == out / "checkpoints" / "checkpoint-2"
    train_stage.run(run, out)
    assert _names(out) == [f"checkpoint-{STEPS}"]


def test_as_many_are_kept_as_asked_for(straight: Path) -> None:
    assert _names(straight) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("harm", [_cut, _empty, _zero])
def test_a_damaged_manifest_is_said_and_not_a_traceback(
    trained_run: Run, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    shutil.copyfile(trained_run.root / "run.json", tmp_path / "run.json")
    harm(tmp_path / "run.json")
    with pytest.raises(MissingArtifact, match=r"run\.json is damaged .* delete it"):
        Run(tmp_path, trained_run.recipe).manifest()


def test_a_damaged_decision_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / DECIDED).write_text('{"train.gradient_checkp', encoding="utf-8")
    assert decisions(tmp_path) == {}


def test_what_others_put_beside_checkpoints_is_left_alone(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-4-backup", "checkpoint-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "optimizer.pt").write_bytes(b"1")
        checkpoints.seal(tmp_path / name)
    (tmp_path / "checkpoint-9").write_text("a file")
    assert checkpoints.newest_whole(tmp_path) == tmp_path / "checkpoint-4"
    checkpoints.thin(tmp_path, keep=1)
    checkpoints.drop_after(tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4-backup", "checkpoint-old", "checkpoint-9"}


@pytest.mark.parametrize("text", ["null", "[]", "{}", "1", '{"optimizer.pt": null}', '{"optimizer.pt": {"bytes": 1}}'])
def test_a_seal_that_lists_nothing_is_none(tmp_path: Path, text: str) -> None:
    heard: list[str] = []
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / checkpoints.SEAL).write_text(text)
    assert checkpoints.newest_whole(tmp_path, heard.append) is None
    assert heard == ["checkpoint-2 is incomplete (files.json lists no files); training does not resume from it"]
