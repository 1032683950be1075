"""The meters: bytes of the tensors alive, counted to the byte and told apart by line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_encoders import classifier
from qkit.core import device, memory_meter, memory_watch
from qkit.core.memory_watch import LINES, TensorsAlive, watching
from qkit.plugins.task import open_task
from qkit.recipe.load import load
from qkit.train.fast import heap
from qkit.train.trainers import sft

pytestmark = pytest.mark.slow

FP32, BF16 = 4, 2


class Square(torch.nn.Module):
    """A frozen matrix and a trained one: two products, the second's input is kept for its gradient."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.frozen = torch.nn.Linear(width, width, bias=False).requires_grad_(False)
        self.trained = torch.nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.trained(torch.nn.functional.silu(self.frozen(x)))
        return hidden


def test_what_was_there_before_counts_under_its_own_line() -> None:
    model = Square()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    with watching(model, optimizer) as alive:
        pass
    matrix = 64 * FP32
    step_count = FP32
    assert alive.items() == dict.fromkeys(LINES, 0) | {
        "weights": matrix,
        "adapter": matrix,
        "gradients": matrix,
        "optimizer": 2 * matrix + step_count,
    }


def test_a_saved_activation_stays_until_the_backward_pass() -> None:
    model = Square()
    with watching(model) as alive:
        before = alive.alive_bytes()
        x = torch.ones(5, 8)
        loss = model(x).sum()
        kept = 5 * 8 * FP32  # silu's output, which the trained matrix needs; silu's input needs no gradient
        assert alive.alive_bytes() - before == 5 * 8 * FP32 + kept + FP32
        loss.backward()
        gradient = 64 * FP32
        assert alive.alive_bytes() - before == 5 * 8 * FP32 + FP32 + gradient


def test_views_are_not_counted_twice() -> None:
    alive = TensorsAlive()
    whole = torch.zeros(10, 10)
    for tensor in (whole, whole.T, whole[3:], whole.reshape(100), whole.detach()):
        alive.see(tensor, "activations")
    assert alive.alive_bytes() == 100 * FP32


def test_a_view_keeps_all_of_its_storage_alive() -> None:
    with watching(torch.nn.Module()) as alive:
        row = torch.zeros(10, 10)[0]
        assert alive.alive_bytes() == 100 * FP32
        del row
        assert alive.alive_bytes() == 0


def test_the_peak_is_kept_after_what_made_it_is_gone() -> None:
    with watching(torch.nn.Module()) as alive:
        first = torch.zeros(1000)
        second = torch.zeros(500)
        del first
        third = torch.zeros(200)
        assert alive.alive_bytes() == 700 * FP32
    assert alive.peak_bytes() == 1500 * FP32
    assert sum(alive.items().values()) == 1500 * FP32
    assert second.numel() + third.numel() == 700


def test_an_address_used_again_is_a_new_tensor() -> None:
    with watching(torch.nn.Module()) as alive:
        for _ in range(50):
            torch.zeros(1000)
    assert alive.peak_bytes() == 1000 * FP32
    assert alive.alive_bytes() == 0


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda x: x @ torch.ones(8, 3), "logits"),
        (lambda x: x @ torch.ones(8, 4), "activations"),
        (lambda x: x > 0, "batch"),
        (lambda x: torch.arange(3), "batch"),
    ],
)
def test_lines_by_what_a_tensor_is(make: Any, line: str) -> None:
    x = torch.ones(2, 8)
    with watching(torch.nn.Module(), vocabulary=3) as alive:
        made = make(x)
        assert alive.line_of(made) == line


def test_copies_of_weights_are_workspace() -> None:
    model = Square()
    with watching(model) as alive:
        copy = model.frozen.weight.to(torch.bfloat16)
        assert alive.line_of(copy) == "workspace"
    assert alive.items()["workspace"] == 64 * BF16


def test_a_quantized_matrix_counts_with_its_tables_and_dequantized_as_workspace() -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(256, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer = layer.to("cpu")
    weights, blocks = 256 * 128, 256 * 128 // 64
    stored = weights // 2 + blocks + FP32 * (-(-blocks // 256)) + FP32  # double quantization, with its mean
    tables = FP32 * (16 + 256)
    with watching(layer) as alive:
        assert alive.alive_bytes() == stored + tables
        whole = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert alive.line_of(whole) == "workspace"


@pytest.fixture
def watched(tiny_recipe: Path, tmp_path: Path) -> Any:
    """Two steps of the tiny recipe through the real trainer, the second one watched."""
    trainer = _trainer(tiny_recipe, tmp_path)
    watcher = memory_watch.step_watcher(step=1)
    trainer.add_callback(watcher)
    trainer.train()
    return trainer, watcher.alive


def _trainer(recipe_file: Path, out: Path) -> Any:
    from datasets import Dataset

    from qkit.model import load as model_load
    from qkit.model import source, tokenizer
    from qkit.train.trainer import trainer_class

    how = load(recipe_file, ["train.max_steps=2"])
    folder = source.resolve(how.model)
    base = model_load.load_base(folder, how, device.detect())
    rows = [[5 + (7 * row + place) % 200 for place in range(48)] for row in range(8)]
    return trainer_class()(
        model=base,
        args=sft.sft_config(how, device.detect(), out),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": [[-100, *ids[1:]] for ids in rows]}),
        processing_class=tokenizer.tokenizer_of(how.model),
        peft_config=sft.lora_config(how, base),
        pad=0,
        batch_tokens=192,
        collator=open_task("chat").collate,
        labelled_head=True,
    )


def test_a_training_step_line_by_line(watched: Any) -> None:
    trainer, alive = watched
    items = alive.items()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    assert items["adapter"] == FP32 * count
    assert items["optimizer"] == 2 * FP32 * count + FP32 * len(trained)
    assert items["weights"] == sum(t.untyped_storage().nbytes() for t in _once(trainer.model))
    assert all(items[line] > 0 for line in ("activations", "logits", "batch"))
    assert sum(items.values()) == alive.peak_bytes()


def _once(model: Any) -> list[torch.Tensor]:
    """The frozen tensors, those that share a storage once."""
    return list({t.untyped_storage()._cdata: t for t in memory_watch.frozen_tensors(model)}.values())


def test_every_gradient_is_found(watched: Any) -> None:
    trainer, alive = watched
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    made = [size for size, line in zip(alive.log.sizes, alive.log.lines, strict=True) if line == "gradients"]
    assert sum(made) == FP32 * count


def test_the_hooks_are_gone_afterwards(watched: Any) -> None:
    trainer, alive = watched
    seen = len(alive.log.events)
    loss = sum(p.square().sum() for p in trainer.model.parameters() if p.requires_grad)
    loss.backward()
    torch.zeros(100)
    assert len([event for event in alive.log.events[seen:] if event >= 0]) == 0


def test_readings_name_their_meter() -> None:
    meter = memory_meter.PeakMeter(device.detect())
    held = torch.ones(30_000_000)
    readings = meter.readings()
    assert set(readings) == {"rss"}
    assert readings["rss"] > held.untyped_storage().nbytes()
    assert json.dumps(readings)


def test_freed_pages_go_back() -> None:
    import psutil

    process = psutil.Process()
    blocks = [
        torch.ones(20_000) for _ in range(2000)
    ]  # 160 MB in blocks that the heap keeps, with gaps between those left
    blocks = blocks[::50]
    before = process.memory_info().rss
    device.trim_heap()
    assert before - process.memory_info().rss > 100e6
    assert len(blocks) == 40


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_quantized_base_keeps_no_file_mapped(tiny_recipe: Path) -> None:
    from qkit.model import load as model_load
    from qkit.model import source

    how = load(tiny_recipe)
    folder = source.resolve(how.model)
    base = model_load.load_base(folder, how, device.detect())
    assert str(folder / "model.safetensors") not in Path("/proc/self/maps").read_text()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    assert (embedding.weight is head.weight) == base.config.tie_word_embeddings


def test_the_kernel_cache_is_limited_before_torch_is_imported() -> None:
    """The variables have no effect later, and a stage's process has imported these modules by then."""
    code = (
        "import os, sys, qkit.cli.app, qkit.pipeline, qkit.train.stage, qkit.commands.bench_training\n"
        "from qkit.core import device\n"
        "assert 'torch' not in sys.modules\n"
        "os.environ.pop(device.KERNEL_CACHE_VARIABLES[0], None)\n"
        "os.environ[device.KERNEL_CACHE_VARIABLES[1]] = '7'\n"
        "device.limit_kernel_cache()\n"
        "print(*(os.environ[name] for name in device.KERNEL_CACHE_VARIABLES))"
    )
    values = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert values == [device.KERNEL_CACHE_SIZE, "7"]  # a user's own value stays


def test_tensors_elsewhere_are_not_counted() -> None:
    alive = TensorsAlive("cpu")
    elsewhere = torch.zeros(10, device="meta")
    alive.mark([elsewhere], "optimizer")
    assert alive.peak_bytes() == 0 and alive.line_of(elsewhere) is None


def test_training_hands_back_between_layers(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    calls: list[int] = []
    monkeypatch.setattr(heap, "trim_heap", lambda: calls.append(1))
    monkeypatch.setattr(heap, "LAYERS_BETWEEN", 1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    heap.trim_between_layers(model)
    model(torch.ones(1, 4, dtype=torch.int64))
    assert len(calls) == 2 + 1  # before each of the two layers, and before the head
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    loss = model(torch.ones(1, 4, dtype=torch.int64)).logits.sum()
    calls.clear()
    loss.backward()
    assert len(calls) == 2  # when they are computed again


def test_large_batches_of_texts_hand_back_before_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(heap, "trim_heap", lambda: calls.append(1))
    for kind in ("bert", "distilbert", "modernbert"):
        model = classifier(kind)
        heap.trim_before_layers(model)
        for limit, expected in ((4 * 32 * 2 * 5, 2), (4 * 32 * 2 * 5 + 1, 0)):  # two rows of five tokens in two layers
            monkeypatch.setattr(heap, "LARGE_INPUT", limit)
            calls.clear()
            model(torch.ones(2, 5, dtype=torch.int64))
            assert len(calls) == expected, kind
