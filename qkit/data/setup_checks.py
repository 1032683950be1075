"""Checks of the setup as a whole: template, special tokens, the lengths that model and server support, and the rows left to train on."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qkit.data.entry import Entry
from qkit.data.prepare import Worker
from qkit.data.select import HELD_OUT, Decision
from qkit.model import tokenizer as model_tokenizer
from qkit.model import vocabulary
from qkit.plugins.checks import NAMED_ROWS, Check, Place
from qkit.recipe.schema import Recipe


def checks(
    worker: Worker, decisions: Sequence[Decision], tokens: Mapping[str, Any], counts: Mapping[str, Any]
) -> Iterator[Check]:
    """The checks of the setup, one result each; `Task.CHECKS` has those over rows."""
    used = [decision.entry for decision in decisions if decision.used]
    yield _left(decisions, counts["train"])
    yield from worker.encoder.setup_checks(tokens)
    yield _positions(worker.recipe, used)
    yield _served(worker.recipe, used)
    yield _held_out(decisions, worker.task.UNSCORED)


def _left(decisions: Sequence[Decision], train: Mapping[str, int]) -> Check:
    """Whether enough is left to train on."""
    share = train["kept"] / train["records"] if train["records"] else 0.0
    message = f"{train['kept']:,} of {train['records']:,} records are used for training; {train['labelled_tokens']:,} tokens carry loss"
    dropped = [decision for decision in decisions if not decision.used and decision.split == "train"]
    rows = tuple(Place(decision.entry.source, decision.entry.line) for decision in dropped[:NAMED_ROWS])
    if not train["rows"]:
        why = (
            f"all {len(dropped):,} were dropped, the first ({rows[0]}) because it {dropped[0].reason}"
            if dropped
            else "the sources are empty"
        )
        remedy = "see the checks above" if dropped else "set data.train to a source that has rows"
        return Check("rows", "fail", f"no row is left to train on: {why}", len(dropped), rows, remedy)
    if share < 0.5:
        message += f"; the first of the {len(dropped):,} dropped: {rows[0]} {dropped[0].reason}"
        return Check(
            "rows", "warn", message, len(dropped), rows, "check the reasons in the ledger: most rows are dropped"
        )
    return Check("rows", "pass", message)


def with_embedding(worker: Worker, tokens: Mapping[str, Any], rows: Check) -> Check:
    """The check `vocabulary`, extended by a comparison of tokenizer and embedding. Other checks are returned unchanged."""
    if rows.name != "vocabulary":
        return rows
    size = worker.encoder.vocabulary
    beyond = {text: number for text, number in worker.encoder.tokenizer.get_vocab().items() if number >= size}
    named = {key: number for key, number in model_tokenizer.named_tokens(worker.recipe.model).items() if number >= size}
    sought = vocabulary.message({**beyond, **named}, size)
    if sought is None:
        return rows
    remedy = _rows_for(beyond)
    if rows.status == "fail":
        return replace(rows, message=f"{rows.message}; {sought}", remedy=remedy)
    if "pad_token_id" in named:  # the embedding cannot even be made
        return Check(
            "vocabulary",
            "fail",
            f"{sought}; config.json uses one for padding, so the model cannot be loaded",
            remedy=remedy,
        )
    if used := sorted(worker.encoder.ids_in_every_row(tokens) & set(beyond.values())):
        names = ", ".join(map(worker.encoder.tokenizer.convert_ids_to_tokens, used))
        return Check(
            "vocabulary", "fail", f"{sought}; every conversation may contain {names}", len(beyond), remedy=remedy
        )
    pads = worker.encoder.tokenizer.convert_ids_to_tokens(tokens["pad"])
    message = f"{sought}; no row contains one, and {pads} is the padding token; a text with one fails in training and on a server"
    return Check("vocabulary", "warn", message, len(beyond), remedy=remedy)


def _rows_for(beyond: Mapping[str, int]) -> str:
    """The remedy for tokens without a row in the embedding; ids without a token are an error in the config."""
    if not beyond:
        return "correct the id in the model's config.json"
    named = json.dumps(sorted(beyond)[:NAMED_ROWS], ensure_ascii=False)
    return f"use the tokenizer that belongs to these weights, or add rows for the tokens with model.add_tokens={named}"


def _positions(recipe: Recipe, used: Sequence[Entry]) -> Check:
    limit = model_tokenizer.max_positions(recipe.model)
    if limit is None:
        return Check("positions", "skipped", "the model's config does not limit positions")
    beyond = [entry for entry in used if entry.tokens > limit]
    if not beyond:
        return Check("positions", "pass", f"every row fits the model's {limit:,} positions")
    rows = tuple(Place(entry.source, entry.line) for entry in beyond[:NAMED_ROWS])
    message = f"{len(beyond):,} rows are longer than the model's {limit:,} positions: {rows[0]} has {beyond[0].tokens:,} tokens"
    return Check("positions", "fail", message, len(beyond), rows, f"set data.max_length={limit} or less")


def _served(recipe: Recipe, used: Sequence[Entry]) -> Check:
    limit = recipe.serve.max_model_len
    beyond = [entry for entry in used if entry.tokens > limit]
    if not beyond:
        return Check("served_length", "pass", f"every row fits the server (serve.max_model_len={limit})")
    rows = tuple(Place(entry.source, entry.line) for entry in beyond[:NAMED_ROWS])
    message = f"{len(beyond):,} rows exceed the server's limit (serve.max_model_len={limit}): {rows[0]} has {beyond[0].tokens:,} tokens"
    return Check(
        "served_length",
        "warn",
        message,
        len(beyond),
        rows,
        "raise serve.max_model_len to the length of the training rows",
    )


def _held_out(decisions: Sequence[Decision], unscored_formats: Collection[str]) -> Check:
    """Whether there are rows to score the result on."""
    test = [decision.entry for decision in decisions if decision.used and decision.split == HELD_OUT[-1]]
    if not test:
        remedy = "set data.test to a source, or split the rows: data.split={train: 0.9, test: 0.1}"
        return Check(
            "held_out",
            "warn",
            "data.test has no rows: the result cannot be evaluated",
            remedy=remedy,
        )
    unscored = [entry for entry in test if entry.format in unscored_formats]
    if unscored:
        rows = tuple(Place(entry.source, entry.line) for entry in unscored[:NAMED_ROWS])
        message = f"{len(unscored):,} of {len(test):,} test rows are plain text or tokens and have no answer to score; the first is {rows[0]}"
        return Check(
            "held_out",
            "fail",
            message,
            len(unscored),
            rows,
            "use rows that end with an answer in data.test",
        )
    return Check("held_out", "pass", f"{len(test):,} rows are held out for evaluation")
