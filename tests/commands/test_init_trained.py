"""Recipes of `qkit init` on tiny models with their own tokenizers: each passes `qkit inspect`, and one of each family trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.shapes import SHAPES
from helpers.tiny_labelled import build_model
from qkit import pipeline
from qkit.commands.init import base, init, reading
from qkit.commands.init.dataset import open_dataset
from qkit.commands.init.init import Proposal
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
    "conll of two columns",
    "squad flat",
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "bert", "bert")


def proposed(name: str, folder: Path, chat: Path, encoder: Path) -> Proposal:
    dataset = open_dataset(str(SHAPES[name].write(folder)))
    candidate = reading.choose(dataset, reading.candidates(dataset.table), None)
    model = chat if open_task(candidate.task).HEAD.generates else encoder
    return init.propose(dataset, candidate, base.named(str(model)))


@pytest.mark.parametrize("name", SHAPES)
def test_the_recipe_passes_its_own_checks(name: str, tmp_path: Path, tiny_model: Path, encoder: Path) -> None:
    proposal = proposed(name, tmp_path, tiny_model, encoder)
    unknown = {"unknown"}  # the encoder's tokenizer knows the words of other tests
    failed = {check["name"] for check in proposal.checks or ()} - unknown
    assert proposal.checks is not None and not failed, proposal.checks
    assert not proposal.lengths.reason and proposal.composed.fits
    chosen = proposal.composed.draft["model"]
    assert ("chat_template" in chosen) is (name == TOOLS)


@pytest.mark.parametrize("name", TRAINED)
def test_the_recipe_trains(name: str, tmp_path: Path, tiny_model: Path, encoder: Path) -> None:
    proposal = proposed(name, tmp_path, tiny_model, encoder)
    init.write(proposal, tmp_path / "first.yaml")
    run = Run.create(tmp_path / "run", load(tmp_path / "first.yaml", ["train.max_steps=2", "train.warmup_steps=0"]))
    pipeline.execute(run, "data")
    pipeline.execute(run, "train")
    assert run.manifest()["stages"]["train"]["status"] == "done"
