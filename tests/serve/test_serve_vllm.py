"""What a deployer gets from `qkit serve` and vLLM, asked with OpenAI's client: one server for all of it, on a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from helpers.served import (
    BUSY_SECONDS,
    KEY,
    Served,
    asking,
    check_drains,
    check_keeps_connections,
    check_streams_alike,
    holding,
    serving,
    wait_for_nobody,
)
from qkit.recipe.schema import Recipe
from qkit.runtimes import vllm

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not vllm.installed(), reason="vLLM is not installed")]

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "pick",
        "parameters": {"type": "object", "properties": {"side": {"enum": ["left", "right"]}}, "required": ["side"]},
    },
}
LENGTH = 500
chat = asking("tiny")


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on the tiny model that says something else than it."""
    return build_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "other", rank=4)


def build_adapter(base: Path, folder: Path, rank: int) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from qkit.model.provenance import write_adapter_note

    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=rank, lora_alpha=64, target_modules=targets, init_lora_weights=False),
    )
    model.save_pretrained(str(folder))
    how = Recipe.model_validate({"task": "chat", "model": {"source": str(base)}, "data": {}})
    write_adapter_note(folder, base, how, [])
    return folder


@pytest.fixture(scope="module")
def served(tiny_model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    settings = [
        f"serve.max_model_len={LENGTH}",
        "serve.enforce_eager=true",
        "serve.max_body_bytes=20000",
        "serve.max_requests=12",
    ]
    sets = [word for setting in settings for word in ("--set", setting)]
    own = ["--adapter", f"other={adapter}", "--runtime-adapters", "--restart", *sets]
    proxy = {"http_proxy": "http://127.0.0.1:1"}  # of a company's machine; it is not asked for what is on this one
    tools = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with serving(folder, tiny_model, *own, "--", *tools, env=proxy) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return served.client()


def test_what_it_says_of_itself(served: Served) -> None:
    assert served.told["models"] == ["tiny", "other"]
    assert "$VLLM_API_KEY" in served.told["curl"] and 'os.environ["VLLM_API_KEY"]' in served.told["python"]
    for line in (
        ["sh", "-c", served.told["curl"]],
        [sys.executable, "-c", served.told["python"].replace(")]", ")][:1]")],
    ):
        done = subprocess.run(line, env={"PATH": "/usr/bin:/bin", "VLLM_API_KEY": KEY}, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr


def test_the_key_is_in_no_command_line_and_no_log(served: Served) -> None:
    words = [" ".join(process.cmdline()) for process in served.below()]
    log = Path(served.stderr.read_text().partition("log: ")[2].partition(";")[0].strip())
    assert words and not any(KEY in word for word in words)
    assert "Application startup complete" in log.read_text() and KEY not in log.read_text()


def test_no_web_page_of_another_origin_is_answered(served: Served) -> None:
    asks = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{served.url}/v1/chat/completions", headers=asks)
    assert "access-control-allow-origin" not in answer.headers


def test_chat_with_usage(client: openai.OpenAI) -> None:
    answer = chat(client)
    assert answer.choices[0].message.content and answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.completion_tokens <= 8 and answer.usage.prompt_tokens == 24


def test_what_says_nothing_changes_nothing(client: openai.OpenAI) -> None:
    """vLLM itself refuses an empty list of tools, and a name that is null."""
    turn = {"role": "user", "name": None, "content": [{"type": "text", "text": "say a"}]}
    for asked in (
        {"tools": [], "tool_choice": "auto"},
        {"tools": None},
        {"messages": [turn]},
        {"stop": [], "logit_bias": {}},
    ):
        assert chat(client, **asked).usage.prompt_tokens == 24, asked


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    check_streams_alike(chat, client)


def test_stop(client: openai.OpenAI) -> None:
    text = chat(client, max_tokens=24).choices[0].message.content
    stop = next(sign for sign in text[2:] if sign.isascii())
    cut = chat(client, max_tokens=24, stop=[stop])
    assert cut.choices[0].message.content == text.partition(stop)[0] and cut.choices[0].finish_reason == "stop"


def test_logprobs(client: openai.OpenAI) -> None:
    tokens = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert tokens and all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)


def test_seed_and_n(client: openai.OpenAI) -> None:
    drawn = [chat(client, temperature=1.0, seed=seed, n=3, max_tokens=12) for seed in (1, 1, 2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in drawn]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 3


def test_tools(client: openai.OpenAI) -> None:
    """A model with random weights writes no calls of its own; a named tool's is made of whatever it writes."""
    named = {"type": "function", "function": {"name": "pick"}}
    (call,) = chat(client, tools=[TOOL], tool_choice=named, max_tokens=64).choices[0].message.tool_calls
    assert call.function.name == "pick"
    assert chat(client, tools=[TOOL]).choices[0].message.content


def test_the_adapter_answers_for_itself(client: openai.OpenAI) -> None:
    assert chat(client, model="other").choices[0].message.content != chat(client).choices[0].message.content


def test_adapters_come_and_go(served: Served, adapter: Path) -> None:
    def adapters(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qkit", "adapters", *map(str, words), "--url", served.url, "--json"]
        return subprocess.run(command, env=_with_key(), capture_output=True, text=True)

    assert adapters("load", f"third={adapter}").returncode == 0
    assert [m["id"] for m in json.loads(adapters("list").stdout)] == ["tiny", "other", "third"]
    assert chat(served.client(), model="third").choices[0].message.content
    assert adapters("unload", "third").returncode == 0
    assert [m["id"] for m in json.loads(adapters("list").stdout)] == ["tiny", "other"]
    refused = adapters("unload", "third")
    assert refused.returncode == 2 and "third" in refused.stderr


def test_an_adapter_of_another_base_is_not_loaded(served: Served, other_model: Path, tmp_path: Path) -> None:
    from qkit.core.errors import ModelError
    from qkit.server.adapters import Endpoint

    foreign = build_adapter(other_model, tmp_path / "foreign", rank=4)
    with pytest.raises(ModelError, match="was trained on"):
        Endpoint(served.url, KEY).load("foreign", foreign)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "nobody"),
        ({"messages": [{"role": "user", "content": "a" * LENGTH}]}, openai.BadRequestError, str(LENGTH)),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        ({"temperature": "warm"}, openai.BadRequestError, "temperature"),
        ({"messages": [{"role": "user", "content": "a" * 30_000}]}, openai.APIStatusError, "serve.max_body_bytes"),
    ],
)
def test_wrong_requests(
    client: openai.OpenAI, change: dict[str, Any], error: type[openai.APIStatusError], words: str
) -> None:
    with pytest.raises(error, match=words):
        chat(client, **change)


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/models", "/invocations", "/tokenize", "/version", "/load"]
)
def test_no_path_but_health_and_metrics_without_the_key(served: Served, path: str) -> None:
    for key in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
        assert httpx.post(served.url + path, headers=key, json={}).status_code == 401
    assert httpx.get(f"{served.url}/health").status_code == httpx.get(f"{served.url}/metrics").status_code == 200


def test_a_wrong_key_and_broken_json(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
        chat(served.client("wrong"))
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    assert (
        httpx.post(f"{served.url}/v1/chat/completions", headers=headers, content=b'{"model": "tiny",').status_code
        == 400
    )


def test_a_client_that_goes_away_leaves_nothing_running(served: Served, client: openai.OpenAI) -> None:
    stream = chat(client, stream=True, max_tokens=300, extra_body={"ignore_eos": True})
    assert next(iter(stream))
    stream.close()
    wait_for_nobody(served, "vllm:num_requests_running")


def test_one_too_many(served: Served, client: openai.OpenAI) -> None:
    """12 are let in; the 13th is told to come again."""
    with holding(served, 12):
        assert any(_is_too_many(client) for _ in range(100))  # as soon as the last of them has been let in
    assert not all(_is_too_many(client) for _ in range(100))  # their clients are gone


def _is_too_many(client: openai.OpenAI) -> bool:
    try:
        return not chat(client)
    except openai.RateLimitError as error:
        return "serve.max_requests" in str(error)


def test_a_connection_may_wait(served: Served) -> None:
    check_keeps_connections(served)


def test_a_dead_engine_is_seen_and_started_again(served: Served) -> None:
    """Its core leaves no cause in the log, as its worker does."""
    engine = [process for process in served.below() if "VLLM::EngineCore" in " ".join(process.cmdline())]
    assert engine
    engine[0].kill()
    served.wait_for("ended by itself", BUSY_SECONDS)
    assert "out-of-memory killer" in served.stderr.read_text() and "restarting in 1 s" in served.stderr.read_text()
    deadline = time.monotonic() + 120
    while not _healthy(served):
        assert time.monotonic() < deadline and served.process.poll() is None
        time.sleep(0.2)
    begin = time.monotonic()
    while served.stderr.read_text().count("ready after") < 2:
        assert time.monotonic() - begin < 30
        time.sleep(0.05)
    assert json.loads((served.stderr.parent / "stdout").read_text()) == served.told  # still one document


def test_sigterm_drains(served: Served) -> None:
    """Last, since it ends the server; no process and no shared memory is left."""
    below = served.below()
    shared = _shared(below)
    check_drains(served, chat, tokens=430, seconds=40, count=11)
    _, alive = psutil.wait_procs(below, timeout=5)
    assert len(below) > 2 and not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert shared and not [path for path in shared if path.exists()]


def _shared(processes: list[psutil.Process]) -> set[Path]:
    """The pieces of shared memory that these have open."""
    maps = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in processes)
    return {Path(path) for path in re.findall(r"/dev/shm/psm_\w+", maps)}


def _healthy(served: Served) -> bool:
    try:
        return httpx.get(f"{served.url}/health").status_code == 200
    except httpx.TransportError:
        return False


def _with_key() -> dict[str, str]:
    import os

    return {**os.environ, "VLLM_API_KEY": KEY}
