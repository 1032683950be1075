"""The plan asked backwards: the longest rows, the largest batch or rank, the smallest card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from qkit.core.device import Device, detect
from qkit.core.errors import RecipeError
from qkit.model.config import shape_of
from qkit.plan import gpus, speed
from qkit.plan.plan import Plan, decided, peak_of, plan
from qkit.plan.remedies import Remedy, apply
from qkit.recipe.schema import Recipe

Question = Literal["max_length", "batch", "rank", "card"]
QUESTIONS: tuple[Question, ...] = ("max_length", "batch", "rank", "card")
LENGTH_STEP = 16  # rows are padded to a multiple of this
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
LONGEST = 2**22  # no search goes further


# --- asking the other way round ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solved:
    """The answer to `--solve`. `value`: tokens, rows, a rank, or a card's name; None: there is none that fits."""

    question: str
    value: int | str | None
    set: tuple[str, ...]
    plan: Plan | None


def solve(recipe: Recipe, question: Question, device_bytes: int | None = None, device: Device | None = None) -> Solved:
    """The longest row (one to a batch), the most rows of full length in a batch, the highest rank, or the smallest card that fits."""
    device = device or detect()
    if question == "card":
        return _smallest_card(recipe)
    shape = shape_of(recipe.model)
    limit = gpus.usable_bytes(device) if device_bytes is None else device_bytes
    peak = peak_of(shape, device, "train", None)
    setter = {"max_length": with_length, "batch": _with_rows, "rank": _with_rank}[question]
    scale = LENGTH_STEP if question == "max_length" else 1
    most = min(LONGEST, shape.positions or LONGEST) if question == "max_length" else LONGEST
    count = _largest_that_fits(
        lambda n: peak(apply(recipe, (Remedy(setter(recipe, n * scale), 0, ""),))) <= limit, most // scale
    )
    if count == 0:
        return Solved(question, None, (), None)
    chosen = setter(recipe, count * scale)
    return Solved(question, count * scale, chosen, plan(apply(recipe, (Remedy(chosen, 0, ""),)), limit, device))


def question(text: str | None) -> Question | None:
    """What --solve asks for.

    Raises:
        RecipeError: it cannot be solved for.
    """
    found = next((known for known in QUESTIONS if known == text), None)
    if text is not None and found is None:
        raise RecipeError(f"--solve {text}: there are {', '.join(QUESTIONS)}")
    return found


def with_length(recipe: Recipe, length: int) -> tuple[str, ...]:
    return f"data.max_length={length}", f"data.batch_tokens={length}"


def _with_rows(recipe: Recipe, rows: int) -> tuple[str, ...]:
    return (f"data.batch_tokens={rows * recipe.data.max_length}",)


def _with_rank(recipe: Recipe, rank: int) -> tuple[str, ...]:
    return (f"lora.r={rank}",)


def _largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest count up to `most` for which `fits` holds, given that more never needs less; 0 when there is none."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _smallest_card(recipe: Recipe) -> Solved:
    for card in sorted(gpus.CARDS.values(), key=lambda card: card.memory_bytes):
        made = plan(recipe, device=gpus.device(card.name))
        if made.fits:
            return Solved("card", card.name, (), made)
    return Solved("card", None, (), None)


# --- what the rows say ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthChoice:
    """What one choice of data.max_length keeps and needs. `labelled`: tokens that carry loss."""

    max_length: int
    rows: int
    rows_share: float
    labelled: int
    labelled_share: float
    peak_bytes: int
    fits: bool
    seconds: float | None


@dataclass(frozen=True)
class LengthTable:
    """Percentiles of the rows' lengths in tokens, and the choices of data.max_length."""

    percentiles: dict[str, int]
    choices: tuple[LengthChoice, ...]


def length_table(lengths: Sequence[Sequence[int]], recipe: Recipe, device: Device) -> LengthTable:
    """What each choice of data.max_length keeps of the rows, and what it needs.

    `lengths`: sorted [tokens, rows, labelled tokens], one entry for each length, before the rule for long rows. Rows beyond a choice count
    as left out. A choice above the recipe's own batch raises the batch to one such row.
    """
    longest, everything = lengths[-1][0], speed.kept(lengths, lengths[-1][0])
    marks = [length for length in LENGTHS if length < longest]
    ends = [*marks, next((length for length in LENGTHS if length >= longest), longest)]
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return LengthTable(
        {name: percentile(lengths, share) for name, share in shares.items()},
        tuple(_choice(lengths, everything, length, recipe, device) for length in ends),
    )


def labelled_of(lengths: Sequence[Sequence[int]], recipe: Recipe) -> int | None:
    """Tokens of a batch that carry loss, at the share of the rows' length that has most; None when no rows are known."""
    shares = [labelled / (tokens * rows) for tokens, rows, labelled in lengths if tokens <= recipe.data.max_length]
    return round(max(shares) * recipe.data.batch_tokens) if shares else None


def percentile(lengths: Sequence[Sequence[int]], share: float) -> int:
    """The length in tokens that at least this share of the rows do not exceed."""
    wanted, seen = share * sum(rows for _, rows, _ in lengths), 0
    for tokens, rows, _ in lengths:
        seen += rows
        if seen >= wanted:
            return tokens
    return lengths[-1][0]


def _choice(
    lengths: Sequence[Sequence[int]], everything: speed.Rows, length: int, recipe: Recipe, device: Device
) -> LengthChoice:
    shape, rows = shape_of(recipe.model), speed.kept(lengths, length)
    batch = max(length, recipe.data.batch_tokens)
    how = apply(recipe, (Remedy((f"data.max_length={length}", f"data.batch_tokens={batch}"), 0, ""),))
    labelled = labelled_of(lengths, how)
    how = decided(how, device, labelled)
    peak = peak_of(shape, device, "train", labelled)(how)
    return LengthChoice(
        max_length=length,
        rows=rows.rows,
        rows_share=rows.rows / everything.rows,
        labelled=rows.labelled,
        labelled_share=rows.labelled / everything.labelled if everything.labelled else 0.0,
        peak_bytes=peak,
        fits=peak <= gpus.usable_bytes(device),
        seconds=speed.pace(how, shape, device, rows).seconds,
    )
