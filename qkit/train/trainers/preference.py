"""The Trainer of transformers for pairs of answers: PEFT's adapter on the base, the base alone as the reference, and TRL's losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qkit.core.device import Device
from qkit.core.files import read_json
from qkit.model import added_tokens, load
from qkit.model import tokenizer as model_tokenizer
from qkit.model.adapters.rates import rates_of
from qkit.plan import plan as plan_plan
from qkit.plugins.task import open_task
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.tasks._preference.collate import whole
from qkit.tasks._preference.scoring import HELD_OUT_REFERENCE
from qkit.train._preference import layout, reference
from qkit.train._preference.trainer import trainer_class
from qkit.train.trainers import _shared, sft

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, Trainer, TrainingArguments


STORED = ("input_ids", "labels", "start", "rejected_ids", "rejected_labels")


@dataclass(frozen=True)
class Kind:
    """What differs between pairs and rated answers: the trainer, its section of the recipe, and how a file becomes rows."""

    trainer: Any
    section: Any
    read: Callable[[Path], Dataset]


def build_trainer(run: Run, folder: Path, device: Device, out: Path) -> Trainer:
    """The trainer on the run's pairs, with the reference's log-probabilities computed.

    Raises:
        RecipeError: the model does not support gradient checkpointing.
    """
    return built(run, folder, device, out, Kind(trainer_class(), run.recipe.preference, pairs_of))


def built(run: Run, folder: Path, device: Device, out: Path, kind: Kind) -> Trainer:
    """The same for a kind of rows.

    Raises:
        RecipeError: the model does not support gradient checkpointing.
    """
    from qkit.train.fast.heap import trim_between_layers

    recipe, task = run.recipe, open_task(run.recipe.task)
    args = training_arguments(recipe, device, out)
    base, tokenizer = load.load_base(folder, recipe, device), model_tokenizer.load_tokenizer(folder, recipe.model)
    _shared.check_checkpointing(base, args, recipe)
    model = with_adapter(recipe, base, tokenizer)
    trainer: Any = kind.trainer(
        model=model,
        args=args,
        train_dataset=kind.read(run.need("data", "train.parquet")),
        processing_class=tokenizer,
        section=kind.section,
        shared=False,
        pad=read_json(run.need("data", "tokens.json"))["pad"],
        batch_tokens=recipe.data.batch_tokens,
        batch_rows=recipe.data.batch_rows,
        collator=task.collate,
        micro_batches=recipe.micro_batches,
        checkpoints_kept=recipe.train.save_total_limit,
        rates=rates_of(recipe),
    )
    if device.frees_through_malloc:
        trim_between_layers(trainer.base_model)
    trainer.shared, why = layout.shares_prompts(trainer, out)
    run.progress.notify(
        f"train: a prompt is computed {'once' if trainer.shared else 'twice'} for its two answers: {why}"
    )
    add_reference(run, trainer, out, kind)
    return cast("Trainer", trainer)


def add_reference(run: Run, trainer: Any, out: Path, kind: Kind) -> None:
    """Give the trainer's rows the reference's log-probabilities, those of a validation file when it is read, and write those held out."""
    from qkit.measure.held_out import held_out_of
    from qkit.runtimes.transformers import TransformersRuntime

    def with_reference(rows: Dataset, name: str) -> Dataset:
        return reference.with_reference(rows, out / name, trainer, run.progress)

    trainer.train_dataset = with_reference(trainer.train_dataset, "reference.parquet")
    trainer.read_rows = lambda file: with_reference(kind.read(file), f"reference_{file.stem}.parquet")
    held_out = held_out_of(run).rows if (run.folder("data") / "test.parquet").is_file() else ()
    if held_out:
        runtime = TransformersRuntime(trainer.model, cast(Any, None))  # a meter of its own would reset the run's
        reference.of_held_out_pairs(out / HELD_OUT_REFERENCE, trainer, held_out, runtime, run.progress)


def pairs_of(file: Path) -> Dataset:
    """The training pairs, each as one row."""
    from datasets import Features, List, Value

    rows = _shared.training_rows(file, STORED)
    ids, place = List(Value("int32")), Value("int32")
    features = Features({"input_ids": ids, "labels": ids, "start": place, "rejected_start": place})
    mapped: Dataset = rows.map(whole, remove_columns=rows.column_names, features=features)
    return mapped


def with_adapter(recipe: Recipe, base: PreTrainedModel, tokenizer: Any) -> Any:
    """The base with an untrained adapter, by the recipe's seed; without dropout, which the reference would not have."""
    from peft import get_peft_model
    from torch import nn
    from transformers import set_seed

    set_seed(recipe.seed)
    learnt = added_tokens.trained_rows(base, tokenizer, recipe.model.add_tokens)
    model = get_peft_model(base, sft.lora_config(recipe, base, learnt))
    if recipe.model.add_tokens:
        added_tokens.show_head(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def training_arguments(recipe: Recipe, device: Device, out: Path) -> TrainingArguments:
    """TrainingArguments from the recipe's train section, with the settings that qkit's rows and the device need."""
    from transformers import TrainingArguments

    recipe = plan_plan.decided(recipe, device)
    given = {**_shared.arguments(recipe, device, out), "bf16": recipe.train.bf16}
    args: TrainingArguments = _shared.on_one_device(TrainingArguments(remove_unused_columns=False, **given))
    return args
