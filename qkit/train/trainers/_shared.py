"""What every trainer is given alike: the training rows, and arguments from the recipe's train section."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.batching import within_budget
from qkit.core.device import Device
from qkit.core.errors import RecipeError
from qkit.core.files import need_disk, read_json
from qkit.core.sources import cache_dir
from qkit.recipe import schedule
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.train import row_weights

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel


FIRST_ROWS = 256  # that an adapter which starts along its inputs reads
# Fields of the train section that are not given to transformers: it would delete the old checkpoint before the new one is complete, and
# evaluation is set once the rows are known (validation.py); trackers and the loss are qkit's own.
OF_QKIT = {
    "save_total_limit",
    "activation_offloading",
    "bf16",
    "embedding_learning_rate",
    "eval_strategy",
    "eval_steps",
    "eval_on_start",
    "eval_rows",
    "eval_score_rows",
    "metric_for_best_model",
    "load_best_model_at_end",
    "early_stopping_patience",
    "early_stopping_threshold",
    "trainable",
    "report_to",
    "run_name",
    "loss_type",
    "label_smoothing_factor",
}
UNPACKED = 8  # Arrow bytes per byte of Parquet: ids take four bytes instead of two, and labels compress to almost nothing in Parquet


def training_rows(file: Path, columns: Sequence[str]) -> Dataset:
    """These columns of train.parquet.

    Raises:
        DoesNotFit: the disk has too little room for the rows, unpacked.
    """
    from datasets import Dataset

    cache = cache_dir() / "datasets"
    cache.mkdir(parents=True, exist_ok=True)
    need_disk(cache, file.stat().st_size * UNPACKED, "the training rows, unpacked")
    rows: Dataset = Dataset.from_parquet(str(file), columns=list(columns), cache_dir=str(cache))
    return rows


def first_batches(run: Run) -> list[dict[str, torch.Tensor]]:
    """Ids and masks of the first batches of the training rows, as they are on disk."""
    import torch

    recipe = run.recipe
    pad = read_json(run.need("data", "tokens.json"))["pad"]
    rows = training_rows(run.need("data", "train.parquet"), ["input_ids"])["input_ids"][:FIRST_ROWS]
    batches = []
    for batch in within_budget([len(row) for row in rows], recipe.data.batch_tokens):
        ids = [torch.tensor(row) for row in rows[batch.start : batch.stop]]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in ids])
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        batches.append({"input_ids": padded, "attention_mask": mask})
    return batches


def weight(recipe: Recipe) -> list[str]:
    """The column of the rows' weights, if the recipe has them."""
    return [] if recipe.data.weight is None else [row_weights.COLUMN]


def arguments(recipe: Recipe, device: Device, out: Path) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments, with the settings that qkit's rows and the device need; what only TRL knows is left out."""
    return {
        "output_dir": str(out / "checkpoints"),
        "seed": recipe.seed,
        "per_device_train_batch_size": 1,  # batches come from the token budget
        "report_to": [],  # trackers receive their events from qkit.tracking, where they may fail
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it would log a NaN loss as 0
        "save_strategy": "steps",
        **device.trainer_arguments,
        **recipe.train.model_dump(exclude=OF_QKIT),
        # transformers takes a schedule that follows a metric together with the rows to evaluate only (optimization.py).
        **(
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}}
            if schedule.follows_metric(recipe.train)
            else {}
        ),
    }


def on_one_device(args: Any) -> Any:
    """The arguments for one GPU at most: with several visible ones, the trainer would split each batch over all of them."""
    args._n_gpu = min(args.n_gpu, 1)
    return args


def check_checkpointing(base: PreTrainedModel, args: Any, recipe: Recipe) -> None:
    """Raise RecipeError if training is to compute layers again and the model does not support that."""
    if args.gradient_checkpointing and not base.supports_gradient_checkpointing:
        raise RecipeError(
            f"{type(base).__name__} does not support gradient checkpointing: set train.gradient_checkpointing=false (now "
            f"{recipe.train.gradient_checkpointing})"
        )
