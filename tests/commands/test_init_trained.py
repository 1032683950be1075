"""Recipes of `qkit init` on tiny models with their own tokenizers: each passes `qkit inspect`, and one of each family trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.command import qkit_here
from helpers.shapes import SHAPES, answered, asked, jsonl, review
from helpers.tiny_labelled import build_model
from qkit import pipeline
from qkit.commands.init import base, init, reading
from qkit.commands.init.dataset import open_dataset
from qkit.commands.init.init import Proposal
from qkit.core.progress import Progress
from qkit.plugins.task import open_task
from qkit.recipe.load import load
from qkit.run.directory import Run

pytestmark = pytest.mark.slow
TOOLS = "messages with tools"  # whose template is not that of the tiny model
TRAINED = (
    "question and answer",
    "lines of text",
    "semicolons",
    "separated labels",
    "scores",
    "pairs of answers",
    "rated answers",
    "conll of two columns",
    "squad flat",
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "bert", "bert")


@pytest.fixture(scope="module")
def chat(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with places for a conversation with tools, a token for each byte."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "chat")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return folder


def proposed(name: str, folder: Path, chat: Path, encoder: Path) -> Proposal:
    dataset = open_dataset(str(SHAPES[name].write(folder)))
    candidate = reading.choose(dataset, reading.candidates(dataset.table), None)
    model = chat if open_task(candidate.task).HEAD.generates else encoder
    return init.propose(dataset, candidate, base.named(str(model)))


@pytest.mark.parametrize("name", SHAPES)
def test_the_recipe_passes_its_own_checks(name: str, tmp_path: Path, chat: Path, encoder: Path) -> None:
    proposal = proposed(name, tmp_path, chat, encoder)
    unknown = {"unknown"}  # the encoder's tokenizer knows the words of other tests
    failed = {check["name"] for check in proposal.checks or ()} - unknown
    assert proposal.checks is not None and not failed, proposal.checks
    assert not proposal.lengths.reason and proposal.composed.fits
    chosen = proposal.composed.draft["model"]
    assert ("chat_template" in chosen) is (name == TOOLS)


@pytest.mark.parametrize("name", TRAINED)
def test_the_recipe_trains(name: str, tmp_path: Path, chat: Path, encoder: Path) -> None:
    proposal = proposed(name, tmp_path, chat, encoder)
    init.write(proposal, tmp_path / "first.yaml")
    run = Run.create(tmp_path / "run", load(tmp_path / "first.yaml", ["train.max_steps=2", "train.warmup_steps=0"]))
    pipeline.execute(run, "data")
    pipeline.execute(run, "train")
    assert run.manifest()["stages"]["train"]["status"] == "done"


def test_a_check_that_fails_is_named(tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe is written all the same, and the command ends with 2."""
    monkeypatch.chdir(tmp_path)
    jsonl("one.jsonl", [{"text": review(n), "label": "a"} for n in range(20)])(tmp_path)
    done = qkit_here("init", "one.jsonl", "--model", encoder)
    assert done.returncode == 2 and (tmp_path / "one.yaml").is_file()
    assert "fails     check labels: the training rows have 1 label (a)" in done.stdout


def test_few_rows_leave_one_to_score(tmp_path: Path, tiny_model: Path) -> None:
    """A split by hash may leave a small share without rows; a larger one is taken then."""
    for count in (3, 5, 8):
        file = jsonl(f"{count}.jsonl", [{"prompt": asked(n), "completion": answered(n)} for n in range(count)])(
            tmp_path
        )
        dataset = open_dataset(str(file))
        candidate = reading.choose(dataset, reading.candidates(dataset.table), None)
        proposal = init.propose(dataset, candidate, base.named(str(tiny_model)))
        _, has_rows = init._tried(proposal, Progress())
        assert has_rows and not proposal.checks, (count, proposal.composed.draft["data"]["split"])


def test_what_is_measured_is_every_row_uncut(tmp_path: Path, tiny_model: Path) -> None:
    """A token a byte, and the marks of the template: the longest row is beyond what the recipe allows."""
    rows = [{"prompt": asked(n), "completion": "x" * (3000 if n == 7 else 20)} for n in range(30)]
    dataset = open_dataset(str(jsonl("rows.jsonl", rows)(tmp_path)))
    candidate = reading.choose(dataset, reading.candidates(dataset.table), None)
    proposal = init.propose(dataset, candidate, base.named(str(tiny_model)))
    assert proposal.lengths.count == 30 and proposal.lengths.percentiles()["max"] > 3000
    value, why = proposal.composed.draft["data"]["max_length"]
    assert value == 512 and "29 of 30 rows (96.7 %)" in why and "left out, and named" in why
