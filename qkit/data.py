"""The stage `data`: records in, token ids and the ledger out. From here on a row is its token ids; nobody reads the raw text again.

data/train.parquet validation.parquet test.parquet    input_ids, start (where the completion begins), messages, answer, reference, place
data/ledger.parquet                                   what became of every record
data/summary.json                                     counts per split
data/tokens.json                                      the tokens that end a turn, and the padding token
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit import model
from qkit.errors import DataError, ModelError
from qkit.progress import Progress
from qkit.recipe import Recipe
from qkit.rows import Record, read
from qkit.run import Run, write_json
from qkit.task import Conversation, RowError, Task, open_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Tokenized:
    """One row. `input_ids[start:]` is the completion, the end of the turn included; only it carries loss."""

    input_ids: list[int]
    start: int
    messages: str
    answer: str
    reference: str
    place: str

    @property
    def labelled(self) -> int:
        return len(self.input_ids) - self.start


@dataclass(frozen=True)
class LedgerRow:
    """What became of one record: `status` is kept or dropped, `reason` says why."""

    split: str
    place: str
    sha256: str
    tokens: int
    labelled_tokens: int
    status: str
    reason: str


def run(run: Run, out: Path) -> None:
    """Read, render and tokenize every split."""
    how = run.recipe
    tokenizer = model.tokenizer_of(how.model)
    ledger: list[LedgerRow] = []
    summary: dict[str, Any] = {}
    for split in SPLITS:
        rows = list(kept(tokenized(how, split, tokenizer, run.progress), ledger, how.data.max_length, split))
        _save([asdict(row) for row in rows], out / f"{split}.parquet")
        summary[split] = counts(rows)
    if not summary["train"]["rows"]:
        raise DataError(f"no row is left to train on: {_why_none(ledger)}")
    _save([asdict(row) for row in ledger], out / "ledger.parquet")
    write_json(out / "summary.json", {**summary, "dropped": sum(row.status == "dropped" for row in ledger)})
    write_json(out / "tokens.json", special_tokens(tokenizer, how.model.pad_token))


def tokenized(
    how: Recipe, split: str, tokenizer: PreTrainedTokenizerBase, progress: Progress | None = None
) -> Iterator[Tokenized]:
    """Every row of a split as token ids, in the order of its sources."""
    task = open_task(how.task)
    records = [record for source in getattr(how.data, split) for record in read(source)]
    for record in (progress or Progress()).track(records, f"tokenize {split}", len(records)):
        yield tokenize(_conversation(task, record, how), record.place, tokenizer)


def _conversation(task: Task, record: Record, how: Recipe) -> Conversation:
    try:
        return task.conversation(record.value, record.accepted, how.data)
    except RowError as error:
        raise DataError(f"{record.place}: this row {error}") from None


def tokenize(example: Conversation, place: str, tokenizer: PreTrainedTokenizerBase) -> Tokenized:
    """Render and tokenize a conversation; the prompt's ids are a true prefix of the whole's.

    Raises:
        ModelError: the template does not write the answer after the generation prompt, or never ends the turn.
    """
    prompt = render(tokenizer, example.prompt)
    whole = render(tokenizer, (*example.prompt, {"role": "assistant", "content": example.answer}), answered=True)
    if not whole.startswith(prompt):
        raise ModelError(
            f"{place}: the chat template writes the answered conversation differently from the prompt it would be asked with, "
            f"first at {_first_difference(prompt, whole)!r}: training and serving would not see the same text"
        )
    prompt_ids = _ids(tokenizer, prompt)
    completion = _through_turn_end(_ids(tokenizer, whole[len(prompt) :]), tokenizer, place)
    return Tokenized(
        input_ids=prompt_ids + completion,
        start=len(prompt_ids),
        messages=json.dumps(example.prompt, ensure_ascii=False),
        answer=example.answer,
        reference=json.dumps(example.reference, ensure_ascii=False),
        place=place,
    )


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], answered: bool = False) -> str:
    """Messages as the template writes them, ready for the assistant to go on unless `answered`."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=not answered)
    except TemplateError as error:
        raise ModelError(
            f"the chat template refuses this conversation: {error}: {json.dumps(messages)[:200]}"
        ) from error
    return str(text)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _through_turn_end(ids: list[int], tokenizer: PreTrainedTokenizerBase, place: str) -> list[int]:
    """The completion up to the token that ends the turn: what templates write after it (a newline) is never generated."""
    special = set(tokenizer.all_special_ids)
    ends = [index for index, token in enumerate(ids) if token in special]
    if not ends:
        raise ModelError(
            f"{place}: the chat template ends the assistant's turn with no special token, so the model could not learn to stop; "
            "use a template that closes the turn"
        )
    return ids[: ends[-1] + 1]


def _first_difference(left: str, right: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return left[same : same + 30]


def kept(rows: Iterator[Tokenized], ledger: list[LedgerRow], max_length: int, split: str) -> Iterator[Tokenized]:
    """The rows that fit, while the ledger takes note of all."""
    for row in rows:
        reason = f"{len(row.input_ids)} tokens, max_length {max_length}" if len(row.input_ids) > max_length else ""
        ledger.append(_ledger_row(row, split, reason))
        if not reason:
            yield row


def _ledger_row(row: Tokenized, split: str, reason: str) -> LedgerRow:
    digest = hashlib.sha256((row.messages + row.answer).encode()).hexdigest()
    status = "dropped" if reason else "kept"
    return LedgerRow(split, row.place, digest, len(row.input_ids), row.labelled, status, reason)


def counts(rows: Sequence[Tokenized]) -> dict[str, int]:
    """Rows, tokens, and tokens that carry loss."""
    return {
        "rows": len(rows),
        "tokens": sum(len(row.input_ids) for row in rows),
        "labelled_tokens": sum(row.labelled for row in rows),
    }


def _why_none(ledger: Sequence[LedgerRow]) -> str:
    dropped = [row for row in ledger if row.split == "train"]
    if not dropped:
        return "data.train names no source, or its rows are empty"
    return f"all {len(dropped)} were dropped, the first ({dropped[0].place}) for {dropped[0].reason}"


def _save(rows: list[dict[str, Any]], file: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(str(file))


def special_tokens(tokenizer: PreTrainedTokenizerBase, pad_token: str | None) -> dict[str, Any]:
    """`stop` (ids that end a turn), `pad` (an id that is none of them) and `end_of_turn`.

    Raises:
        ModelError: there is no token to pad with that does not also end a turn.
    """
    end = turn_end(tokenizer)
    stop = sorted({end, tokenizer.eos_token_id} - {None})
    candidates = [pad_token] if pad_token else [tokenizer.pad_token, tokenizer.unk_token, *tokenizer.all_special_tokens]
    ids = [tokenizer.convert_tokens_to_ids(token) for token in candidates if token]
    usable = [token for token in ids if token is not None and token not in stop]
    if not usable:
        raise ModelError(
            f"no padding token: {candidates[0]!r} also ends a turn or is unknown, so the end of an answer would be masked with the "
            "padding; set model.pad_token to a special token that the template does not use"
        )
    return {"stop": stop, "pad": usable[0], "end_of_turn": end}


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant's turn, by rendering one."""
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    text = render(tokenizer, turns, answered=True)[len(render(tokenizer, turns[:1])) :]
    return _through_turn_end(_ids(tokenizer, text), tokenizer, "a test conversation")[-1]
