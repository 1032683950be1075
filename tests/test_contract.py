"""The serve contract against a real vLLM server: one server, and runs that were trained otherwise than it serves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_settings

from qkit import contract, pipeline
from qkit.device import detect
from qkit.recipe import Serve, load
from qkit.run import Run
from qkit.runtimes import vllm

PARSER = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
# Tools in the first turn, and calls as Hermes and Qwen write them.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}<tool_call>\n"
    "{\"name\": \"{{ call['function']['name'] }}\", \"arguments\": {{ call['function']['arguments'] | tojson }}}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a"]},
    },
}  # fmt: skip


def rows() -> Iterator[dict[str, Any]]:
    """Every other one calls a tool; one has called before."""
    for i in range(8):
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": i, "b": 2 * i}}}
        turns = [
            {"role": "user", "content": f"add {i} and {2 * i}"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        if i == 4:
            again = [{"role": "tool", "content": "12"}, {"role": "user", "content": "again"}, turns[-1]]
            yield {"messages": [*turns, *again], "tools": [TOOL]}
        elif i % 2 == 0:
            yield {"messages": turns, "tools": [TOOL]}
        else:
            yield {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i)}]}


@dataclass(frozen=True)
class Served:
    run: Run
    url: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Served]:
    """A run whose rows call tools, and vLLM on its merged model with a parser for such calls."""
    folder = tmp_path_factory.mktemp("contract")
    model = shutil.copytree(tiny_model, folder / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    settings = tiny_settings(model, folder / "rows.jsonl")
    settings["data"] |= {
        "train": [{"source": str(folder / "rows.jsonl")}],
        "test": [{"source": str(folder / "rows.jsonl")}],
    }
    settings["data"] |= {"max_overlap": 1, "max_length": 512, "batch_tokens": 512}
    settings |= {"train": {"max_steps": 1}, "export": {"formats": []}, "bench": {"runtimes": ["transformers"]}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    run = Run.create(folder / "run", load(folder / "tiny.yaml"))
    for stage in ("data", "train", "merge"):
        pipeline.execute(run, stage)
    with pytest.MonkeyPatch.context() as patch:
        plain = vllm.argv
        patch.setattr(vllm, "argv", lambda *given: [*plain(*given), *PARSER])
        section = Serve(port=0, max_model_len=512, enforce_eager=True)
        server = vllm.Server(run.folder("merge"), "tiny", section, detect(), folder / "vllm.log")
    try:
        server.wait()
        yield Served(run, server.url)
    finally:
        server.stop()


def by_name(found: contract.Contract) -> dict[str, contract.Check]:
    return {check.name: check for check in found.checks}


def test_a_server_that_keeps_the_contract(served: Served) -> None:
    found = contract.check(served.run, served.url)
    found.enforce()
    checks = by_name(found)
    assert {name: check.status for name, check in checks.items()} == {
        **dict.fromkeys(("prompt tokens", "stop tokens", "length", "dtype", "tied head", "tool calls"), "ok"),
        "default sampling": "noted",
    }
    assert checks["prompt tokens"].detail.startswith("8 held-out conversations, 4 with tools")
    assert checks["tool calls"].detail.startswith("4 trained answers")
