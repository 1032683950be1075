"""The GPU paths, on a card: `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.tiny import chat_rows
from qkit import pipeline
from qkit.core import device
from qkit.core.errors import OutOfMemory
from qkit.plan import plan as plan_plan
from qkit.plan import remedies
from qkit.recipe.load import load
from qkit.run import stages as run_stages
from qkit.run.directory import Run

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QKIT_DEVICE")
    device.detect.cache_clear()
    if device.detect().kind != "cuda":
        pytest.skip("no NVIDIA GPU")


def test_the_stages_up_to_the_merge(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = load(tiny_recipe, ["export.formats=[]", "bench.runtimes=[transformers]"])
    run = Run.create(tmp_path / "run", recipe)
    for stage in ("data", "train", "evaluate", "merge", "export", "verify", "bench"):
        pipeline.execute(run, stage)
    stages = run.manifest()["stages"]
    assert stages["train"]["peak_bytes"]["meter"] == "cuda_allocated"
    assert stages["train"]["peak_bytes"]["measured"] > 0
    parity = json.loads((run.folder("verify") / "parity.json").read_text())["parity"]
    assert parity["merged"]["kl_mean"] < 1e-2 and parity["merged"]["top1"] > 0.9


def test_memory_given_back_is_free(tiny_model: Path) -> None:
    import torch

    from qkit.plugins.runtime import open_runtime

    with open_runtime("transformers", tiny_model, device.detect()) as runtime:
        assert runtime.memory_bytes() > 0
    assert torch.cuda.memory_allocated() < 1 << 20


def test_a_card_with_little_memory_is_trained_on_all_the_same(tiny_recipe: Path, tmp_path: Path) -> None:
    """The process may have so small a part of the card that whole batches do not fit; in parts they do."""
    import torch

    from qkit.plan import fit

    many = "".join(json.dumps(row) + "\n" for row in chat_rows(1024))
    (tmp_path / "many.jsonl").write_text(many, encoding="utf-8")
    source = json.dumps([{"source": str(tmp_path / "many.jsonl")}])
    more = [f"data.train={source}", "data.clean.duplicate=keep", "data.max_overlap=1.0", "data.batch_tokens=65536"]
    run = Run.create(tmp_path / "run", load(tiny_recipe, [*more, "data.max_length=64", "train.max_steps=2"]))
    pipeline.execute(run, "data")
    card = device.detect()
    planned = plan_plan.plan(run.recipe, device=card)
    halved = plan_plan.plan(remedies.apply(run.recipe, [remedies.Remedy(("micro_batches=8",), 0, "")]), device=card)
    context = next(item.bytes for item in planned.items if item.name == "context")
    budget = (planned.peak_bytes + halved.peak_bytes) // 2 - context
    torch.cuda.set_per_process_memory_fraction(budget / torch.cuda.get_device_properties(0).total_memory)
    tried: list[int] = []

    def attempt(given: Run) -> None:
        tried.append(given.recipe.micro_batches)
        torch.cuda.empty_cache()
        pipeline.execute(given, "train")

    try:
        with pytest.raises(OutOfMemory, match=r"more than the|no line was above"):
            attempt(run)
        last = fit.train(run, attempt, pipeline._rekey)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert last.recipe.micro_batches > 1 and tried[0] == 1
    assert pipeline.status(last, run_stages.STAGES["train"]) == "done"
