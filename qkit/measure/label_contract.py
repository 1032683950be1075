"""The serve contract of a model with labels: a folder turns a text into the same tokens as training did, and names the same labels.

It is checked as a server or `transformers.pipeline` would open the folder: with its own tokenizer and its own config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qkit.core.errors import short
from qkit.core.files import read_json
from qkit.core.sequences import first_difference
from qkit.measure import held_out as measure_held_out
from qkit.measure.contract import DIFFERS, OK, Contract, ContractCheck
from qkit.plugins.task import open_task, read_labels
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run

ROWS = 64


def check_folder(run: Run, folder: Path, rows: int = ROWS) -> Contract:
    """Check a model folder against the run's held-out rows and labels."""
    held_out = measure_held_out.held_out_of(run)
    config = read_json(folder / "config.json")
    return Contract(str(folder), folder.name, tuple(_checks(run, folder, config, held_out.records[:rows])))


def _checks(
    run: Run, folder: Path, config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> Iterator[ContractCheck]:
    yield _tokens(folder, records, run.recipe)
    yield _labels(config, read_labels(run.need("data", "summary.json").parent))
    yield _padding(config, int(read_json(run.need("data", "tokens.json"))["pad"]))


def _tokens(folder: Path, records: Sequence[Mapping[str, Any]], recipe: Recipe) -> ContractCheck:
    from transformers import AutoTokenizer

    tokenizer, task = AutoTokenizer.from_pretrained(str(folder)), open_task(recipe.task)
    for number, record in enumerate(records):
        encoded = task.encoded(tokenizer, record, recipe.data)
        for name, words in (("input_ids", "ids"), ("token_type_ids", "token types")):
            if (place := first_difference(record[name], encoded.get(name, []))) is not None:
                detail = f"from token {place} on, the {words} differ from training: {short(repr(record['text']))}"
                return ContractCheck("tokens", DIFFERS, f"held-out row {number}: {detail}")
    return ContractCheck("tokens", OK, f"{len(records)} held-out texts: same ids as in training")


def _labels(config: Mapping[str, Any], trained: Sequence[str]) -> ContractCheck:
    """Check the names that a server answers with."""
    served = [name for _, name in sorted((int(number), name) for number, name in config.get("id2label", {}).items())]
    if (place := first_difference(trained, served)) is not None:
        pair = [short(repr(names[place])) if place < len(names) else "no label" for names in (trained, served)]
        return ContractCheck("labels", DIFFERS, f"label {place} is {pair[0]} in training, {pair[1]} in config.json")
    return ContractCheck("labels", OK, f"{len(trained)} labels with the names of training")


def _padding(config: Mapping[str, Any], pad: int) -> ContractCheck:
    """Check the id that fills batches: a head on a decoder reads the last token that is not padding."""
    if config.get("pad_token_id") != pad:
        detail = f"config.json has pad_token_id={config.get('pad_token_id')}, training padded with {pad}"
        return ContractCheck("padding", DIFFERS, detail)
    return ContractCheck("padding", OK, f"batches are padded with token {pad}, as in training")
