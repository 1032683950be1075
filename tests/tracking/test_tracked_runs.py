"""Runs that are trained and evaluated with a tracker, read back from the tracker's own files."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.command import qkit
from helpers.tiny_labelled import build_model, labelled_run
from helpers.training import Heard
from qkit import pipeline
from qkit.core.errors import MissingExtra
from qkit.recipe.load import load
from qkit.run.directory import Run
from qkit.tracking import trackers

pytestmark = pytest.mark.slow

STEPS = 6
RESUMED = 2  # the step of the checkpoint that a killed training resumes from


def _recipe(tiny_recipe: Path, tracker: str, **train: Any) -> Path:
    settings = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
    rows = settings["data"]["test"][0]["source"]
    settings["data"] |= {"train": [{"source": rows, "rows": "8:"}], "validation": [{"source": rows, "rows": "4:8"}]}
    settings["train"] |= {"max_steps": STEPS, "report_to": [tracker], **train}
    tiny_recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tiny_recipe


def _expected(run: Path) -> tuple[dict[int, float], float, float]:
    """The loss of each step, the score and the base model's loss, as qkit's own files have them."""
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    scores = json.loads((run / "evaluate" / "scores.json").read_text())["scores"]
    return (
        {line["step"]: line["loss"] for line in lines if "loss" in line},
        scores["adapter"]["score"],
        scores["base"]["heldout_loss"],
    )


# --- readers: what a tracker has of its one run, as (losses by step, score, the base's loss, lora.r of the recipe) ------------


def _in_tensorboard(folder: Path, name: str) -> tuple[dict[int, float], float, float, int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert [path.name for path in (folder / "tensorboard").iterdir()] == [name]
    events = EventAccumulator(str(folder / "tensorboard" / name))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert len(losses) == len(dict(losses)) and {"train/tokens_per_second", "train/grad_norm", "eval/loss"} <= {
        *events.Tags()["scalars"]
    }
    text = events.Tensors("args/text_summary")[-1].tensor_proto.string_val[0].decode()
    last = {tag: events.Scalars(tag)[-1].value for tag in ("test/score", "test/base_loss")}
    return dict(losses), last["test/score"], last["test/base_loss"], json.loads(text)["recipe.lora.r"]


def _in_mlflow(folder: Path, name: str) -> tuple[dict[int, float], float, float, int]:
    code = (
        "import json, sys; from mlflow.tracking import MlflowClient; client = MlflowClient(sys.argv[1]);"
        "(run,) = client.search_runs([client.get_experiment_by_name('qkit').experiment_id]);"
        "losses = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, 'loss')];"
        "print(json.dumps([run.info.run_name, run.info.status, losses, run.data.metrics, run.data.params]))"
    )
    stored, status, losses, figures, settings = _read(code, f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    assert (stored, status) == (name, "FINISHED") and settings["hidden_size"] == "64"
    return dict(losses), figures["test_score"], figures["test_base_loss"], int(settings["recipe.lora.r"])


def _in_trackio(folder: Path, name: str) -> tuple[dict[int, float], float, float, int]:
    code = (
        "import json, os, sys; os.environ['TRACKIO_DIR'] = sys.argv[1]; import trackio;"
        "from trackio.sqlite_storage import SQLiteStorage as Store; (run,) = trackio.Api().runs('qkit');"
        "print(json.dumps([run.name, Store.get_logs('qkit', run.name), Store.get_run_config('qkit', run.name)]))"
    )
    stored, lines, settings = _read(code, str(folder / "trackio"))
    assert stored == name and settings["hidden_size"] == 64
    losses = {line["train/global_step"]: line["train/loss"] for line in lines if "train/loss" in line}
    (final,) = [line for line in lines if "test/score" in line]
    return losses, final["test/score"], final["test/base_loss"], settings["recipe.lora.r"]


def _read(code: str, place: str) -> Any:
    """What a process prints that reads a tracker's files."""
    done = subprocess.run([sys.executable, "-c", code, place], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _in_wandb(folder: Path, name: str) -> tuple[dict[int, float], float, float, int]:
    records = [record for file in sorted(folder.rglob("*.wandb")) for record in _records(file)]
    runs = [record.run for record in records if record.HasField("run")]
    assert {(run.display_name, run.project) for run in runs} == {(name, "qkit")} and len(
        {run.run_id for run in runs}
    ) == 1
    lines = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    losses = {line["train/global_step"]: line["train/loss"] for line in lines if "train/loss" in line}
    (final,) = [line for line in lines if "test/score" in line]
    settings = [record.config for record in records if record.HasField("config")] + [run.config for run in runs]
    (rank,) = {
        item.value_json for one in settings for item in one.update if "recipe.lora.r" in (item.key, *item.nested_key)
    }
    return losses, final["test/score"], final["test/base_loss"], json.loads(rank)


def _records(file: Path) -> list[Any]:
    """The records of a file of wandb: in blocks of 32 KiB, pieces with a header of 7 bytes, the first after 7 bytes of the file's own."""
    from wandb.proto import wandb_internal_pb2

    data, place, pieces, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        pieces += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            found.append(wandb_internal_pb2.Record.FromString(pieces))
            pieces = b""
    return found


READERS: dict[str, Callable[[Path, str], tuple[dict[int, float], float, float, int]]] = {
    "tensorboard": _in_tensorboard,
    "mlflow": _in_mlflow,
    "trackio": _in_trackio,
    "wandb": _in_wandb,
}


@pytest.fixture(params=READERS)
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tracker whose package is installed, without settings of the user's own."""
    name = str(request.param)
    if name != "tensorboard" and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install {name}")
    prefixes = ("MLFLOW_", "TENSORBOARD_", "TRACKIO_", "WANDB_")
    for variable in [variable for variable in os.environ if variable.startswith(prefixes)]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("NETRC", os.devnull)
    return name


def _command(verb: str, *arguments: object) -> None:
    done = qkit(verb, *arguments)
    assert done.returncode == 0, done.stderr


# --- the tests --------------------------------------------------------------------------------------------------------


def test_a_tracker_has_every_figure_the_recipe_and_the_scores(tracker: str, tiny_recipe: Path, tmp_path: Path) -> None:
    recipe, root = _recipe(tiny_recipe, tracker, run_name="a name"), tmp_path / "run"
    _command("data", recipe, "--out", root)
    for verb in ("train", "evaluate"):
        _command(verb, root)
    losses, score, base_loss, rank = READERS[tracker](root / "trackers", "a name")
    expected, expected_score, expected_loss = _expected(root)
    assert losses.keys() == expected.keys() == {*range(1, STEPS + 1)}
    assert all(losses[step] == pytest.approx(loss, rel=1e-5) for step, loss in expected.items())
    assert (score, base_loss) == (pytest.approx(expected_score), pytest.approx(expected_loss)) and rank == 4
    assert pipeline.statuses(Run.open(root))["train"] == "done"
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "run", "tiny.yaml"}


def test_a_training_that_is_killed_goes_on_in_the_same_run(tracker: str, tiny_recipe: Path, tmp_path: Path) -> None:
    recipe, root = _recipe(tiny_recipe, tracker, save_steps=RESUMED), tmp_path / "run"
    _command("data", recipe, "--out", root)
    _kill_after(root, steps=RESUMED + 1)
    assert (root / ".work" / "train" / "trackers.json").is_file()
    for verb in ("train", "evaluate"):
        _command(verb, root)
    losses, score, base_loss, _ = READERS[tracker](root / "trackers", "run")
    expected, expected_score, expected_loss = _expected(root)
    if tracker != "tensorboard":  # others write from a thread or process of their own, which the kill ends
        expected = {step: loss for step, loss in expected.items() if step > RESUMED or step in losses}
    assert losses == pytest.approx(expected, rel=1e-5)
    assert (score, base_loss) == (pytest.approx(expected_score), pytest.approx(expected_loss))


def _kill_after(root: Path, steps: int) -> None:
    """Train in a process that is killed once so many steps are logged."""
    done = _train_until(root, steps, "os.getpid()")
    assert done.returncode == -signal.SIGKILL, done.stderr
    time.sleep(1)  # a tracker's own process may still write


def _train_until(root: Path, steps: int, pid: object) -> subprocess.CompletedProcess[bytes]:
    """Train in a process that kills process `pid` once so many steps are logged."""
    code = (
        "import os, signal, sys, transformers; from qkit.cli.app import main\n"
        "own = transformers.Trainer.log\n"
        "def log(self, logs, *given):\n"
        "    own(self, logs, *given)\n"
        f"    if self.state.global_step == {steps}: os.kill({pid}, signal.SIGKILL)\n"
        f"transformers.Trainer.log = log; sys.argv = ['qkit', 'train', {str(root)!r}]; main()\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)


def test_a_server_that_goes_in_mid_training_costs_its_figures_alone(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("mlflow is not installed: pip install mlflow")
    root, address, place = tmp_path / "run", f"http://127.0.0.1:{_free_port()}", tmp_path / "served"
    place.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    command = [sys.executable, "-m", "mlflow", "server", "--port", address.rpartition(":")[2], "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{place / 'mlflow.db'}", "--artifacts-destination", str(place)]
    with subprocess.Popen([*command, *store], cwd=place, start_new_session=True) as server:
        try:
            _wait_for(f"{address}/health", seconds=120)
            _command("data", _recipe(tiny_recipe, "mlflow"), "--out", root)
            done = _train_until(root, 3, f"-{server.pid}")  # with the processes that it started
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
    assert done.returncode == 0, done.stderr
    assert b" ".join(done.stderr.split()).count(b"the tracker mlflow failed") == 1
    losses = [json.loads(line).get("loss") for line in (root / "train" / "metrics.jsonl").read_text().splitlines()]
    assert len([loss for loss in losses if loss is not None]) == STEPS
    assert (root / "train" / "adapter" / "adapter_model.safetensors").is_file() and not (root / "trackers").exists()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _wait_for(url: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            assert time.monotonic() < end, f"{url} did not answer"
            time.sleep(0.2)


def test_a_task_with_labels_has_its_own_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = build_model(tmp_path / "bert", "bert")
    train = {"max_steps": 2, "report_to": "tensorboard", "run_name": "labels/one"}
    run = labelled_run(tmp_path, folder, method="full", train=train)
    for stage in ("data", "train", "evaluate"):
        pipeline.execute(run, stage)
    events = EventAccumulator(str(run.root / "trackers" / "tensorboard" / "labels_one"))
    events.Reload()
    scores = json.loads((run.folder("evaluate") / "scores.json").read_text())["scores"]
    for tag, figure in (
        ("test/score", scores["trained"]["score"]),
        ("test/majority_score_low", scores["majority"]["low"]),
        ("test/loss", scores["trained"]["heldout_loss"]),
        *((f"test/{name}", value["value"]) for name, value in scores["trained"]["metrics"].items() if ":" not in name),
    ):
        (event,) = events.Scalars(tag)
        assert (event.step, event.value) == (2, pytest.approx(figure, rel=1e-5)), tag
    assert not [tag for tag in events.Tags()["scalars"] if ":" in tag]


def test_a_missing_package_stops_a_run_before_its_first_stage(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_importable", lambda module: False)
    run = Run.create(tmp_path / "run", load(_recipe(tiny_recipe, "swanlab")))
    with pytest.raises(MissingExtra, match=r"pip install swanlab$"):
        pipeline.run_all(run)
    assert list(run.root.iterdir()) == []


def test_runs_in_one_folder_of_the_users_own_leave_each_other_alone(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    recipe = load(_recipe(tiny_recipe, "tensorboard"))
    for name in ("one", "two"):
        run = Run.create(tmp_path / name, recipe)
        for stage in ("data", "train"):
            pipeline.execute(run, stage)
        assert not (run.root / "trackers").exists()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [*range(1, STEPS + 1)] * 2


def test_a_training_whose_tracker_fails_ends_with_the_same_adapter(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers itself lets such an error end the training."""
    from transformers.integrations.integration_utils import TensorBoardCallback

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no space left on the tracker's disk")

    weights = []
    for name, broken in (("whole", False), ("broken", True)):
        heard = Heard()
        run = Run.create(tmp_path / name, load(_recipe(tiny_recipe, "tensorboard")), heard)
        with monkeypatch.context() as patched:
            if broken:
                patched.setattr(TensorBoardCallback, "on_log", fails)
            for stage in ("data", "train", "evaluate"):
                pipeline.execute(run, stage)
        weights.append((run.folder("train") / "adapter" / "adapter_model.safetensors").read_bytes())
        warned = [line for line in heard.lines if "the tracker tensorboard failed" in line]
        assert [line.partition(":")[0] for line in warned] == (["train", "evaluate"] if broken else [])
    assert weights[0] == weights[1]
