"""TRL's trainer and PEFT's adapter, from the recipe."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.core.device import Device
from qkit.core.files import read_json
from qkit.model import added_tokens, load
from qkit.model import tokenizer as model_tokenizer
from qkit.model.adapters import layers, methods, starts, targets
from qkit.model.adapters.rates import rates_of
from qkit.plan import plan as plan_plan
from qkit.plugins.task import open_task
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.train.fast import token_loss
from qkit.train.trainer import trainer_class
from qkit.train.trainers import _shared

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer


def build_trainer(run: Run, folder: Path, device: Device, out: Path) -> SFTTrainer:
    """The trainer on the run's tokenized rows, with the model loaded as the recipe says.

    Raises:
        RecipeError: the model does not support gradient checkpointing.
    """
    from qkit.train.fast.heap import trim_between_layers

    recipe, task = run.recipe, open_task(run.recipe.task)
    args = sft_config(recipe, device, out)
    rows = _shared.training_rows(run.need("data", "train.parquet"), _columns(recipe))
    base, tokenizer = load.load_base(folder, recipe, device), model_tokenizer.load_tokenizer(folder, recipe.model)
    _shared.check_checkpointing(base, args, recipe)
    model, adapter = _prepared(run, folder, base, tokenizer, out)
    trainer: SFTTrainer = trainer_class()(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter,
        pad=read_json(run.need("data", "tokens.json"))["pad"],
        batch_tokens=recipe.data.batch_tokens,
        batch_rows=recipe.data.batch_rows,
        collator=task.collate,
        labelled_head=device.uses_labelled_head or recipe.needs_losses,
        token_loss=token_loss.of(recipe.train),
        packing=recipe.data.packing,
        micro_batches=recipe.micro_batches,
        checkpoints_kept=recipe.train.save_total_limit,
        rates=rates_of(recipe),
    )
    if recipe.layers.unfreeze_steps:
        trainer.add_callback(layers.unfreezing(trainer.model, recipe.layers))
    if recipe.method == "lora" and recipe.model.add_tokens:
        added_tokens.show_head(trainer.model)
    _say_loss(run)
    if device.frees_through_malloc:
        trim_between_layers(trainer.base_model)
    return trainer


def _prepared(
    run: Run, folder: Path, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path
) -> tuple[PreTrainedModel | PeftModel, LoraConfig | None]:
    """The model to train; and the adapter that TRL still has to put on it, where it starts at zero."""
    import transformers

    recipe = run.recipe
    if recipe.method != "lora":
        transformers.set_seed(recipe.seed)
        return methods.with_method(base, (), recipe), None
    config = lora_config(recipe, base, added_tokens.trained_rows(base, tokenizer, recipe.model.add_tokens))
    if starts.is_plain(recipe.lora):
        return base, config
    transformers.set_seed(recipe.seed)
    model = starts.put(base, config)
    starts.begin(model, recipe.lora, folder, out / "checkpoints", functools.partial(_shared.first_batches, run))
    return model, None


def _columns(recipe: Recipe) -> list[str]:
    packs = ("pack", "position") if recipe.data.packing else ()
    return ["input_ids", "labels", *packs, *_shared.weight(recipe)]


def _say_loss(run: Run) -> None:
    if remark := token_loss.of(run.recipe.train).remark:
        run.progress.notify(f"train: {remark}; losses of rows and of held-out rows are the plain cross-entropy")


def sft_config(recipe: Recipe, device: Device, out: Path) -> SFTConfig:
    """SFTConfig from the recipe's train section, with the settings that qkit's rows and the device need."""
    from trl import SFTConfig

    recipe = plan_plan.decided(recipe, device)
    args: SFTConfig = _shared.on_one_device(
        SFTConfig(
            max_length=None,  # the data stage has applied data.too_long; TRL would truncate answers
            dataset_kwargs={"skip_prepare_dataset": True},
            activation_offloading=recipe.train.activation_offloading,
            loss_type=recipe.train.loss_type,
            **{**_shared.arguments(recipe, device, out), "bf16": recipe.train.bf16},
        )
    )
    return args


def lora_config(
    recipe: Recipe, base: PreTrainedModel, learnt_rows: Mapping[str, Sequence[int]] | None = None
) -> LoraConfig:
    """The recipe's lora section as peft's LoraConfig. `learnt_rows`: by module, rows of embedding and head that are trained in full.

    Raises:
        ModelError: a target does not exist in the model, or peft cannot train it.
    """
    from peft import LoraConfig

    named = targets.for_peft(recipe.lora, base)
    head = open_task(recipe.task).HEAD
    return LoraConfig(
        task_type=head.peft_task_type, trainable_token_indices=learnt_rows, **starts.fields(recipe.lora), **named
    )
