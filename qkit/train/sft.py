"""TRL's trainer and PEFT's adapter, from the recipe."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.batching import part_sizes
from qkit.core.device import Device
from qkit.core.errors import RecipeError
from qkit.core.files import need_disk, read_json
from qkit.core.sources import cache_dir
from qkit.model import added_tokens, load, targets
from qkit.model import tokenizer as model_tokenizer
from qkit.plan import plan as plan_plan
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.train.trainer import trainer_class

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel
    from trl import SFTConfig, SFTTrainer


UNPACKED = 8  # Arrow bytes for a byte of Parquet: ids of two bytes take four, and labels hardly anything in Parquet


def build_trainer(run: Run, folder: Path, device: Device, out: Path) -> SFTTrainer:
    """The trainer on the run's tokenized rows, with the model loaded as the recipe says.

    Raises:
        RecipeError: the model does not do gradient checkpointing.
    """
    from datasets import Dataset

    from qkit.train.fast.heap import give_back_between_layers

    how = run.recipe
    args = sft_config(how, device, out)
    columns = ["input_ids", "labels", *(("pack", "position") if how.data.packing else ())]
    file, cache = run.need("data", "train.parquet"), cache_dir() / "datasets"
    cache.mkdir(parents=True, exist_ok=True)
    need_disk(cache, file.stat().st_size * UNPACKED, "the training rows, unpacked")
    rows = Dataset.from_parquet(str(file), columns=columns, cache_dir=str(cache))
    base, tokenizer = load.load_base(folder, how, device), model_tokenizer.load_tokenizer(folder, how.model)
    if args.gradient_checkpointing and not base.supports_gradient_checkpointing:
        raise RecipeError(
            f"{type(base).__name__} cannot compute its layers twice: set train.gradient_checkpointing=false (it is "
            f"{how.train.gradient_checkpointing})"
        )
    made: SFTTrainer = trainer_class()(
        model=base,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora_config(how, base, added_tokens.learnt_rows(base, tokenizer, how.model.add_tokens)),
        pad=read_json(run.need("data", "tokens.json"))["pad"],
        batch_tokens=how.data.batch_tokens,
        labelled_head=device.uses_labelled_head,
        packing=how.data.packing,
        micro_batches=how.micro_batches,
        checkpoints_kept=how.train.save_total_limit,
    )
    if how.model.add_tokens:
        added_tokens.show_head(made.model)
    if device.frees_through_malloc:
        give_back_between_layers(made.base_model)
    return made


def sft_config(how: Recipe, device: Device, out: Path) -> SFTConfig:
    """SFTConfig from the recipe's train section, and what our rows and this device need."""
    from trl import SFTConfig

    how = plan_plan.decided(how, device)
    args = SFTConfig(
        output_dir=str(out / "checkpoints"),
        seed=how.seed,
        max_length=None,  # the data stage has decided about lengths; TRL would cut the answer off
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=1,  # batches come from the token budget
        report_to=[],
        disable_tqdm=True,
        logging_nan_inf_filter=False,  # it would log 0 for a loss that is none
        save_strategy="steps",
        **device.trainer_arguments,
        **how.train.model_dump(
            exclude={"save_total_limit"}
        ),  # the trainer would delete the old one before the new one is whole
    )
    args._n_gpu = min(args.n_gpu, 1)  # where more are visible, the trainer would spread each batch over all of them
    return args


def lora_config(
    how: Recipe, base: PreTrainedModel, learnt_rows: Mapping[str, Sequence[int]] | None = None
) -> LoraConfig:
    """The recipe's lora section as peft's LoraConfig for this model. `learnt_rows`: of embedding and head, learnt as they are, by module.

    Raises:
        ModelError: it names what the model does not have, or what peft cannot train.
    """
    from peft import LoraConfig

    fields = how.lora.model_dump(exclude={"target_modules", "target_parameters"})
    named = targets.for_peft(how.lora, base)
    return LoraConfig(task_type="CAUSAL_LM", trainable_token_indices=learnt_rows, **fields, **named)


def most_labelled(trainer: Any) -> int:
    """The most tokens that carry loss in any pack, or part of a batch: what the head and the loss have to hold."""
    most = 0
    for batch in trainer.batches():
        labelled = iter([trainer.labelled_tokens[row] for row in batch])
        sizes = [len(batch)] if trainer.packing else part_sizes(len(batch), trainer.micro_batches)
        most = max(most, *(sum(itertools.islice(labelled, size)) for size in sizes))
    return most
