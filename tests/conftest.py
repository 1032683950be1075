"""A tiny real Llama and a byte-level tokenizer with a chat template, built on disk, so that the real `from_pretrained` runs with no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from helpers.tiny import build_model, chat_rows, tiny_settings

if TYPE_CHECKING:
    from qkit.run.directory import Run


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never see the user's cache, nor the hub."""
    monkeypatch.setenv("QKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("QKIT_DEVICE", "cpu")


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
