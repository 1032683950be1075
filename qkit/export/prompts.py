"""Whether onnxruntime-genai makes of conversations the prompts that training saw.

`og.Tokenizer` renders a chat template with an engine of its own and encodes with code of its own. In 0.18 that engine knows neither
trim_blocks nor lstrip_blocks, cuts tools down to names and bare properties under most templates, and divides integers; the encoder adds no
first token and normalizes nothing. None of it is an error there. So the folder is asked, on some of the run's rows and on a tool call.

The library is asked in a process of its own with a time limit, `python -m qkit.export._prompts FOLDER CASES ANSWERS`: what it does to a
template that it was not made for, a crash included, must not end an export.
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LIBRARY = "onnxruntime-genai"
ROWS = 8  # of the run
LOOKED_AT = 512  # rows from which they are taken
SECONDS = 60.0
SHOWN = 60  # characters of either prompt, from where they part
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
    "function": {
        "arguments": {"city": "Zürich", "seats": 3},
        "name": "find_train",
    },  # in the order that vLLM and training write
}
ASKED = {
    "role": "user",
    "content": "To Zu\u0308rich,  please:\n\n1. Early",
}  # a letter that normalizing would put together
ANSWERED: list[dict[str, Any]] = [
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"at": "7:02"}'},
]
# What is asked beside the rows; a template need not take all of it.
PROBES: Mapping[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "a question": ([ASKED], []),
    "a question with a tool": ([ASKED], [TOOL]),
    "a tool call": ([{"role": "system", "content": "Be brief."}, ASKED, *ANSWERED], [TOOL]),
}


@dataclass(frozen=True)
class Case:
    """A conversation, its prompt as transformers writes it, and the token ids that training made of that; or a plain text and its ids."""

    name: str
    text: str
    ids: list[int]
    messages: list[dict[str, Any]] | None = None
    tools: Sequence[dict[str, Any]] = ()


def compared(folder: Path, rows: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """How the library's prompts differ from training's: `by` (its version), `cases` (how many were tried), `differ` (a sentence for each).

    `folder`: an export that the library opens; `rows`: the run's data/train.parquet.
    """
    from importlib.metadata import version

    cases = [*_cases(folder, rows, trust_remote_code)]
    answers = _asked(folder, cases)
    found = (_difference(case, answer) for case, answer in zip(cases, answers, strict=True))
    return {"by": f"{LIBRARY} {version(LIBRARY)}", "cases": len(cases), "differ": [said for said in found if said]}


# --- what is asked ----------------------------------------------------------------------------------------------------


def _cases(folder: Path, rows: Path, trust_remote_code: bool) -> Iterator[Case]:
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
    """The first rows of a split, as far as it is there and says what they were made of."""
    from pyarrow import parquet

    if not rows.is_file():
        return []
    columns = ["input_ids", "start", "messages", "tools"]
    with parquet.ParquetFile(rows) as file:
        if not set(columns) <= set(file.schema_arrow.names):
            return []
        batch = next(file.iter_batches(LOOKED_AT, columns=columns), None)
        return batch.to_pylist() if batch is not None else []


def _of_row(tokenizer: PreTrainedTokenizerBase, name: str, record: Mapping[str, Any]) -> Case:
    """A conversation's prompt as it was trained on; of a plain text what a user's own text of these words becomes."""
    messages = json.loads(record["messages"])
    if messages:
        ids = record["input_ids"][: record["start"]]
        return Case(name, tokenizer.decode(ids), ids, messages, json.loads(record["tools"]))
    text = tokenizer.decode(record["input_ids"], skip_special_tokens=True)
    return Case(name, text, tokenizer(text).input_ids)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, name: str, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]
) -> Iterator[Case]:
    """None where the template refuses it: then training had none like it either."""
    from qkit.chat import template

    try:
        text = template.render(tokenizer, messages, tools)
    except template.TemplateRefusal:
        return
    yield Case(name, text, tokenizer(text, add_special_tokens=False).input_ids, messages, tools)


# --- what comes of it -------------------------------------------------------------------------------------------------


def _asked(folder: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The library's answer to each case; what became of it where it gave none."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "cases.json", Path(scratch) / "answers.jsonl"
        asked.write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
        answered.touch()
        program = [sys.executable, "-m", "qkit.export.prompts", str(folder), str(asked), str(answered)]
        end = _run(program)
        answers = [json.loads(line) for line in answered.read_text(encoding="utf-8").split("\n") if line.endswith("}")]
    return [*answers, *({"error": end} for _ in cases[len(answers) :])]


def _run(program: Sequence[str]) -> str:
    """How it ended."""
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
        return f"it did not come back within {SECONDS:g} s"
    if done.returncode < 0:
        return f"it crashed (signal {-done.returncode})"
    return (done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1][:200]


def _difference(case: Case, answer: Mapping[str, Any]) -> str:
    """In a sentence; empty when there is none."""
    if "error" in answer:
        return f"{case.name}: no prompt comes of it: {answer['error']}"
    if answer["ids"] == case.ids:
        return ""
    if answer["text"] == case.text:
        return f"{case.name}: {len(answer['ids'])} token ids of the same text where training has {len(case.ids)}"
    place = next((i for i, (a, b) in enumerate(zip(answer["text"], case.text, strict=False)) if a != b), -1)
    begin = max(0, place if place >= 0 else min(len(answer["text"]), len(case.text)))
    wrote, wanted = (text[begin : begin + SHOWN] for text in (answer["text"], case.text))
    return f"{case.name}: from character {begin} on it writes {wrote!r} where training has {wanted!r}"


def answer(folder: Path, cases: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """What the library makes of each case: text and ids, or its error. Called in a process of its own."""
    import onnxruntime_genai

    tokenizer = onnxruntime_genai.Tokenizer(str(folder))
    for case in cases:
        try:
            text = case["text"] if case["messages"] is None else _prompt(tokenizer, case)
            yield {"text": text, "ids": tokenizer.encode(text).tolist()}
        except Exception as error:  # the library's, of any kind: this is what is to be found out
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
