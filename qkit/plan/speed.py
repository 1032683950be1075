"""Training time: a lower bound from the card's data sheet, or an estimate from earlier runs on this machine.

The bound counts FLOPs and reads of the weights only, so a step takes at least as long. After a run, its speed is stored in FLOP/s, and later
plans for the same device use that instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from qkit.core.device import Device
from qkit.core.files import read_json, write_json
from qkit.core.sources import cache_dir
from qkit.model.shape import linear_parameters
from qkit.plan import gpus
from qkit.plan._subject import Subject
from qkit.plan._traced import items as traced_items
from qkit.plan._traced.head import NewHead
from qkit.plan.fixed_memory import adapter_count, weight_bytes
from qkit.recipe.schema import WHOLE, Recipe

REMEMBERED = 8  # runs per device; their median is used


@dataclass(frozen=True)
class Pace:
    """Training speed and time in seconds; None: unknown. `bound`: a lower bound on time, else an estimate. `basis`: its source."""

    tokens_per_second: float | None
    tokens: int | None
    steps: int | None
    seconds: float | None
    bound: bool
    basis: str

    def to_dict(self) -> dict[str, Any]:
        """For `--json`, where the basis is called "how"."""
        fields = asdict(self)
        return {"how" if name == "basis" else name: value for name, value in fields.items()}


def flops_per_token(recipe: Recipe, shape: Subject, labelled_share: float = 1.0) -> float:
    """FLOPs to train on one token: the forward pass, and the backward pass, which computes no gradients of frozen weights; with method=full
    all count as trained.

    Each pass takes two FLOPs per weight; with checkpointing, the forward pass runs twice. Gradients of the adapter's weights are computed as
    well. Under a causal mask, a token attends to half of a row on average. `labelled_share`: share of the tokens that the head runs on.
    Of a model with a new head, all are counted in a trace of its largest batch.
    """
    if isinstance(shape, NewHead):
        return traced_items.flops_per_token(recipe, shape)
    passes, whole = 3 if recipe.train.gradient_checkpointing else 2, recipe.method == "full"
    active = linear_parameters(shape) + len(shape.sparse) * shape.active_experts * 3 * shape.hidden * shape.expert_width
    head = 2 * (2 + whole) * shape.vocabulary * shape.hidden * labelled_share
    adapter = 0 if whole else 2 * (passes + 1) * adapter_count(recipe, shape)
    attended = min(recipe.data.max_length, shape.window or recipe.data.max_length) / 2
    attention = (
        shape.layers * 2 * 2 * shape.attention * attended * (passes + 1)
    )  # its backward pass has twice the products
    return 2 * (passes + whole) * active + head + adapter + attention


def forward_share(recipe: Recipe, shape: Subject) -> float:
    """FLOPs of a forward pass alone / those of training, for each token. Of a traced model: a third, or half if only an adapter learns."""
    if isinstance(shape, NewHead):
        return 1 / 3 if recipe.method in WHOLE else 1 / 2
    passes = 3 if recipe.train.gradient_checkpointing else 2
    return 1 / passes


def evaluation_seconds(pace: Pace, share: float, tokens: int, evaluations: int) -> float | None:
    """An estimate of how long forward passes over validation rows take, from the speed of training; or a lower bound, as the pace is.

    `share`: `forward_share`; `tokens`: of one evaluation.
    """
    return tokens * evaluations * share / pace.tokens_per_second if pace.tokens_per_second else None


def batch_seconds(recipe: Recipe, shape: Subject, card: gpus.Card, labelled_share: float = 1.0) -> float | None:
    """A lower bound on the seconds per batch on a card; None for a card without bf16.

    Each pass of each micro-batch reads all weights; 4-bit weights are also written and read in bf16.
    """
    if card.bf16_flops is None:
        return None
    passes = (3 if recipe.train.gradient_checkpointing else 2) * recipe.micro_batches
    arithmetic = recipe.data.batch_tokens * flops_per_token(recipe, shape, labelled_share) / card.bf16_flops
    return max(arithmetic, passes * _bytes_read(recipe, shape) / card.bandwidth)


def _bytes_read(recipe: Recipe, shape: Subject) -> int:
    """Bytes of weights that a pass reads, and writes and reads where they are unpacked."""
    if isinstance(shape, NewHead):
        return traced_items.weight_bytes(recipe, shape)
    unpacked = 2 * 2 * linear_parameters(shape) if recipe.quantization.load_in_4bit else 0
    return weight_bytes(recipe, shape) + unpacked


def time_factor(before: Recipe, after: Recipe, shape: Subject, device: Device) -> float:
    """Training time per token with the recipe `after`, as a multiple of that with `before`."""
    card = gpus.find(device)
    if card is not None and card.bf16_flops is not None:
        seconds = [batch_seconds(recipe, shape, card) for recipe in (before, after)]
        each = [time / recipe.data.batch_tokens for time, recipe in zip(seconds, (before, after), strict=True) if time]
        return each[1] / each[0]
    return flops_per_token(after, shape) / flops_per_token(before, shape)


def pace(recipe: Recipe, shape: Subject, device: Device, rows: Rows | None) -> Pace:
    """Speed and time of training: estimated from earlier runs on this device, else the bound of the card."""
    share = rows.labelled / rows.tokens if rows and rows.tokens else 1.0
    flops = flops_per_token(recipe, shape, share)
    tokens, steps = _work(recipe, rows)
    if (earlier := remembered(device)) is not None:
        speed, bound, basis = earlier / flops, False, f"{earlier / 1e9:,.0f} GFLOP/s in earlier runs here"
    elif (card := gpus.find(device)) is not None and (least := batch_seconds(recipe, shape, card, share)):
        speed, bound, basis = recipe.data.batch_tokens / least, True, _bound(card)
    else:
        return Pace(
            None,
            tokens,
            steps,
            None,
            True,
            f"no earlier run on {gpus.title(device)}, and its data sheet is not known",
        )
    return Pace(
        speed, tokens, steps, tokens / speed if tokens else None, bound, f"{basis}; {flops / 1e9:,.2f} GFLOP per token"
    )


def _bound(card: gpus.Card) -> str:
    tflops = (card.bf16_flops or 0) / 1e12
    return f"lower bound: {card.title}, {tflops:,.0f} TFLOP/s in bf16, {card.bandwidth / 1e9:,.0f} GB/s"


@dataclass(frozen=True)
class Rows:
    """The number of training rows that a recipe keeps, their tokens, and their tokens with loss."""

    rows: int
    tokens: int
    labelled: int


def kept(lengths: Sequence[Sequence[int]], max_length: int) -> Rows:
    """The rows of at most `max_length` tokens. `lengths`: [tokens, rows, labelled tokens] for each length."""
    fitting = [entry for entry in lengths if entry[0] <= max_length]
    return Rows(
        rows=sum(rows for _, rows, _ in fitting),
        tokens=sum(tokens * rows for tokens, rows, _ in fitting),
        labelled=sum(labelled for _, _, labelled in fitting),
    )


def _work(recipe: Recipe, rows: Rows | None) -> tuple[int | None, int | None]:
    """Tokens and optimizer steps of a run, from max_steps or from the epochs over the rows; None if neither is known."""
    step = recipe.data.batch_tokens * recipe.train.gradient_accumulation_steps
    if recipe.train.max_steps > 0:
        return recipe.train.max_steps * step, recipe.train.max_steps
    if rows is None:
        return None, None
    tokens = round(rows.tokens * recipe.train.num_train_epochs)
    by_rows = 0.0
    if recipe.data.batch_rows is not None and not recipe.data.packing:
        each = recipe.data.batch_rows * recipe.train.gradient_accumulation_steps
        by_rows = rows.rows * recipe.train.num_train_epochs / each
    return tokens, max(1, -(-tokens // step), math.ceil(by_rows))


# --- earlier runs ----------------------------------------------------------------------------------------------------


def remember(recipe: Recipe, shape: Subject, device: Device, tokens_per_second: float, labelled_share: float) -> None:
    """Store the speed of a finished training run for later plans. `tokens_per_second`: without padding."""
    record = _records()
    speeds = [*record.get(device.name, []), tokens_per_second * flops_per_token(recipe, shape, labelled_share)]
    file = _file()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**record, device.name: speeds[-REMEMBERED:]})


def remembered(device: Device) -> float | None:
    """Median FLOP/s of earlier training runs on a device of this name; None if there were none."""
    speeds = _records().get(device.name)
    return median(speeds) if speeds else None


def _records() -> dict[str, list[float]]:
    """FLOP/s of earlier runs by device name. A file that cannot be read counts as missing; the next run replaces it."""
    try:
        records: dict[str, list[float]] = read_json(_file())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return records


def _file() -> Path:
    return cache_dir() / "speed.json"
