"""The GPU paths, on a card: `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qkit import device, pipeline
from qkit.recipe import load
from qkit.run import Run

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

    from qkit.runtime import open_runtime

    with open_runtime("transformers", tiny_model, device.detect()) as runtime:
        assert runtime.memory_bytes() > 0
    assert torch.cuda.memory_allocated() < 1 << 20
