"""Training on rated answers against TRL's own KTOTrainer, in fp32; and its stages on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainingArguments
from trl import KTOConfig, KTOTrainer

from helpers.first_pairs import adapted, arguments, copy_adapter, model_of, same, step
from helpers.paths import RECIPES
from helpers.tiny_pairs import pair_rows, write_rows
from helpers.training import Heard
from qkit import pipeline
from qkit.core.batching import IGNORED
from qkit.recipe.load import load
from qkit.recipe.preference import Feedback
from qkit.run.directory import Run
from qkit.tasks._preference.collate import collate_rated
from qkit.train._preference import rated, reference

pytestmark = pytest.mark.slow

ROWS = [
    {"prompt": "name a colour", "completion": "blue", "label": True},
    {"prompt": "count", "completion": "one two three four", "label": False},
    {"prompt": "what is the time", "completion": "noon", "label": True},
    {"prompt": "go", "completion": "I went to the shop", "label": True},
]


def _trl(model: Path, folder: Path, options: dict[str, Any]) -> Any:
    trainer = KTOTrainer(
        model=model_of(model),
        args=KTOConfig(**arguments(folder, per_device_train_batch_size=4), **options),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(str(model)),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    copy_adapter(adapted(model), trainer.model)
    return trainer


def _rows(trl: Any) -> Dataset:
    """The rows as TRL has tokenized them, in qkit's columns."""
    rows = []
    for row in trl.train_dataset:
        prompt, answer, other = row["prompt_ids"], row["completion_ids"], row.get("KL_completion_ids") or []
        labels = [IGNORED] * len(prompt) + answer
        rows.append(
            {
                "input_ids": prompt + answer + other,
                "labels": labels + [IGNORED] * len(other),
                "scored": labels + other,
                "start": len(prompt),
                "rejected_start": len(prompt) + len(answer),
                "desirable": int(row["label"]),
            }
        )
    return Dataset.from_list(rows)


def _ours(model: Path, folder: Path, rows: Dataset, section: Feedback, shared: bool) -> Any:
    trainer = rated.trainer_class()(
        model=adapted(model),
        args=TrainingArguments(remove_unused_columns=False, **arguments(folder)),
        train_dataset=rows,
        section=section,
        shared=shared,
        pad=0,
        batch_tokens=100_000,
        collator=lambda given, pad, packed=False: collate_rated(given, pad),
    )
    trainer.train_dataset = reference.with_reference(rows, folder / "reference.parquet", trainer, Heard())
    return trainer


@pytest.mark.parametrize("shared", [True, False], ids=["a prompt once", "a prompt twice"])
@pytest.mark.parametrize(
    "options",
    [{}, {"loss_type": "apo_zero_unpaired"}, {"beta": 0.5, "desirable_weight": 0.3, "undesirable_weight": 1.7}],
    ids=["kto", "apo", "weights"],
)
def test_loss_and_gradients_are_those_of_trl(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any], shared: bool
) -> None:
    trl = _trl(tiny_model, tmp_path, options)
    ours = _ours(tiny_model, tmp_path, _rows(trl), Feedback(**options), shared)
    same(step(ours), step(trl))


def test_every_answer_stands_beside_one_to_another_prompt() -> None:
    rows = Dataset.from_list(
        [{"input_ids": [n, 10 + n], "labels": [IGNORED, 10 + n], "start": 1, "desirable": n % 2} for n in range(6)]
    )
    joined = rated.with_others(rows, 7, compares=True)
    others = [row["input_ids"][row["rejected_start"] :] for row in joined]
    assert sorted(token for (token,) in others) == [10, 11, 12, 13, 14, 15]
    assert all(other != [10 + number] for number, other in enumerate(others))
    assert joined[0]["labels"] == [IGNORED, 10, IGNORED] and joined[0]["scored"][:2] == [IGNORED, 10]
    assert rated.with_others(rows, 7, compares=True)["input_ids"][:] == joined["input_ids"][:]
    assert rated.with_others(rows, 7, compares=False)["input_ids"][:] == rows["input_ids"][:]


# --- the stages -------------------------------------------------------------------------------------------------------


def _rated_rows(count: int) -> list[dict[str, Any]]:
    """Every prompt twice: once with a good answer, once with a bad one."""
    return [
        {"prompt": f"{row['prompt']} {number}", "completion": row[side], "label": side == "chosen"}
        for number, row in enumerate(pair_rows(count))
        for side in ("chosen", "rejected")
    ]


def test_the_recipe_on_a_tiny_model(tmp_path: Path, tiny_model: Path) -> None:
    """recipes/feedback.yaml from data to gated artifacts."""
    file = write_rows(tmp_path / "rows.jsonl", _rated_rows(32))
    overrides = [
        f"model={{source: {tiny_model}}}",
        f"data.train=[{{source: {file}, rows: '12:'}}]",
        f"data.test=[{{source: {file}, rows: ':12'}}]",
        *("data.max_overlap=1", "data.max_length=192", "data.batch_tokens=512"),
        *("train.learning_rate=1e-2", "train.max_steps=12", "train.gradient_accumulation_steps=1"),
        *("evaluate.max_new_tokens=8", "serve.max_model_len=256", "ledger.losses=true"),
        *("export.formats=[onnx-fp32]", "bench.runtimes=[transformers]"),
    ]
    run = Run.create(tmp_path / "first", load(RECIPES / "feedback.yaml", overrides))
    for stage in ("data", "train", "evaluate", "merge", "export", "verify"):
        pipeline.execute(run, stage)
    losses = pq.read_table(run.folder("train") / "losses.parquet").to_pydict()
    assert losses["loss_before"] == pytest.approx([0.5] * 52, abs=1e-6)
    assert sum(losses["loss_after"]) < 0.9 * sum(losses["loss_before"])
    document = json.loads((run.folder("evaluate") / "scores.json").read_text(encoding="utf-8"))
    score = document["scores"]["adapter"]
    assert (
        document["metric"] == "AUC of rewards"
        and score["score"] > 75
        and score["low"] <= score["score"] <= score["high"]
    )
    assert {*score["metrics"]} == {"kl_to_reference", "answer_tokens"} and math.isfinite(document["gain"]["points"])
    parity = json.loads((run.folder("verify") / "parity.json").read_text(encoding="utf-8"))["parity"]
    assert {parity[name]["status"] for name in ("merged", "onnx-fp32")} == {"passed"}
