"""What every test has: a place of its own for qkit's files, no hub, no GPU; and the models and runs that several test files use."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from helpers import sandbox
from helpers.command import qkit
from helpers.tiny import build_model, chat_rows, tiny_settings

if TYPE_CHECKING:
    from qkit.run.directory import Run


# By name of file, measured on 2 cores with `--durations=0`.
LONGEST = (
    "test_real_model.py",
    "test_pipeline.py",
    "test_serve_vllm.py",
    "test_contract.py",
    "test_onnx_traced.py",
    "test_merge.py",
    "test_full.py",
    "test_starts.py",
    "test_init_trained.py",
    "test_validation.py",
    "test_language_peft.py",
    "test_optimizers.py",
    "test_tracked_runs.py",
    "test_preference_stage.py",
    "test_levers.py",
    "test_onnx.py",
    "test_serve_onnx.py",
    "test_shortage.py",
    "test_train.py",
    "test_every_field.py",
)
SLOW_FIXTURES = {"whole_run", "trained_run", "onnx_exports"}
# Files that share a fixture of the session that is dear to make are run by the same worker.
TOGETHER = {
    "whole_run": ("test_pipeline.py", "test_merge.py"),
    "onnx_exports": ("test_onnx.py", "test_serve_onnx.py", "test_talk_models.py"),
}


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported: huggingface_hub reads its settings, and OpenMP its threads, when they are loaded."""
    sandbox.enter(worker=hasattr(config, "workerinput"))


def pytest_unconfigure() -> None:
    sandbox.leave()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a run of the session is slow; files that take longest come first, so that no worker is left with one at the end."""
    for item in items:
        if SLOW_FIXTURES & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.slow)
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As `--dist loadfile` does it, in the order above, and with some files together."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = nodeid.partition("::")[0].rpartition("/")[2]
            return next((group for group, files in TOGETHER.items() if name in files), name)

    if config.option.dist != "loadfile":
        return None
    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """What is imported by now stays: qkit collects garbage after each model that it closes, and need not look at all of torch."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer Llama (hidden 64, 2 heads on 1 key-value head) with random weights in bf16, and its tokenizer."""
    return build_model(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape with other weights."""
    return build_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """24 conversations as JSON lines."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(24)), encoding="utf-8")
    return file


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_model: Path, rows_file: Path) -> Path:
    """The recipe of `tiny_settings`, as a file."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_settings(tiny_model, rows_file)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    """A tiny run through `merge`, with a system turn in every row and a learning rate at which the fine-tune shows. Not to be changed."""
    from qkit import pipeline
    from qkit.recipe.load import load
    from qkit.run.directory import Run

    folder = tmp_path_factory.mktemp("trained")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(24)), encoding="utf-8")
    settings = tiny_settings(tiny_model, rows)
    settings["data"]["system"] = "Be brief."
    settings["train"] = {"max_steps": 20, "learning_rate": 2e-2}
    settings["export"] = {"formats": []}
    settings["bench"]["runtimes"] = ["transformers"]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    run = Run.create(folder / "run", load(folder / "tiny.yaml"))
    for stage in ("data", "train", "evaluate", "merge"):
        pipeline.execute(run, stage)
    return run


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    """A run with every stage, by the command: its fine-tune is small against the 4-bit grid. Not to be changed; takes a minute or two."""
    from qkit.recipe.load import load
    from qkit.run.directory import Run

    folder = tmp_path_factory.mktemp("whole")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(24)), encoding="utf-8")
    settings = tiny_settings(tiny_model, rows)
    settings["train"] = {"max_steps": 12, "learning_rate": 2e-3}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    done = qkit("run", folder / "tiny.yaml", "--out", folder / "run")
    logs = "".join(f"\n--- {log.name}\n{log.read_text()[-1500:]}" for log in (folder / "run" / "logs").glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    assert not [line for line in done.stderr.splitlines() if "Traceback" in line]
    return Run(folder / "run", load(folder / "run" / "recipe.yaml"))


@pytest.fixture(scope="session")
def onnx_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with two stop tokens, in a folder that nothing may be written to."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "onnx-source")
    stop = {"eos_token_id": [2, 7], "bos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(stop))
    for file in (*folder.iterdir(), folder):
        file.chmod(0o555 if file.is_dir() else 0o444)
    return folder


@pytest.fixture(scope="session")
def onnx_exports(onnx_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """It in each variant of ONNX. Not to be changed."""
    from helpers.exporting import job_for
    from qkit.export.formats import onnx as exporter

    pytest.importorskip("onnxruntime_genai")
    root, job = tmp_path_factory.mktemp("onnx"), job_for(onnx_model, tmp_path_factory.mktemp("run"))
    for variant in exporter.VARIANTS:
        exporter.export(job, root / variant, variant)
    return {variant: root / variant for variant in exporter.VARIANTS}
