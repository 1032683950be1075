"""The Trainer of transformers for tasks with labels: a new head, a loss of the recipe, and what recipe.method trains.

Labels that are ids count one by one; a row whose labels are numbers counts as one (see Counted.labels_in).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qkit.core.device import Device
from qkit.core.errors import listed
from qkit.core.files import read_json
from qkit.model import load
from qkit.model.adapters import layers, methods, new_heads, starts
from qkit.model.adapters.rates import rates_of
from qkit.plugins.task import Losses, open_task, read_labels
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.train import losses
from qkit.train.fast.heap import trim_before_layers
from qkit.train.trainer import Counted, train_in_fp32
from qkit.train.trainers import _shared

if TYPE_CHECKING:
    import torch
    from transformers import Trainer, TrainingArguments


COLUMNS = ("input_ids", "token_type_ids", "labels")


class CountedLabels(Counted):
    """What qkit changes in a Trainer whose rows have labels. `losses`: (outputs of the model, batch) -> losses [rows]."""

    def __init__(
        self,
        *args: Any,
        losses: Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor],
        **kwargs: Any,
    ):
        self._losses = losses
        super().__init__(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The sum of the losses, divided by the labels of the whole accumulated batch: the same gradient whatever the accumulation."""
        losses = self._losses(model(**_of_model(inputs)), inputs)
        total = (losses * inputs["weights"] if "weights" in inputs else losses).sum()
        return total / (len(self.labels_in(inputs)) if num_items_in_batch is None else num_items_in_batch)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """transformers counts every number of a row, where the row counts as one."""
        import torch

        if self.row_weights is not None or not batch_samples or not batch_samples[0]["labels"].is_floating_point():
            return super()._get_num_items_in_batch(batch_samples, device)
        return torch.tensor(sum(len(batch["labels"]) for batch in batch_samples), device=device)

    def row_losses(self, inputs: Any) -> torch.Tensor:
        """The sum of each row's losses in nats, [rows] fp64; without gradients."""
        return self._losses(self.model(**_of_model(inputs)), inputs).double()


def _of_model(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a batch the model reads."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}


def build_trainer(run: Run, folder: Path, device: Device, out: Path) -> Trainer:
    """The trainer on the run's tokenized rows, with the model loaded as the recipe says.

    Raises:
        RecipeError: the method cannot train the model, or the loss cannot be found.
    """
    from transformers import Trainer

    recipe, task = run.recipe, open_task(run.recipe.task)
    of_rows: Losses = cast(Losses, task)
    data = run.need("data", "labels.json").parent
    pad = read_json(data / "tokens.json")["pad"]
    base = load.load_base(folder, recipe, device, read_labels(data))
    if kept := new_heads.stored(base, folder):
        run.progress.notify(f"train: {_of_kept_head(folder, kept, read_labels(data))}")
    model: Any = methods.prepared(base, folder, recipe)
    if recipe.method == "lora":
        train_in_fp32(model)  # a head in 16 bits would round what it begins with
        starts.begin(model, recipe.lora, folder, out / "checkpoints", partial(_shared.first_batches, run))
    trainer_class = type("Trainer", (CountedLabels, Trainer), {})
    trainer: Trainer = trainer_class(
        model=model,
        args=training_arguments(recipe, device, out),
        train_dataset=_shared.training_rows(data / "train.parquet", [*COLUMNS, *_shared.weight(recipe)]),
        losses=partial(of_rows.losses, loss=losses.open_loss(recipe.loss, data, base)),
        pad=pad,
        batch_tokens=recipe.data.batch_tokens,
        batch_rows=recipe.data.batch_rows,
        length_step=task.LENGTH_STEP,
        collator=task.collate,
        micro_batches=recipe.micro_batches,
        checkpoints_kept=recipe.train.save_total_limit,
        rates=rates_of(recipe),
    )
    if device.frees_through_malloc:
        trim_before_layers(trainer.model)
    if recipe.layers.unfreeze_steps:
        trainer.add_callback(layers.unfreezing(trainer.model, recipe.layers))
    return trainer


def _of_kept_head(folder: Path, kept: Sequence[str], labels: Sequence[str]) -> str:
    """What to know of a base model that has a head for as many labels already, which training goes on from."""
    named = read_json(folder / "config.json").get("id2label") or {}
    theirs = [name for _, name in sorted((int(number), name) for number, name in named.items())]
    said = f"for the labels {listed(theirs)}" if theirs else "for labels without names"
    return (
        f"the base model has a head already ({', '.join(kept)}), {said}; training goes on from its weights, with the labels "
        f"{listed(labels)} in this order"
    )


def training_arguments(recipe: Recipe, device: Device, out: Path) -> TrainingArguments:
    """TrainingArguments from the recipe's train section, with the settings that qkit's rows and the device need."""
    from transformers import TrainingArguments

    given = {**_shared.arguments(recipe, device, out), "bf16": recipe.train.bf16}
    args: TrainingArguments = _shared.on_one_device(TrainingArguments(remove_unused_columns=False, **given))
    return args
