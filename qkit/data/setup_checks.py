"""Checks on the set-up as a whole: template, special tokens, lengths against what model and server take, and what is left to train on."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qkit.chat.template import ASKED, OFFERED, date_formats, texts
from qkit.data.checks import NAMED_ROWS, Check, Place
from qkit.data.entry import Entry
from qkit.data.prepare import Worker
from qkit.data.select import HELD_OUT, Fate
from qkit.model import added_tokens, vocabulary
from qkit.model import tokenizer as model_tokenizer
from qkit.recipe.schema import Recipe

UNSCORED = ("text", "tokenized")  # formats that hold no question to answer


def checks(
    own: Worker, entries: Sequence[Entry], fates: Sequence[Fate], tokens: Mapping[str, Any], counts: Mapping[str, Any]
) -> Iterator[Check]:
    """One check each; those over rows are elsewhere."""
    used = [entry for entry, fate in zip(entries, fates, strict=True) if not fate.rule]
    yield _left(entries, fates, counts["train"])
    yield _padding(own, tokens)
    yield _date(own)
    yield _positions(own.how, used)
    yield _served(own.how, used)
    yield _held_out(entries, fates)


def _left(entries: Sequence[Entry], fates: Sequence[Fate], train: Mapping[str, int]) -> Check:
    """Whether enough is left to train on."""
    share = train["kept"] / train["records"] if train["records"] else 0.0
    message = f"{train['kept']:,} of {train['records']:,} records are trained on, {train['labelled_tokens']:,} tokens carry loss"
    gone = [(e, f) for e, f in zip(entries, fates, strict=True) if f.rule and f.split == "train"]
    rows = tuple(Place(entry.source, entry.line) for entry, _ in gone[:NAMED_ROWS])
    if not train["rows"]:
        why = (
            f"all {len(gone):,} were dropped, the first ({rows[0]}) because it {gone[0][1].reason}"
            if gone
            else "no source has any"
        )
        remedy = "see the checks above" if gone else "give data.train a source with rows"
        return Check("rows", "fail", f"no row is left to train on: {why}", len(gone), rows, remedy)
    if share < 0.5:
        message += f"; the first of {len(gone):,} that are not: {rows[0]} {gone[0][1].reason}"
        return Check(
            "rows", "warn", message, len(gone), rows, "look at the reasons in the ledger: most rows are not used"
        )
    return Check("rows", "pass", message)


def held_together(own: Worker, tokens: Mapping[str, Any], rows: Check) -> Check:
    """The check `vocabulary` over rows; where these are well, tokenizer and embedding held against each other. Other checks as they are."""
    if rows.name != "vocabulary":
        return rows
    size = own.facts.vocabulary
    beyond = {text: number for text, number in own.reader.tokenizer.get_vocab().items() if number >= size}
    named = {key: number for key, number in model_tokenizer.named_tokens(own.how.model).items() if number >= size}
    sought = vocabulary.said({**beyond, **named}, size)
    if sought is None:
        return rows
    remedy = _rows_for(beyond)
    if rows.status == "fail":
        return replace(rows, message=f"{rows.message}; {sought}", remedy=remedy)
    if "pad_token_id" in named:  # the embedding cannot even be made
        return Check(
            "vocabulary", "fail", f"{sought}; config.json pads with one, so the model cannot be loaded", remedy=remedy
        )
    if used := sorted(_used(own, tokens) & set(beyond.values())):
        names = ", ".join(map(own.reader.tokenizer.convert_ids_to_tokens, used))
        return Check("vocabulary", "fail", f"{sought}; every conversation may hold {names}", len(beyond), remedy=remedy)
    pads = own.reader.tokenizer.convert_ids_to_tokens(tokens["pad"])
    message = f"{sought}; no row holds one, {pads} pads; a text that spells one is an error in training and on a server"
    return Check("vocabulary", "warn", message, len(beyond), remedy=remedy)


def _rows_for(beyond: Mapping[str, int]) -> str:
    """What to do about tokens that the model has no row for; ids without a token are a mistake of the config."""
    if not beyond:
        return "correct the id in the model's config.json"
    named = json.dumps(sorted(beyond)[:NAMED_ROWS], ensure_ascii=False)
    return f"take the tokenizer that belongs to these weights, or give the tokens rows with model.add_tokens={named}"


def _used(own: Worker, tokens: Mapping[str, Any]) -> set[int]:
    """Ids that come up whatever the rows say: what begins a text, what ends a turn, the padding, and what the template writes."""
    tokenizer = own.reader.tokenizer
    written = own.reader.encode(added_tokens.markers(tokenizer))
    begins = tokenizer("a")["input_ids"]
    return {
        *tokens["stop"],
        tokens["pad"],
        tokens["end_of_turn"],
        *begins,
        *(number for ids in written for number in ids),
    }


def _padding(own: Worker, tokens: Mapping[str, Any]) -> Check:
    name = own.reader.tokenizer.convert_ids_to_tokens(tokens["pad"])
    if tokens["pad"] not in tokens["stop"]:
        return Check("padding", "pass", f"{name} pads, and ends no turn")
    message = (
        f"{name} pads and ends turns: here labels come from lengths, so the end of a turn is learnt all the same; tools that mask "
        "every padding token would mask it"
    )
    return Check(
        "padding", "warn", message, remedy="set model.pad_token to a special token that the template does not use"
    )


def _date(own: Worker) -> Check:
    formats = [found for template in texts(own.reader.tokenizer) for found in date_formats(template)]
    offers: list[Sequence[Any]] = [(), (OFFERED,)] if own.reader.offering else [()]
    text = "\n".join(own.reader.render((ASKED,), tools) for tools in offers) if formats else ""
    today = dt.datetime.now()
    written = [today.strftime(text_format) for text_format in formats]
    if not any(date in text for date in written):
        return Check("date", "pass", "the chat template writes no date")
    message = f"the chat template writes today's date ({written[0]}): from tomorrow on a server sends prompts that training never saw"
    return Check(
        "date",
        "warn",
        message,
        remedy="give model.chat_template a copy of the template with the date left out or fixed",
    )


def _positions(how: Recipe, used: Sequence[Entry]) -> Check:
    limit = model_tokenizer.max_positions(how.model)
    if limit is None:
        return Check("positions", "skipped", "the model's config names no largest position")
    beyond = [entry for entry in used if entry.tokens > limit]
    if not beyond:
        return Check("positions", "pass", f"no row is longer than the model's {limit:,} positions")
    rows = tuple(Place(entry.source, entry.line) for entry in beyond[:NAMED_ROWS])
    message = f"{len(beyond):,} rows are longer than the model's {limit:,} positions: {rows[0]} has {beyond[0].tokens:,} tokens"
    return Check("positions", "fail", message, len(beyond), rows, f"set data.max_length={limit} or less")


def _served(how: Recipe, used: Sequence[Entry]) -> Check:
    limit = how.serve.max_model_len
    beyond = [entry for entry in used if entry.tokens > limit]
    if not beyond:
        return Check("served_length", "pass", f"no row is longer than what is served (serve.max_model_len={limit})")
    rows = tuple(Place(entry.source, entry.line) for entry in beyond[:NAMED_ROWS])
    message = f"{len(beyond):,} rows are longer than what is served (serve.max_model_len={limit}): {rows[0]} has {beyond[0].tokens:,} tokens"
    return Check("served_length", "warn", message, len(beyond), rows, "raise serve.max_model_len to what was trained")


def _held_out(entries: Sequence[Entry], fates: Sequence[Fate]) -> Check:
    """Whether there are rows to score the result on."""
    test = [e for e, f in zip(entries, fates, strict=True) if not f.rule and f.split == HELD_OUT[-1]]
    if not test:
        remedy = "give data.test a source, or divide the rows: data.split={train: 0.9, test: 0.1}"
        return Check(
            "held_out",
            "warn",
            "no row is held out in data.test: nobody will know whether training helped",
            remedy=remedy,
        )
    unscored = [entry for entry in test if entry.format in UNSCORED]
    if unscored:
        rows = tuple(Place(entry.source, entry.line) for entry in unscored[:NAMED_ROWS])
        message = f"{len(unscored):,} of {len(test):,} test rows are plain text or tokens, the first {rows[0]}: they have no answer to score"
        return Check(
            "held_out",
            "fail",
            message,
            len(unscored),
            rows,
            "give data.test rows that end with an answer",
        )
    return Check("held_out", "pass", f"{len(test):,} rows are held out to score the result on")
