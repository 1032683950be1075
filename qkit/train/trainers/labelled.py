"""The Trainer of transformers for tasks with labels: a new head, a loss of the recipe, and what recipe.method trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.device import Device
from qkit.core.files import read_json
from qkit.model import load
from qkit.model.adapters import methods
from qkit.plugins.task import open_task, read_labels
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.train import losses
from qkit.train.trainer import Counted
from qkit.train.trainers import _shared

if TYPE_CHECKING:
    import torch
    from transformers import Trainer, TrainingArguments

COLUMNS = ("input_ids", "token_type_ids", "labels")


class CountedLabels(Counted):
    """What qkit changes in a Trainer whose rows have labels. `loss`: (logits, labels) -> losses [labels], summed here."""

    def __init__(self, *args: Any, loss: losses.Loss, **kwargs: Any):
        self._loss = loss
        super().__init__(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The sum of the losses, divided by the labels of the whole accumulated batch: the same gradient whatever the accumulation."""
        labels = inputs["labels"]
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        total = self._loss(logits.float(), labels).sum()
        return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

    def row_losses(self, inputs: Any) -> torch.Tensor:
        """The loss of each row in nats, [rows] fp64; without gradients."""
        kept = {name: value for name, value in inputs.items() if name not in ("labels", "lengths")}
        return self._loss(self.model(**kept).logits.float(), inputs["labels"]).double()


def build_trainer(run: Run, folder: Path, device: Device, out: Path) -> Trainer:
    """The trainer on the run's tokenized rows, with the model loaded as the recipe says.

    Raises:
        RecipeError: the method cannot train the model, or the loss cannot be found.
    """
    from transformers import Trainer

    recipe, task = run.recipe, open_task(run.recipe.task)
    data = run.need("data", "labels.json").parent
    pad = read_json(data / "tokens.json")["pad"]
    base = load.load_base(folder, recipe, device, read_labels(data))
    trainer_class = type("Trainer", (CountedLabels, Trainer), {})
    trainer: Trainer = trainer_class(
        model=methods.prepared(base, folder, recipe),
        args=training_arguments(recipe, device, out),
        train_dataset=_shared.training_rows(data / "train.parquet", COLUMNS),
        loss=losses.open_loss(recipe.loss, data),
        pad=pad,
        batch_tokens=recipe.data.batch_tokens,
        batch_rows=recipe.data.batch_rows,
        length_step=task.LENGTH_STEP,
        collator=task.collate,
        micro_batches=recipe.micro_batches,
        checkpoints_kept=recipe.train.save_total_limit,
    )
    return trainer


def training_arguments(recipe: Recipe, device: Device, out: Path) -> TrainingArguments:
    """TrainingArguments from the recipe's train section, with the settings that qkit's rows and the device need."""
    from transformers import TrainingArguments

    given = {**_shared.arguments(recipe, device, out), "bf16": recipe.train.bf16}
    args: TrainingArguments = _shared.on_one_device(TrainingArguments(remove_unused_columns=False, **given))
    return args
