"""The serve contract against a real vLLM server: one server, and runs that were trained otherwise than it serves."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import served as helpers_served
from helpers.command import qkit_here
from helpers.processes import living
from helpers.tiny import build_tokenizer, tiny_settings
from qkit import pipeline
from qkit.chat import conversation
from qkit.commands import compare
from qkit.core.errors import ParityFailed, ServerError
from qkit.core.files import read_json, write_json
from qkit.core.progress import Progress
from qkit.export.formats import onnx as exporter
from qkit.measure import contract, endpoint
from qkit.plugins.exporter import Job
from qkit.recipe.load import load
from qkit.recipe.schema import Serve
from qkit.run.directory import Run
from qkit.server import process

pytestmark = pytest.mark.slow

PARSER = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
# Tools in the first turn, and calls as Hermes and Qwen write them.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% if terse %}<|im_start|>system\nBe terse.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['reasoning_content'] %}<think>{{ message['reasoning_content'] }}</think>{% endif %}"
    "{{ message['content'] or '' }}"
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
    """Every other one calls a tool; one has called before, one has thought before, and one has a variable of the template."""
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
            turns = [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i)}]
            thought = [turns[0], {**turns[1], "reasoning": "It asks for a number."}]
            yield {
                "messages": [*(thought if i == 5 else []), *turns],
                "chat_template_kwargs": {"terse": True} if i == 3 else None,
            }


FORMS = (
    "text in parts, a question in two parts, an earlier call and its result, an earlier answer with its thinking, "
    "a system turn in parts, a developer turn in parts"
)


@dataclass(frozen=True)
class Served:
    run: Run
    url: str
    server: helpers_served.Served


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
    settings |= {
        "train": {"max_steps": 4, "learning_rate": 1e-2},
        "export": {"formats": []},
        "bench": {"runtimes": ["transformers"]},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    run = Run.create(folder / "run", load(folder / "tiny.yaml"))
    for stage in ("data", "train", "evaluate", "merge"):
        pipeline.execute(run, stage)
    settings = ("serve.max_model_len=512", "serve.enforce_eager=true")
    sets = [word for setting in settings for word in ("--set", setting)]
    command = [run.folder("merge"), "--name", "tiny", *sets, "--", *PARSER]
    with helpers_served.serving(folder, *command, env={"VLLM_API_KEY": ""}) as server:
        yield Served(run, server.url, server)


def by_name(found: contract.Contract) -> dict[str, contract.ContractCheck]:
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
    assert (
        '1 with chat_template_kwargs, such as {"terse": true}, which clients must send'
        in checks["prompt tokens"].detail
    )
    assert checks["prompt tokens"].detail.endswith(f"; same ids also for {FORMS}")
    assert checks["tool calls"].detail.startswith("4 trained answers")


@pytest.fixture(scope="module")
def ours(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of qkit's own server on the ONNX export of the same merged model."""
    pytest.importorskip("onnxruntime_genai")
    folder = tmp_path_factory.mktemp("onnx")
    merged, how = served.run.folder("merge"), served.run.recipe
    exporter.export(Job(merged, merged, merged, merged, how, folder / "export.log"), folder / "tiny", "fp32")
    section = Serve(port=0, max_model_len=512)
    port = process.free_port(section)
    options = {"model": str(folder / "tiny"), "served-model-name": "tiny", "port": str(port), "max-model-len": "512"}
    argv = (sys.executable, "-m", "qkit.server.onnx_app", *process.command(tuple(options.items())))
    running = process.Server(process.Program("the ONNX server", argv), "tiny", section, port, folder / "server.log")
    try:
        running.wait()
        yield running.url
    finally:
        running.stop()


def test_our_own_server_keeps_it_too(served: Served, ours: str) -> None:
    """It cannot be made to say a token: its folder says where it stops."""
    found = contract.check(served.run, ours)
    found.enforce()
    checks = by_name(found)
    assert {name: check.status for name, check in checks.items()} == {
        **dict.fromkeys(("prompt tokens", "stop tokens", "length"), "ok"),
        **dict.fromkeys(("dtype", "tied head", "tool calls"), "not checked"),
        "default sampling": "noted",
    }
    assert checks["prompt tokens"].detail.endswith(f"; same ids also for {FORMS}")


@pytest.mark.parametrize(
    ("key", "change", "form"),
    [
        ("content", lambda text: text.replace("\nAnd now?", "And now?"), "a question in two parts"),
        ("tool_calls", lambda _: [], "an earlier call and its result"),
    ],
)
def test_a_rule_that_only_users_requests_show_is_found_out(
    key: str, change: Any, form: str, served: Served, ours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out rows hold nothing of the kind; here it is training that has the other rule."""
    rule = conversation.served

    def otherwise(*given: Any) -> list[dict[str, Any]]:
        return [{**turn, **({key: change(turn[key])} if key in turn else {})} for turn in rule(*given)]

    monkeypatch.setattr(conversation, "served", otherwise)
    found = contract.check(served.run, ours)
    assert [check.name for check in found.broken] == ["prompt tokens"]
    assert f"row 0, with {form}: " in found.broken[0].detail


def test_an_empty_list_of_tools_that_changes_the_prompt_is_found_out(
    served: Served, ours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint.ServerSubject, "prompt_length", lambda *_: 31)
    [broken] = contract.check(served.run, ours).broken
    assert "with tools: []: 31 prompt tokens; training had" in broken.detail


def trained_otherwise(served: Served, folder: Path, *settings: str) -> Run:
    """The run with other settings and all that its stages left."""
    root = shutil.copytree(served.run.root, folder / "run")
    return Run(root, load(root / "recipe.yaml", settings))


def another_template(served: Served, folder: Path) -> Run:
    file = folder / "other.jinja"
    file.write_text(TEMPLATE.replace("system\n", "tools\n"), encoding="utf-8")
    run = trained_otherwise(served, folder, f"model.chat_template={file}")
    pipeline.execute(run, "data")
    return run


def another_stop_token(served: Served, folder: Path) -> Run:
    run = trained_otherwise(served, folder)
    write_json(run.folder("data") / "tokens.json", {**read_json(run.folder("data") / "tokens.json"), "stop": [2, 9]})
    return run


def longer_rows(served: Served, folder: Path) -> Run:
    run = trained_otherwise(served, folder, "data.max_length=2048", "data.batch_tokens=2048")
    write_json(run.folder("data") / "summary.json", {"lengths": [[40, 7, 80], [700, 1, 9]]})
    return run


@pytest.mark.parametrize(("name", "status"), [("safetensors", "ok"), ("bnb-nf4", "ok"), ("vllm", "differs")])
def test_a_format_of_one_dtype_is_not_held_to_the_merge_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, status: str
) -> None:
    """A merge may be kept in float16; these are always bfloat16."""
    monkeypatch.setattr(contract, "dtype_of", lambda _: "float16")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    (tmp_path / "qkit.json").write_text(json.dumps({"format": name}))
    run: Any = None
    assert contract._dtype(run, tmp_path).status == status


def another_dtype(served: Served, folder: Path) -> Run:
    return trained_otherwise(served, folder, "merge.dtype=float16")


def calls_written_otherwise(served: Served, folder: Path) -> Run:
    """Calls that the server's parser does not know for what they are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    run = trained_otherwise(served, folder)
    file = run.folder("data") / "test.parquet"
    found = pq.read_table(file)
    answers = pa.array([text.replace("tool_call>", "function>") for text in found["answer"].to_pylist()])
    pq.write_table(found.set_column(found.schema.get_field_index("answer"), "answer", answers), file)
    return run


@pytest.mark.parametrize(
    ("how", "name", "said"),
    [
        (another_template, "prompt tokens", r"row 0: \d+ prompt tokens; training had .*'tools.* this has 'system"),
        (another_stop_token, "stop tokens", "does not stop at token 9"),
        (longer_rows, "length", "the context is 512 tokens, the longest training row has 700: raise serve.max_model_len"),
        (another_dtype, "dtype", "config.json says bfloat16, the run wrote float16"),
        (calls_written_otherwise, "tool calls", "parser reads no call, the row contains .*'add', {'a': 0, 'b': 0}"),
    ],
)  # fmt: skip
def test_a_server_that_differs(how: Any, name: str, said: str, served: Served, tmp_path: Path) -> None:
    found = contract.check(how(served, tmp_path), served.url, "tiny")
    assert [check.name for check in found.broken] == [name]
    with pytest.raises(ParityFailed, match=rf"does not handle requests for tiny as training did\n{name}: .*{said}"):
        found.enforce()
    assert f"{name}" in contract.screen(found) and "differs" in contract.screen(found)


@pytest.mark.parametrize(
    ("config", "status", "said"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, "noted", "temperature 0.6, top_p 0.9; evaluation was greedy"),
        ({"temperature": 0, "repetition_penalty": 1.1}, "noted", "temperature=0, repetition_penalty=1"),
        ({"temperature": 0}, "ok", "greedy"),
    ],
)
def test_what_a_request_gets_that_names_no_temperature(
    config: dict[str, float], status: str, said: str, tmp_path: Path
) -> None:
    write_json(tmp_path / "generation_config.json", config)
    found = contract._sampling(tmp_path)
    assert found.status == status and said in found.detail


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "the template writes today's date"),
        ("{{ messages }}", "the tokenizer has changed"),
    ],
)
def test_a_template_that_writes_the_date_is_named_as_the_cause(text: str, said: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = text
    assert said in contract._difference(tokenizer, "row 0", [3, 4], [3, 5])


def test_no_server_and_no_such_model(served: Served) -> None:
    with pytest.raises(ServerError, match=r"does not serve other; it offers tiny"):
        contract.check(served.run, served.url, "other")
    with pytest.raises(ServerError, match="start one with `qkit serve`") as caught:
        contract.check(served.run, "http://127.0.0.1:9")
    assert caught.value.url == "http://127.0.0.1:9"


def test_the_command(served: Served, tmp_path: Path) -> None:
    """Exit code 2 when anything differs."""
    for run, code in ((served.run, 0), (another_stop_token(served, tmp_path), 2)):
        done = qkit_here("verify", run.root, "--server", served.url, "--json")
        assert done.returncode == code, done.stderr
        assert {check["status"] for check in json.loads(done.stdout)["checks"]} >= {"ok", "noted"}


def test_a_server_beside_the_merged_model(served: Served) -> None:
    """Over the server's top 20 of 259 the divergence is a lower bound, and it says so, whichever comes first."""
    merged = compare.side(str(served.run.folder("merge")))
    server = compare.side(f"{served.url}/v1")
    asked = compare.comparison_rows(merged, server, None, Progress())
    there, back = (compare.compare(*pair, asked, Progress()) for pair in ((merged, server), (server, merged)))
    both = compare.compare(server, server, asked, Progress())
    for found in (there, back):
        assert "the server's top 20 and the rest as one: a lower bound" in found.over
        assert 0 <= found.kl_mean < 0.01 and found.top1 > 0.8
        assert found.loss_a == pytest.approx(found.loss_b, abs=0.05)
    assert there.loss_a == back.loss_b
    assert "both servers' top 20" in both.over and both.kl_mean < 1e-6 and both.identical == 8 and both.parting is None


def test_a_killed_server_leaves_no_process(served: Served) -> None:
    """Last, since it ends the server."""
    below = served.server.below()
    served.server.process.kill()
    served.server.process.wait()
    assert len(below) > 1 and not living(below, 30)
