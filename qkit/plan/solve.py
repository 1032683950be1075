"""`qkit plan --solve`: the longest rows, the largest batch or rank that fit, or the smallest card. And the choices of data.max_length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from qkit.core.device import Device, detect
from qkit.core.errors import RecipeError
from qkit.plan import gpus, speed
from qkit.plan._known import Known, by_length
from qkit.plan._subject import subject_of
from qkit.plan.plan import Plan, decided, peak_of, plan
from qkit.plan.remedies import Remedy, apply
from qkit.recipe.schema import Recipe

Question = Literal["max_length", "batch", "rank", "card"]
QUESTIONS: tuple[Question, ...] = ("max_length", "batch", "rank", "card")
LENGTH_STEP = 16  # rows are padded to a multiple of this
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
LONGEST = 2**22  # the upper end of every search


@dataclass(frozen=True)
class Solved:
    """The answer to `--solve`. `value`: tokens, rows, a rank, or the name of a card; None: nothing fits. `set`: the `--set` values for it."""

    question: str
    value: int | str | None
    set: tuple[str, ...]
    plan: Plan | None


def solve(recipe: Recipe, question: Question, device_bytes: int | None = None, device: Device | None = None) -> Solved:
    """The longest row (one per batch), the most rows of full length per batch, the highest rank, or the smallest card that fits."""
    device = device or detect()
    if question == "card":
        return _smallest_card(recipe)
    if question == "rank" and recipe.method != "lora":
        raise RecipeError(f"--solve rank: method={recipe.method} has no rank; ask for max_length, batch or card")
    subject = subject_of(recipe)
    limit = gpus.usable_bytes(device) if device_bytes is None else device_bytes
    peak = peak_of(subject, device, "train")
    setter = {"max_length": with_length, "batch": _with_rows, "rank": _with_rank}[question]
    scale = LENGTH_STEP if question == "max_length" else 1
    largest = min(LONGEST, subject.positions or LONGEST) if question == "max_length" else LONGEST
    count = _largest_that_fits(
        lambda n: peak(apply(recipe, (Remedy(setter(recipe, n * scale), 0, ""),))) <= limit, largest // scale
    )
    if count == 0:
        return Solved(question, None, (), None)
    chosen = setter(recipe, count * scale)
    return Solved(question, count * scale, chosen, plan(apply(recipe, (Remedy(chosen, 0, ""),)), limit, device))


def question(text: str | None) -> Question | None:
    """Parse the value of --solve.

    Raises:
        RecipeError: the value is not one of QUESTIONS.
    """
    parsed = next((known for known in QUESTIONS if known == text), None)
    if text is not None and parsed is None:
        raise RecipeError(f"--solve {text}: must be one of {', '.join(QUESTIONS)}")
    return parsed


def with_length(recipe: Recipe, length: int) -> tuple[str, ...]:
    """The `--set` values for batches of one row of `length` tokens."""
    return f"data.max_length={length}", f"data.batch_tokens={length}"


def _with_rows(recipe: Recipe, rows: int) -> tuple[str, ...]:
    tokens = f"data.batch_tokens={rows * recipe.data.max_length}"
    return (tokens,) if recipe.data.batch_rows is None else (tokens, f"data.batch_rows={rows}")


def _with_rank(recipe: Recipe, rank: int) -> tuple[str, ...]:
    return (f"lora.r={rank}",)


def _largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest count up to `most` for which `fits` holds; 0 if there is none. If a count fits, all smaller counts must fit too."""
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
        planned = plan(recipe, device=gpus.device(card.name))
        if planned.fits:
            return Solved("card", card.name, (), planned)
    return Solved("card", None, (), None)


# --- choices of data.max_length ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthChoice:
    """One choice of data.max_length: the rows and tokens with loss (`labelled`) that it keeps, and the memory and seconds that it needs."""

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


def length_table(
    lengths: Sequence[Sequence[int]], recipe: Recipe, device: Device, labels: int | None = None
) -> LengthTable:
    """The rows that each choice of data.max_length keeps, and the memory and time that it needs.

    `lengths`: sorted [tokens, rows, labelled tokens], one entry per length, before long rows are dropped or cut. Rows longer than a choice
    count as dropped. A choice above the recipe's batch_tokens raises these to one such row.
    """
    longest, all_rows = lengths[-1][0], speed.kept(lengths, lengths[-1][0])
    marks = [length for length in LENGTHS if length < longest]
    choices = [*marks, next((length for length in LENGTHS if length >= longest), longest)]
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return LengthTable(
        {name: percentile(lengths, share) for name, share in shares.items()},
        tuple(_choice(lengths, all_rows, length, recipe, device, labels) for length in choices),
    )


def known_of(lengths: Sequence[Sequence[int]], recipe: Recipe, labels: int | None = None) -> Known:
    """What a plan needs to know of the rows. `lengths`: as in `length_table`; `labels`: how many labels the data have; 0: none."""
    return Known(labelled_of(lengths, recipe), by_length(lengths), labels or None)


def labelled_of(lengths: Sequence[Sequence[int]], recipe: Recipe) -> int | None:
    """Tokens with loss in a batch whose rows all have the length with the largest share of them; None if the rows are unknown."""
    shares = [labelled / (tokens * rows) for tokens, rows, labelled in lengths if tokens <= recipe.data.max_length]
    return round(max(shares) * recipe.data.batch_tokens) if shares else None


def percentile(lengths: Sequence[Sequence[int]], share: float) -> int:
    """The smallest length in tokens that at least this share of the rows do not exceed."""
    wanted, counted = share * sum(rows for _, rows, _ in lengths), 0
    for tokens, rows, _ in lengths:
        counted += rows
        if counted >= wanted:
            return tokens
    return lengths[-1][0]


def _choice(
    lengths: Sequence[Sequence[int]],
    all_rows: speed.Rows,
    length: int,
    recipe: Recipe,
    device: Device,
    labels: int | None,
) -> LengthChoice:
    rows = speed.kept(lengths, length)
    batch = max(length, recipe.data.batch_tokens)
    changed = apply(recipe, (Remedy((f"data.max_length={length}", f"data.batch_tokens={batch}"), 0, ""),))
    known = known_of(lengths, changed, labels)
    subject, changed = subject_of(changed, known), decided(changed, device, known)
    peak = peak_of(subject, device, "train", known)(changed)
    return LengthChoice(
        max_length=length,
        rows=rows.rows,
        rows_share=rows.rows / all_rows.rows,
        labelled=rows.labelled,
        labelled_share=rows.labelled / all_rows.labelled if all_rows.labelled else 0.0,
        peak_bytes=peak,
        fits=peak <= gpus.usable_bytes(device),
        seconds=speed.pace(changed, subject, device, rows).seconds,
    )
