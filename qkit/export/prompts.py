"""Checks whether onnxruntime-genai's prompts are those of training.

`og.Tokenizer` has its own template engine and its own encoder. In 0.18 the engine ignores trim_blocks and lstrip_blocks, reduces tools to
names and bare properties under most templates, and divides integers as integers; the encoder adds no first token and does not normalize.
None of these raises an error. So its prompts are compared with training's, on some of the run's rows and on a tool call.

The library runs in a process of its own with a time limit, `python -m qkit.export.prompts FOLDER CASES ANSWERS`, so that a failure on an
unusual template, even a crash, does not end the export.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.process import kill_when_parent_dies
from qkit.core.sequences import first_difference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LIBRARY = "onnxruntime-genai"
ROWS = 8  # of the run that are compared
FIRST_ROWS = 512  # of the run, from which they are taken
SECONDS = 60.0
SHOWN = 60  # characters of either prompt, from where they differ
TOOL = {
    "type": "function",
    "function": {
        "name": "find_train",
        "description": "Find the next train; times are local.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where to", "enum": ["Zürich", "Genève"]},
                "seats": {"type": "integer", "minimum": 1, "default": 2},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALL = {
    "id": "call00001",
    "type": "function",
    # In the order that vLLM and training use
    "function": {"arguments": {"city": "Zürich", "seats": 3}, "name": "find_train"},
}
# A letter and its accent, which NFC composes
QUESTION = {"role": "user", "content": "To Zu\u0308rich,  please:\n\n1. Early"}
CALL_AND_RESULT: list[dict[str, Any]] = [
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"at": "7:02"}'},
]
# Conversations that are compared besides the rows; a template may reject some of them.
PROBES: Mapping[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "a question": ([QUESTION], []),
    "a question with a tool": ([QUESTION], [TOOL]),
    "a tool call": ([{"role": "system", "content": "Be brief."}, QUESTION, *CALL_AND_RESULT], [TOOL]),
}


@dataclass(frozen=True)
class Case:
    """A conversation, its prompt as rendered by transformers, and the prompt's token ids in training; or a plain text and its ids."""

    name: str
    text: str
    ids: list[int]
    messages: list[dict[str, Any]] | None = None
    tools: Sequence[dict[str, Any]] = ()


def compared(folder: Path, rows: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Compare the library's prompts with training's.

    Args:
        folder: an export that the library opens.
        rows: the run's data/train.parquet.

    Returns:
        `by`: name and version of the library. `cases`: how many prompts were compared. `differ`: a sentence for each that differs.
    """
    from importlib.metadata import version

    cases = [*cases_of(folder, rows, trust_remote_code)]
    answers = _answers(folder, cases)
    sentences = [_difference(case, answer) for case, answer in zip(cases, answers, strict=True)]
    return {
        "by": f"{LIBRARY} {version(LIBRARY)}",
        "cases": len(cases),
        "differ": [sentence for sentence in sentences if sentence],
    }


# --- cases ------------------------------------------------------------------------------------------------------------


def cases_of(folder: Path, rows: Path, trust_remote_code: bool) -> Iterator[Case]:
    """Yield what is compared: some of the first rows of a split, and PROBES."""
    from qkit.model import tokenizer as model_tokenizer
    from qkit.recipe import schema

    tokenizer = model_tokenizer.load_tokenizer(
        folder, schema.Model(source=str(folder), trust_remote_code=trust_remote_code)
    )
    records = _records(rows)
    for number in range(0, len(records), -(-len(records) // ROWS) or 1):
        yield _of_row(tokenizer, f"row {number}", records[number])
    if tokenizer.chat_template:
        for name, (messages, tools) in PROBES.items():
            yield from _rendered(tokenizer, name, messages, tools)


def _records(rows: Path) -> list[dict[str, Any]]:
    """Return the first rows of a split; none if the file or one of its columns is missing."""
    from pyarrow import parquet

    if not rows.is_file():
        return []
    columns = ["input_ids", "start", "messages", "tools"]
    with parquet.ParquetFile(rows) as file:
        if not set(columns) <= set(file.schema_arrow.names):
            return []
        batch = next(file.iter_batches(FIRST_ROWS, columns=columns), None)
        return batch.to_pylist() if batch is not None else []


def _of_row(tokenizer: PreTrainedTokenizerBase, name: str, record: Mapping[str, Any]) -> Case:
    """Return a row's prompt as in training; for a plain text, the token ids of that text when a user sends it."""
    messages = json.loads(record["messages"])
    if messages:
        ids = record["input_ids"][: record["start"]]
        return Case(name, tokenizer.decode(ids), ids, messages, json.loads(record["tools"]))
    text = tokenizer.decode(record["input_ids"], skip_special_tokens=True)
    return Case(name, text, tokenizer(text).input_ids)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, name: str, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]
) -> Iterator[Case]:
    """Yield the case, unless the template rejects the conversation: then training had none like it."""
    from qkit.chat import template

    try:
        text = template.render(tokenizer, messages, tools)
    except template.TemplateRefusal:
        return
    yield Case(name, text, tokenizer(text, add_special_tokens=False).input_ids, messages, tools)


# --- answers ----------------------------------------------------------------------------------------------------------


def _answers(folder: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Return the library's answer to each case, or why there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        input_file, output_file = Path(scratch) / "cases.json", Path(scratch) / "answers.jsonl"
        input_file.write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
        output_file.touch()
        program = [sys.executable, "-m", "qkit.export.prompts", str(folder), str(input_file), str(output_file)]
        ending = ending_of(program)
        answers = [
            json.loads(line) for line in output_file.read_text(encoding="utf-8").split("\n") if line.endswith("}")
        ]
    return [*answers, *({"error": ending} for _ in cases[len(answers) :])]


def ending_of(program: Sequence[str]) -> str:
    """Run a program with the time limit, and describe how it ended: by a crash, or with the last line of its stderr."""
    try:
        done = subprocess.run(
            program,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            preexec_fn=kill_when_parent_dies(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {SECONDS:g} s"
    if done.returncode < 0:
        return f"the library crashed (signal {-done.returncode})"
    return (done.stderr.decode(errors="replace").strip().splitlines() or ["no error message"])[-1][:200]


def _difference(case: Case, answer: Mapping[str, Any]) -> str:
    """Describe the difference in a sentence; empty if there is none."""
    if "error" in answer:
        return f"{case.name}: no prompt: {answer['error']}"
    if answer["ids"] == case.ids:
        return ""
    if answer["text"] == case.text:
        return f"{case.name}: {len(answer['ids'])} token ids for the same text where training has {len(case.ids)}"
    begin = first_difference(answer["text"], case.text) or 0
    actual, expected = (text[begin : begin + SHOWN] for text in (answer["text"], case.text))
    return f"{case.name}: from character {begin} it has {actual!r} where training has {expected!r}"


def answer(folder: Path, cases: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the library's text and token ids for each case, or its error. Runs in a process of its own."""
    import onnxruntime_genai

    tokenizer = onnxruntime_genai.Tokenizer(str(folder))
    for case in cases:
        try:
            text = case["text"] if case["messages"] is None else _prompt(tokenizer, case)
            yield {"text": text, "ids": tokenizer.encode(text).tolist()}
        except Exception as error:  # any error of the library is a result
            yield {"error": (str(error) or type(error).__name__).splitlines()[0][:200]}


def _prompt(tokenizer: Any, case: Mapping[str, Any]) -> str:
    tools = {"tools": json.dumps(case["tools"], ensure_ascii=False)} if case["tools"] else {}
    messages = json.dumps(case["messages"], ensure_ascii=False)
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, **tools))


if __name__ == "__main__":
    with Path(sys.argv[3]).open("a", encoding="utf-8") as sink:
        for line in answer(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))):
            sink.write(json.dumps(line) + "\n")
            sink.flush()
