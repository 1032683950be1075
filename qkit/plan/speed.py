"""How long training takes: what a card can do at best, and what this machine was seen to do.

The bound counts the arithmetic and the weights' way through memory, and nothing else: a step takes at least as long. Once a run has been
trained here its speed is remembered as arithmetic per second, and the next plan for this machine is made with that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from qkit.core.device import Device
from qkit.core.files import read_json, write_json
from qkit.core.sources import cache_dir
from qkit.model.shape import Shape, linear_parameters
from qkit.plan import gpus
from qkit.plan.fixed_memory import adapter_sizes, weight_bytes
from qkit.recipe.schema import Recipe

REMEMBERED = 8  # runs by device; the middle one counts


@dataclass(frozen=True)
class Pace:
    """Time of training. `bound`: the least that it can take; else as runs on this machine went. None: cannot be known."""

    tokens_per_second: float | None
    tokens: int | None
    steps: int | None
    seconds: float | None
    bound: bool
    how: str


def flops_per_token(how: Recipe, shape: Shape, labelled_share: float = 1.0) -> float:
    """Operations to train on one token: forward, and backward through frozen weights, which need no gradient of their own.

    Two for each weight and pass; checkpointing passes forward twice. The adapter's weights have gradients of their own. Attention under a
    causal mask sees half of a row. `labelled_share`: of the tokens, those that the head is applied to.
    """
    passes = 3 if how.train.gradient_checkpointing else 2
    active = linear_parameters(shape) + len(shape.sparse) * shape.active_experts * 3 * shape.hidden * shape.expert_width
    head = 2 * 2 * shape.vocabulary * shape.hidden * labelled_share
    adapter = 2 * (passes + 1) * sum(adapter_sizes(how, shape))
    seen = min(how.data.max_length, shape.window or how.data.max_length) / 2
    attention = shape.layers * 2 * 2 * shape.attention * seen * (passes + 1)  # its backward has twice the products
    return 2 * passes * active + head + adapter + attention


def batch_seconds(how: Recipe, shape: Shape, card: gpus.Card, labelled_share: float = 1.0) -> float | None:
    """The least time of one batch on a card; None for a card without bf16.

    In each pass of each part of a batch all weights are read; 4-bit ones are written and read in bf16 as well.
    """
    if card.bf16_flops is None:
        return None
    passes = (3 if how.train.gradient_checkpointing else 2) * how.micro_batches
    unpacked = 2 * 2 * linear_parameters(shape) if how.quantization.load_in_4bit else 0
    arithmetic = how.data.batch_tokens * flops_per_token(how, shape, labelled_share) / card.bf16_flops
    return max(arithmetic, passes * (weight_bytes(how, shape) + unpacked) / card.bandwidth)


def time_factor(before: Recipe, after: Recipe, shape: Shape, device: Device) -> float:
    """How many times as long training takes with a changed recipe, token for token."""
    card = gpus.find(device)
    if card is not None and card.bf16_flops is not None:
        seconds = [batch_seconds(how, shape, card) for how in (before, after)]
        each = [time / how.data.batch_tokens for time, how in zip(seconds, (before, after), strict=True) if time]
        return each[1] / each[0]
    return flops_per_token(after, shape) / flops_per_token(before, shape)


def pace(how: Recipe, shape: Shape, device: Device, rows: Rows | None) -> Pace:
    """Speed and time of training: as remembered for this device, else the card's bound."""
    share = rows.labelled / rows.tokens if rows and rows.tokens else 1.0
    flops = flops_per_token(how, shape, share)
    tokens, steps = _work(how, rows)
    if (seen := remembered(device)) is not None:
        speed, bound, said = seen / flops, False, f"{seen / 1e9:,.0f} GFLOP/s in earlier runs here"
    elif (card := gpus.find(device)) is not None and (least := batch_seconds(how, shape, card, share)):
        speed, bound, said = how.data.batch_tokens / least, True, _bound(card)
    else:
        return Pace(
            None,
            tokens,
            steps,
            None,
            True,
            f"no run has been trained on {gpus.title(device)} yet, and it is no known card",
        )
    return Pace(
        speed, tokens, steps, tokens / speed if tokens else None, bound, f"{said}; {flops / 1e9:,.2f} GFLOP per token"
    )


def _bound(card: gpus.Card) -> str:
    tflops = (card.bf16_flops or 0) / 1e12
    return f"at least: the {card.title} does {tflops:,.0f} TFLOP/s in bf16 and moves {card.bandwidth / 1e9:,.0f} GB/s"


@dataclass(frozen=True)
class Rows:
    """The training rows that a recipe keeps, and their tokens."""

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


def _work(how: Recipe, rows: Rows | None) -> tuple[int | None, int | None]:
    """Tokens and optimizer steps of a run: as many as max_steps says, or the epochs over the rows, if these are known."""
    step = how.data.batch_tokens * how.train.gradient_accumulation_steps
    if how.train.max_steps > 0:
        return how.train.max_steps * step, how.train.max_steps
    if rows is None:
        return None, None
    tokens = round(rows.tokens * how.train.num_train_epochs)
    return tokens, max(1, -(-tokens // step))


# --- what was seen ----------------------------------------------------------------------------------------------------


def remember(how: Recipe, shape: Shape, device: Device, tokens_per_second: float, labelled_share: float) -> None:
    """Keep the speed of a finished training for plans to come. `tokens_per_second`: real ones, padding left out."""
    record = _records()
    seen = [*record.get(device.name, []), tokens_per_second * flops_per_token(how, shape, labelled_share)]
    file = _file()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**record, device.name: seen[-REMEMBERED:]})


def remembered(device: Device) -> float | None:
    """Operations per second of earlier trainings on a device of this name; None when there was none."""
    seen = _records().get(device.name)
    return median(seen) if seen else None


def _records() -> dict[str, list[float]]:
    """A record that cannot be read is no record: it is written anew by the next run."""
    try:
        loaded: dict[str, list[float]] = read_json(_file())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return loaded


def _file() -> Path:
    return cache_dir() / "speed.json"
