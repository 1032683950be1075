"""The quickstart's own model and data, a fraction of its length: quality is the point, so nothing is tiny here but the budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import paths
from qkit import pipeline
from qkit.recipe.load import load
from qkit.run.directory import Run

QUICKSTART = paths.RECIPES / "quickstart.yaml"
FEWER = ["train.max_steps=24", "evaluate.max_new_tokens=64", "export.formats=[]", "bench.runtimes=[transformers]"]


@pytest.mark.slow
def test_a_real_model_learns_in_4_bit_and_the_merge_keeps_it(tmp_path: Path) -> None:
    recipe = load(QUICKSTART, FEWER)
    (held_out,) = recipe.data.test
    few = recipe.data.model_copy(update={"test": (held_out.model_copy(update={"rows": ":24"}),)})
    run = Run.create(tmp_path / "run", recipe.model_copy(update={"data": few}))
    for stage in ("data", "train", "evaluate", "merge", "export", "verify"):
        pipeline.execute(run, stage)
    scores = json.loads((run.folder("evaluate") / "scores.json").read_text())
    parity = json.loads((run.folder("verify") / "parity.json").read_text())
    base, adapter = scores["scores"]["base"], scores["scores"]["adapter"]
    assert base["score"] < 5  # it answers in prose
    assert adapter["score"] >= base["score"] + 20 and scores["gain"]["low"] > 0
    assert adapter["heldout_loss"] < base["heldout_loss"] / 3
    assert parity["parity"]["merged"]["kl_mean"] < 0.005 and parity["parity"]["merged"]["top1"] > 0.98
    assert abs(parity["scores"]["merged"]["heldout_loss"] - adapter["heldout_loss"]) < 0.02
