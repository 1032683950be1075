"""Trainers with qkit's batches or packs, and counts of every label in the loss: any Trainer, and TRL's SFTTrainer with qkit's head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from qkit.core.batching import IGNORED, LENGTH_STEP, PackBatches, SeededBatches, TokenBudgetBatches, part_sizes
from qkit.model.adapters.rates import Rates, divide
from qkit.recipe import schedule
from qkit.train import best_step, checkpoints, pack_isolation, row_weights
from qkit.train.fast.head import labelled_loss, row_losses
from qkit.train.fast.token_loss import PLAIN, TokenLoss
from qkit.train.label_sums import Sums

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from datasets import Dataset
    from numpy.typing import NDArray
    from torch.utils.data import DataLoader
    from transformers import Trainer as Base
    from trl import SFTTrainer as LanguageBase
else:
    Base = LanguageBase = object


class Evaluates(Protocol):
    """What evaluates a model during its training: validation.py."""

    @property
    def keeps_best(self) -> bool: ...

    def evaluate(self, trainer: Any) -> dict[str, float]: ...


class Counted(Base):
    """What qkit changes in a Trainer. `train_dataset` has the columns input_ids and labels, and with `packing` pack and position."""

    divisors = "in the divisors of the loss"  # where the third count of labels comes from, for people
    read_rows: Callable[[Path], Dataset] | None = None  # where a row trains on more than columns of its file
    lr_scheduler: Any

    def __init__(
        self,
        *args: Any,
        pad: int,
        batch_tokens: int,
        collator: Callable[..., dict[str, torch.Tensor]],
        packing: bool = False,
        length_step: int = LENGTH_STEP,
        batch_rows: int | None = None,
        micro_batches: int = 1,
        checkpoints_kept: int = 1,
        rates: Rates | None = None,
        **kwargs: Any,
    ):
        self.checkpoints_kept = checkpoints_kept
        self.rates = rates
        self.validation: Evaluates | None = None  # validation.attach sets it
        self.evaluation_seconds = 0.0
        self.best_step_here: int | None = None  # that this process has kept
        self.packing = packing
        self.length_step = length_step
        self.batch_rows = batch_rows or math.inf
        self.micro_batches = micro_batches
        self.sums = Sums()
        self.real_tokens = 0
        self.loss: Any = 0.0  # of the current step
        self.grad_norm: Any = 0.0
        self.pad = pad
        self.batch_tokens = batch_tokens
        self.collator = collator
        begun = _trained_tensors(kwargs.get("model"))
        super().__init__(*args, data_collator=self.collate, **kwargs)
        self.labelled_tokens, self._label_checksums = label_counts(self.train_dataset)
        self.row_weights = row_weights.of_rows(self.train_dataset)
        self.sums.drawn_weight = None if self.row_weights is None else 0.0
        # The losses divide by num_items_in_batch, whatever the model's own forward takes.
        self.model_accepts_loss_kwargs = True
        train_in_fp32(self.model, begun)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch or a pack, with the numbers of its rows."""
        import torch

        batch = {**self.collator(rows, self.pad, self.packing), "rows": torch.tensor([row["row"] for row in rows])}
        if self.row_weights is None:
            return batch
        weights = [row[row_weights.COLUMN] for row in rows]
        return {**batch, "weights": row_weights.of_batch(weights, batch, self.packing)}

    def batches(self) -> SeededBatches:
        """The batch sampler, at its first epoch: packs, or batches by token budget."""
        if self.packing:
            return PackBatches(self.train_dataset["pack"][:], self.train_dataset["position"][:], self.args.seed)
        rows, seed = lengths(self.train_dataset), self.args.seed
        return TokenBudgetBatches(rows, self.batch_tokens, seed, self.length_step, self.batch_rows)

    def get_train_dataloader(self) -> DataLoader[Any]:
        from torch.utils.data import DataLoader

        numbered = self.train_dataset.add_column("row", range(len(self.train_dataset)))
        loader: DataLoader[Any] = DataLoader(numbered, batch_sampler=self.batches(), collate_fn=self.collate)
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Forward and backward pass of a batch, in `micro_batches` parts whose losses and gradients add up."""
        self._count(inputs, num_items_in_batch)
        sizes = part_sizes(len(inputs["input_ids"]), self.micro_batches)
        parts = zip(*(tensor.split(sizes) for tensor in inputs.values()), strict=True)
        total = 0.0
        for part in parts:
            total += super().training_step(model, dict(zip(inputs, part, strict=True)), num_items_in_batch)
        self.loss += total
        return total

    def create_optimizer(self, model: Any = None) -> Any:
        """transformers' own, with groups of parameters by their rate if these differ."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.rates is not None and self.rates.differ:
            divide(optimizer, self.model, self.rates)
        return optimizer

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """What the loss is divided by: the labels of the accumulated batch, or their weights."""
        if self.row_weights is None or not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        return row_weights.divisor(batch_samples).to(device)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """transformers' schedule, except that the rate is above 0 in the first step of a warm-up and at its maximum right after the last."""
        from torch.optim.lr_scheduler import LambdaLR

        if self.lr_scheduler is None and not schedule.follows_metric(self.args):
            rate = schedule.factor(self.args, num_training_steps)
            self.lr_scheduler, self._created_lr_scheduler = LambdaLR(optimizer or self.optimizer, rate), True
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if (floor := (self.args.lr_scheduler_kwargs or {}).get("min_lr")) and schedule.follows_metric(self.args):
            groups = (optimizer or self.optimizer).param_groups  # each falls to the same share of its own rate
            scheduler.min_lrs = [floor * float(group["lr"]) / self.args.learning_rate for group in groups]
        return scheduler

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Evaluate the validation rows, log the figures under transformers' names, such as eval_loss, and return them."""
        assert self.validation is not None
        self._use_averages()
        return self.validation.evaluate(self)

    def _use_averages(self) -> None:
        """Have an optimizer that averages weights put these in place of the ones it trains; the next step puts those back."""
        if callable(use := getattr(self.optimizer, "eval", None)):
            use()

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        """Keep what is trained as it is after the best step so far, if that is what is wanted."""
        is_best: bool = super()._determine_best_metric(metrics, trial)
        if is_best and self.validation and self.validation.keeps_best:
            best_step.keep(self)
        return is_best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Seal the checkpoint when it is complete, and only then delete older ones."""
        self._use_averages()
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir)
        checkpoints.seal(folder / f"checkpoint-{self.state.global_step}")
        checkpoints.thin(folder, self.checkpoints_kept)
        best_step.thin(folder, self.state.best_global_step)

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        """Save the model of a checkpoint so that it can be read back."""
        with checkpoints.readable(self.model):
            super()._save(output_dir, state_dict)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.grad_norm

    @property
    def base_model(self) -> Any:
        """The model inside PEFT's wrapper, with the adapter in its layers."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _count(self, inputs: dict[str, torch.Tensor], items: torch.Tensor) -> None:
        """Count a batch, once. `items` is counted when the optimizer steps on the accumulated gradients."""
        rows = inputs.pop("rows").tolist()
        labels = self.labels_in(inputs)
        self.real_tokens += int(inputs.pop("lengths").sum())
        self.sums.drawn += sum(self.labelled_tokens[row] for row in rows)
        self.sums.drawn_checksum += sum(self._label_checksums[row] for row in rows)
        self.sums.in_batches += len(labels)
        if self.row_weights is not None:
            self.sums.drawn_weight += sum(self.labelled_tokens[row] * self.row_weights[row] for row in rows)
        self.sums.in_batches_checksum += int(labels.sum())
        if self.accelerator.sync_gradients:
            self.sums.divided_by += int(items) if self.row_weights is None else float(items)

    def labels_in(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The labels of a batch that carry loss, [labels]: ids; or the sum of the bits of each row's numbers, [rows]."""
        labels = inputs["labels"]
        return _bits(labels) if labels.is_floating_point() else labels[labels != IGNORED]

    def items(self, rows: Dataset) -> list[int]:
        """By how many labels `row_losses` of each row is divided for its mean."""
        return label_counts(rows)[0]

    def row_losses(self, inputs: Any) -> torch.Tensor:
        """The sum of each row's losses in nats, [rows] fp64; without gradients."""
        raise NotImplementedError


class CountedLanguage(Counted, LanguageBase):
    """What qkit changes in SFTTrainer. `labelled_head`: compute the head on labelled positions only, with the loss `token_loss`.

    Otherwise TRL computes the loss that its arguments name.
    """

    def __init__(self, *args: Any, labelled_head: bool, token_loss: TokenLoss = PLAIN, **kwargs: Any):
        self._labelled_head = labelled_head
        self._token_loss = token_loss
        super().__init__(*args, **kwargs)

    def labels_in(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The labels that are the token at their place: an ignored label is not a token id."""
        ids = inputs["input_ids"]
        return ids[inputs["labels"] == ids]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if not self._labelled_head:
            return self._bare_loss(model, inputs, num_items_in_batch)
        with self.accelerator.autocast():
            return self._bare_loss(self.base_model, inputs, num_items_in_batch)

    def _bare_loss(self, model: Any, inputs: Any, items: Any) -> torch.Tensor:
        if self._labelled_head:
            return labelled_loss(model, inputs, items, self._token_loss)
        loss: torch.Tensor = super().compute_loss(model, inputs, num_items_in_batch=items)
        return loss

    def row_losses(self, inputs: Any) -> torch.Tensor:
        """The sum of each row's losses in nats, [rows] fp64; without gradients."""
        return row_losses(self.base_model, inputs)

    def isolation(self) -> pack_isolation.IsolationResult:
        """Check whether the loss of this trainer keeps the documents of a pack apart."""
        self.model.eval()  # TRL's loss collects metrics, and keeps those of evaluation separate
        trained_with = self._token_loss, self.args.loss_type
        self._token_loss, self.args.loss_type = PLAIN, PLAIN.name  # the tolerances are those of the cross-entropy
        try:
            return pack_isolation.check(self.base_model, self._replica_loss)
        finally:
            self._token_loss, self.args.loss_type = trained_with

    def _replica_loss(self, replica: Any, inputs: Any, items: int) -> torch.Tensor:
        if not self._labelled_head and "forward" not in vars(replica):
            add_trl_head(replica)
        return self._bare_loss(replica, inputs, items)


def _trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors in fp32 of an adapter that has its first weights already: TRL rounds them to bf16 on a base in 4 bits."""
    if not hasattr(model, "peft_config"):
        return {}
    return {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}


def train_in_fp32(model: Any, begun: Mapping[str, torch.Tensor] = MappingProxyType({})) -> None:
    """In bf16, where TRL keeps the adapter, small optimizer steps round to zero; autocast computes in bf16 anyway.

    `begun`: the values of tensors that have been rounded meanwhile.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = begun[name].to(parameter.device) if name in begun else parameter.data.float()


def trainer_class() -> Any:
    """The trainer as a subclass of SFTTrainer. A function, to import TRL no sooner than needed."""
    from trl import SFTTrainer

    return type("Trainer", (CountedLanguage, SFTTrainer), {})


def add_trl_head(model: Any) -> None:
    """Add TRL's fused head to a model that SFTTrainer has not wrapped."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


def lengths(rows: Dataset) -> list[int]:
    """Tokens of each row."""
    import pyarrow.compute as pc

    counts: list[int] = pc.list_value_length(_column(rows, "input_ids")).to_pylist()
    return counts


def label_counts(rows: Dataset) -> tuple[list[int], list[int]]:
    """For each row: the number of labels with loss, and the sum of their ids; of numbers, one, and the sum of their bits."""
    import numpy as np

    counts: list[int] = []
    checksums: list[int] = []
    for chunk in _column(rows, "labels").chunks:
        labels, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
        if labels.dtype == np.float32:
            counts.extend([1] * len(chunk))
            checksums.extend(_sums(labels.view(np.int32), offsets))
            continue
        labelled = labels != IGNORED
        counts.extend(_sums(labelled, offsets))
        checksums.extend(_sums(np.where(labelled, labels, 0), offsets))
    return counts, checksums


def _sums(values: NDArray[Any], offsets: NDArray[Any]) -> list[int]:
    """The sum of each row's values, which `offsets` part."""
    import numpy as np

    before = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    sums: list[int] = (before[offsets[1:]] - before[offsets[:-1]]).tolist()
    return sums


def _bits(numbers: torch.Tensor) -> torch.Tensor:
    """The sum of each row's bits, read as whole numbers, [rows]. `numbers`: [rows, n] fp32."""
    import torch

    return numbers.contiguous().view(torch.int32).long().sum(-1)


def _column(rows: Dataset, name: str) -> pa.ChunkedArray:
    return rows.with_format("arrow")[:].column(name)
