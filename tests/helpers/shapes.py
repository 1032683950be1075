"""Small data sets in the shapes in which people have them, and what `qkit init` is to make of each."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

THINGS = ("card", "kettle", "train", "garden", "letter", "window", "bridge", "lamp", "river", "coat", "clock", "stove")
PLACES = ("Paris", "Oslo", "Lima", "Cairo", "Quito", "Perth")
ROWS = 36

Write = Callable[[Path], Path]


@dataclass(frozen=True)
class Shape:
    """A data set. `write`: into a folder; `data`: settings that its recipe must have in the section data, beside columns."""

    write: Write
    task: str
    columns: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)


def thing(number: int) -> str:
    return f"{THINGS[number % len(THINGS)]} {number}"


def jsonl(name: str, rows: Sequence[Mapping[str, Any]]) -> Write:
    return lambda folder: _text(folder / name, "".join(json.dumps(row) + "\n" for row in rows))


def whole(name: str, value: Any) -> Write:
    return lambda folder: _text(folder / name, json.dumps(value, indent=1))


def table(name: str, rows: Sequence[Mapping[str, Any]], delimiter: str = ",", header: bool = True) -> Write:
    def write(folder: Path) -> Path:
        with (folder / name).open("w", encoding="utf-8", newline="") as sink:
            writer = csv.DictWriter(sink, [*rows[0]], delimiter=delimiter)
            if header:
                writer.writeheader()
            writer.writerows(rows)
        return folder / name

    return write


def parquet(name: str, rows: Sequence[Mapping[str, Any]]) -> Write:
    def write(folder: Path) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), folder / name)
        return folder / name

    return write


def plain(name: str, text: str) -> Write:
    return lambda folder: _text(folder / name, text)


def _text(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def each(make: Callable[[int], Mapping[str, Any]], count: int = ROWS) -> list[Mapping[str, Any]]:
    return [make(number) for number in range(count)]


# --- conversations ----------------------------------------------------------------------------------------------------

TOOL = {
    "type": "function",
    "function": {"name": "find", "parameters": {"type": "object", "properties": {"name": {"type": "string"}}}},
}
CALL = {"type": "function", "function": {"name": "find", "arguments": "{}"}}


def asked(number: int) -> str:
    return f"Where is the {thing(number)}?"


def answered(number: int) -> str:
    return f"The {thing(number)} is in {PLACES[number % 6]}, at number {number * 7}."


def alpaca(number: int) -> Mapping[str, Any]:
    return {"instruction": asked(number), "input": f"hint {number}" if number % 2 else "", "output": answered(number)}


def sharegpt(number: int, system: bool = False) -> Mapping[str, Any]:
    first = [{"from": "system", "value": "Be brief."}] if system else []
    turns = [{"from": "human", "value": asked(number)}, {"from": "gpt", "value": answered(number)}]
    return {"id": f"row-{number}", "conversations": [*first, *turns]}


def messages(number: int, tools: bool = False) -> Mapping[str, Any]:
    question = {"role": "user", "content": asked(number)}
    answer = {"role": "assistant", "content": answered(number)}
    if not tools:
        return {"messages": [question, answer]}
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": f"call{number}", **CALL}]}
    result = {"role": "tool", "tool_call_id": f"call{number}", "content": PLACES[number % 6]}
    return {"messages": [question, call, result, answer], "tools": [TOOL]}


# --- texts with labels ------------------------------------------------------------------------------------------------


def review(number: int) -> str:
    return f"The {thing(number)} was {'splendid' if number % 2 else 'dreadful'}, and I told all my friends so."


def said(number: int) -> str:
    return ("cancel my", "where is my", "change the")[number % 3] + f" {thing(number)} please"


INTENTS = ("cancel", "find", "change")
SEVERAL = (["news", "sport"], ["news"], ["sport", "art"], [])


def nli(number: int) -> Mapping[str, Any]:
    label = ("entailment", "neutral", "contradiction")[number % 3]
    return {"premise": review(number), "hypothesis": f"Someone spoke of a {thing(number)}.", "label": label}


def words(number: int) -> list[str]:
    return ["Ada", "saw", "the", *thing(number).split(), "in", PLACES[number % 6], "."]


TAGS = ["B-PER", "O", "O", "O", "O", "O", "B-LOC", "O"]


def conll(columns: int) -> str:
    beside = ["_"] * (columns - 2)
    sentences = (
        "".join(" ".join([word, *beside, tag]) + "\n" for word, tag in zip(words(n), TAGS, strict=True))
        for n in range(ROWS)
    )
    return "\n".join(sentences)


def spans(number: int) -> Mapping[str, Any]:
    text = " ".join(words(number))
    begin = text.index(PLACES[number % 6])
    place = {"start": begin, "end": begin + len(PLACES[number % 6]), "label": "LOC"}
    return {"text": text, "entities": [{"start": 0, "end": 3, "label": "PER"}, place]}


# --- answers ----------------------------------------------------------------------------------------------------------


def answer_of(number: int) -> Mapping[str, Any]:
    context = f"Long ago the {thing(number)} was kept in {PLACES[number % 6]} by the river number {number}."
    return {"question": f"Where was the {thing(number)} kept?", "context": context, "answer": PLACES[number % 6]}


def squad(number: int) -> Mapping[str, Any]:
    row = answer_of(number)
    answers = {"text": [row["answer"]], "answer_start": [row["context"].index(row["answer"])]}
    return {
        "id": f"q{number}",
        "title": "Things",
        "context": row["context"],
        "question": row["question"],
        "answers": answers,
    }


def nested() -> Any:
    paragraphs = []
    for number in range(ROWS):
        row = squad(number)
        given = [{"text": row["answers"]["text"][0], "answer_start": row["answers"]["answer_start"][0]}]
        question = {"id": row["id"], "question": row["question"], "answers": given}
        paragraphs.append({"context": row["context"], "qas": [question]})
    return {"version": "1.1", "data": [{"title": "Things", "paragraphs": paragraphs}]}


SHAPES: Mapping[str, Shape] = {
    "alpaca json": Shape(whole("alpaca.json", each(alpaca)), "chat"),
    "alpaca lines": Shape(jsonl("alpaca.jsonl", each(alpaca)), "chat"),
    "sharegpt": Shape(jsonl("sharegpt.jsonl", each(sharegpt)), "chat", data={"ignore": ("id",)}),
    "sharegpt with system": Shape(
        whole("chats.json", each(lambda n: sharegpt(n, system=True))), "chat", data={"ignore": ("id",)}
    ),
    "messages": Shape(jsonl("messages.jsonl", each(messages)), "chat"),
    "messages with tools": Shape(jsonl("tools.jsonl", each(lambda n: messages(n, tools=True))), "chat"),
    "turns under another name": Shape(
        jsonl("dialogs.jsonl", each(lambda n: {"dialog": messages(n)["messages"]})), "chat", {"messages": "dialog"}
    ),
    "prompt and completion": Shape(
        jsonl("pairs.jsonl", each(lambda n: {"prompt": asked(n), "completion": answered(n)})), "chat"
    ),
    "question and answer": Shape(
        table("faq.csv", each(lambda n: {"question": asked(n), "answer": answered(n)})),
        "chat",
        {"prompt": "question", "completion": "answer"},
    ),
    "instruction and response": Shape(
        jsonl(
            "dolly.jsonl",
            each(lambda n: {"instruction": asked(n), "context": "", "response": answered(n), "category": "open_qa"}),
        ),
        "chat",
        {"completion": "response", "prompt": "instruction"},
        data={"ignore": ("category",)},
    ),
    "pairs of answers": Shape(
        jsonl("dpo.jsonl", each(lambda n: {"prompt": asked(n), "chosen": answered(n), "rejected": f"No idea, {n}."})),
        "preference",
    ),
    "rated answers": Shape(
        jsonl("kto.jsonl", each(lambda n: {"prompt": asked(n), "completion": answered(n), "liked": n % 2 == 0})),
        "feedback",
        {"label": "liked"},
    ),
    "lines of text": Shape(
        plain("lines.txt", "".join(f"{answered(n)}\n" for n in range(ROWS))), "chat", source={"sample_by": "line"}
    ),
    "paragraphs of text": Shape(
        plain("notes.md", "\n\n".join(f"{asked(n)}\n{answered(n)}" for n in range(ROWS))),
        "chat",
        source={"sample_by": "paragraph"},
    ),
    "one text": Shape(plain("one.txt", f"{answered(1)}\n"), "chat"),
    "articles and summaries": Shape(
        jsonl("news.jsonl", each(lambda n: {"article": review(n) * 3, "summary": answered(n)})),
        "chat",
        {"prompt": "article", "completion": "summary"},
    ),
    "token ids": Shape(
        jsonl("ids.jsonl", each(lambda n: {"input_ids": [5, 6, 7 + n], "labels": [-100, 6, 7 + n]})), "chat"
    ),
    "sentiment": Shape(
        table("reviews.csv", each(lambda n: {"text": review(n), "label": ("bad", "good")[n % 2]})), "classify"
    ),
    "label ids": Shape(
        table("sst.tsv", each(lambda n: {"sentence": review(n), "label": n % 2}), "\t"),
        "classify",
        {"text": "sentence"},
    ),
    "intents": Shape(
        table("asked.csv", each(lambda n: {"utterance": said(n), "intent": INTENTS[n % 3]})),
        "classify",
        {"text": "utterance", "label": "intent"},
    ),
    "odd names": Shape(
        table("odd.csv", each(lambda n: {"nr": n, "customer_wrote": said(n), "queue": INTENTS[n % 3]})),
        "classify",
        {"text": "customer_wrote", "label": "queue"},
        data={"ignore": ("nr",)},
    ),
    "semicolons": Shape(
        table("semi.csv", each(lambda n: {"text": review(n), "label": ("bad", "good")[n % 2]}), ";"),
        "classify",
        source={"delimiter": ";"},
    ),
    "a list of objects": Shape(
        whole("list.json", each(lambda n: {"text": review(n), "label": bool(n % 2)})), "classify"
    ),
    "parquet": Shape(
        parquet("rows.parquet", each(lambda n: {"review": review(n), "sentiment": ("bad", "good")[n % 2]})),
        "classify",
        {"text": "review", "label": "sentiment"},
    ),
    "pairs of texts": Shape(jsonl("nli.jsonl", each(nli)), "classify", {"text": "premise", "pair": "hypothesis"}),
    "lists of labels": Shape(
        jsonl("topics.jsonl", each(lambda n: {"text": review(n), "labels": SEVERAL[n % 4]})),
        "multi_label",
        {"label": "labels"},
    ),
    "separated labels": Shape(
        table("topics.csv", each(lambda n: {"text": review(n), "labels": "|".join(SEVERAL[n % 4])})),
        "multi_label",
        {"label": "labels"},
        data={"label_separator": "|"},
    ),
    "scores": Shape(
        table("scores.csv", each(lambda n: {"text": review(n), "score": round(0.37 * (n % 11), 2) + 0.5})),
        "regress",
        {"label": "score"},
    ),
    "similarity of pairs": Shape(
        table(
            "sts.tsv",
            each(lambda n: {"sentence1": review(n), "sentence2": said(n), "similarity": f"{(n % 9) / 2:.3f}"}),
            "\t",
        ),
        "regress",
        {"text": "sentence1", "pair": "sentence2", "label": "similarity"},
    ),
    "conll of two columns": Shape(plain("train.conll", conll(2)), "tag", {"words": "tokens"}),
    "conll of four columns": Shape(plain("ner.txt", conll(4)), "tag", {"words": "tokens"}, {"format": "conll"}),
    "lists of tags": Shape(
        jsonl("ner.jsonl", each(lambda n: {"id": str(n), "tokens": words(n), "ner_tags": TAGS})),
        "tag",
        {"words": "tokens", "tags": "ner_tags"},
        data={"ignore": ("id",)},
    ),
    "spans": Shape(jsonl("spans.jsonl", each(spans)), "tag", {"spans": "entities"}),
    "squad nested": Shape(whole("squad.json", nested()), "answer"),
    "squad rows": Shape(jsonl("squad.jsonl", each(squad)), "answer"),
    "squad flat": Shape(table("flat.csv", each(answer_of)), "answer", {"answers": "answer"}),
}
