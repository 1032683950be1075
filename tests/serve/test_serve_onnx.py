"""`qkit serve --runtime onnxruntime`, asked with OpenAI's client: one server for all of it, on the tiny model's ONNX export in fp32."""

from __future__ import annotations

import shutil
import threading
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
    TURNS,
    Served,
    asking,
    check_drains,
    check_keeps_connections,
    check_streams_alike,
    figure,
    serving,
    wait_for_nobody,
)
from qkit.bench import any_server
from qkit.bench.tool import COMPLETIONS

pytestmark = pytest.mark.slow

pytest.importorskip("onnxruntime_genai")

LENGTH = 256
TEXT_MODEL = "served-onnx"
chat = asking(TEXT_MODEL)


@pytest.fixture(scope="module")
def served(onnx_exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(onnx_exports["fp32"], folder / TEXT_MODEL)
    settings = [
        f"serve.max_model_len={LENGTH}",
        "serve.max_body_bytes=20000",
        "serve.max_requests=12",
        "serve.max_num_seqs=8",
    ]
    sets = [word for setting in settings for word in ("--set", setting)]
    with serving(folder, folder / TEXT_MODEL, "--runtime", "onnxruntime", "--restart", *sets) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return served.client()


def test_it_says_what_the_weights_say(client: openai.OpenAI, tiny_model: Path) -> None:
    """Greedy, in fp32, from the template's own prompt: as transformers has it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    written = model.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :]
    answer = chat(client, max_tokens=24)
    assert answer.choices[0].message.content == tokenizer.decode(written, skip_special_tokens=True)
    assert answer.usage.prompt_tokens == prompt.shape[1]


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    check_streams_alike(chat, client)


def test_requests_at_once_say_what_they_say_alone(client: openai.OpenAI) -> None:
    """Greedy beside drawn ones, and of several lengths, in one batch."""
    asked = [{"messages": [{"role": "user", "content": "say " + "a" * n}]} for n in (1, 9, 30)]
    alone = [chat(client, **one).choices[0].message.content for one in asked]
    found: dict[int, str] = {}

    def ask(index: int) -> None:
        drawn = {"temperature": 1.0} if index >= 3 else {}
        found[index] = chat(client, **asked[index % 3], **drawn).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(3)] == alone and len(found) == 6


def test_stop_and_max_tokens(client: openai.OpenAI) -> None:
    whole = chat(client, max_tokens=24)
    text = whole.choices[0].message.content
    stop = next(sign for sign in text[2:] if sign.isascii())
    for stream in (False, True):
        cut = chat(client, max_tokens=24, stop=[stop, "never"], stream=stream)
        choices = [chunk.choices[0] for chunk in cut] if stream else cut.choices
        said = "".join((c.delta.content if stream else c.message.content) or "" for c in choices)
        assert said == text.partition(stop)[0] and choices[-1].finish_reason == "stop"
    assert whole.usage.completion_tokens == 24 and whole.choices[0].finish_reason == "length"


def test_n(client: openai.OpenAI) -> None:
    answer = chat(client, temperature=1.0, n=3, max_tokens=12)
    assert len({choice.message.content for choice in answer.choices}) == 3 and answer.usage.completion_tokens <= 36
    chunks = list(chat(client, temperature=1.0, n=2, stream=True))
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}


def test_completions(client: openai.OpenAI) -> None:
    said = [client.completions.create(model=TEXT_MODEL, prompt=prompt, temperature=0) for prompt in ("abc", ["abc"])]
    assert said[0].choices[0].text == said[1].choices[0].text and said[0].usage.completion_tokens == 16


def test_a_prompt_of_ids_says_what_its_text_says(served: Served, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": TEXT_MODEL, "temperature": 0}
    ids = tokens(served, prompt="abc")
    said = [client.completions.create(**asked, prompt=prompt) for prompt in ("abc", ids, [ids])]
    assert len({one.choices[0].text for one in said}) == 1 and {one.usage.prompt_tokens for one in said} == {len(ids)}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**asked, prompt=[ids, ids])
    assert caught.value.param == "prompt"


def tokens(served: Served, **body: Any) -> list[int]:
    """What /tokenize makes of a request."""
    answer = httpx.post(f"{served.url}/tokenize", headers={"Authorization": f"Bearer {KEY}"}, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == LENGTH
    return list(found["tokens"])


def test_it_shows_the_ids_of_a_prompt(served: Served, client: openai.OpenAI, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tiny_model).apply_chat_template(
        TURNS, add_generation_prompt=True, return_dict=False
    )
    assert (
        tokens(served, messages=TURNS) == tokens(served, model=TEXT_MODEL, messages=TURNS, tools=[], stop=None) == ids
    )
    assert {chat(client, **more).usage.prompt_tokens for more in ({}, {"tools": []}, {"tools": None})} == {len(ids)}
    for body, param in (({"messages": "a"}, "messages"), ({"prompt": [[1], [2]]}, "prompt"), ({}, "prompt")):
        answer = httpx.post(f"{served.url}/tokenize", headers={"Authorization": f"Bearer {KEY}"}, json=body)
        error = answer.json()["error"]
        assert (
            answer.status_code == 400 and error["param"] == param and set(error) == {"message", "type", "param", "code"}
        )


def test_tools_reach_the_template(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "pick", "parameters": {}}}
    assert chat(client, tools=[tool]).choices[0].message.content


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"seed": 1, "temperature": 1.0}, "seed"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"temperature": 9}, "temperature"),
        ({"extra_body": {"top_k": 10**30}}, "top_k"),
        ({"extra_body": {"repetition_penalty": 1e300}}, "repetition_penalty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages",
        ),
        ({"stop": [["a"]]}, "stop"),
        ({"extra_body": {"n": "two"}}, "n"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "a" * LENGTH}], "max_tokens": None}, "messages"),
        ({"messages": [{"rôle": "user"}]}, "messages"),
    ],
)
def test_what_it_lacks_is_named(client: openai.OpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **change)
    assert caught.value.param == param and param in str(caught.value)


def test_nulls_and_an_empty_stop_are_what_is_left_to_the_server(client: openai.OpenAI) -> None:
    plain = chat(client)
    asked = {"top_p": None, "stop": "", "n": None, "presence_penalty": None, "stream": None, "seed": None}
    assert chat(client, **asked).choices[0].message.content == plain.choices[0].message.content


def test_content_in_parts_is_one_text(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "say"}, {"type": "text", "text": "a"}]
    said = [chat(client, messages=[{"role": "user", "content": content}]) for content in (parts, "say\na")]
    assert said[0].usage == said[1].usage and said[0].choices[0].message == said[1].choices[0].message


@pytest.mark.parametrize("arguments", ['{"side": "left"}', {"side": "left"}, ""])
def test_arguments_of_tool_calls_are_objects_to_the_template(arguments: Any) -> None:
    from qkit.server.onnx_requests import template_message

    call = {"id": "1", "type": "function", "function": {"name": "pick", "arguments": arguments}}
    made = template_message({"role": "assistant", "content": None, "tool_calls": [call]})
    assert made["tool_calls"][0]["function"]["arguments"] == ({"side": "left"} if arguments else {})


def test_what_the_engine_s_bindings_refuse_ends_one_request_and_not_the_server(served: Served) -> None:
    import asyncio

    from qkit.server.onnx_engine import Ended, Engine, Sampling

    folder = served.stderr.parent / TEXT_MODEL
    engine = Engine(folder, 4, failed=lambda: pytest.fail("the engine gave up"))

    async def answer(sampling: Sampling) -> list[Any]:
        return [item async for item in engine.generate([1, 2, 3], sampling)]

    async def both() -> list[list[Any]]:
        asked = answer(Sampling(4, 1.0, top_k=10**30)), answer(Sampling(4, 0.0, min_tokens=4))
        return list(await asyncio.wait_for(asyncio.gather(*asked), 60))

    wrong, right = asyncio.run(both())
    engine.close()
    assert isinstance(wrong[0], Ended) and wrong[0].reason == "error" and not engine.failure
    assert len(right) == 5 and right[-1] == Ended("length")


def test_what_changes_nothing_is_let_through(client: openai.OpenAI) -> None:
    assert chat(
        client,
        seed=1,
        user="me",
        frequency_penalty=0,
        logprobs=False,
        response_format={"type": "text"},
        parallel_tool_calls=True,
        store=False,
        service_tier="auto",
        n=1,
        logit_bias={},
        tools=[],
    ).choices


def test_a_wrong_model_a_wrong_key_and_broken_json(served: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=TEXT_MODEL):
        chat(client, model="nobody")
    with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
        chat(served.client("wrong"))
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.post(f"{served.url}/v1/chat/completions", headers=headers, content=b'{"model": ')
    assert answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({}, b"x" * 20_001, 413),
        ({"Transfer-Encoding": "chunked"}, [b"{}"], 411),
    ],
)
def test_sizes(served: Served, headers: dict[str, str], content: Any, status: int) -> None:
    own = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
    body = iter(content) if isinstance(content, list) else content
    assert httpx.post(f"{served.url}/v1/completions", headers=own, content=body).status_code == status


def test_clients_that_go_away_leave_nothing_running(served: Served, client: openai.OpenAI) -> None:
    stream = chat(client, stream=True, max_tokens=200, extra_body={"ignore_eos": True})
    assert next(iter(stream))
    stream.close()
    body = {"model": TEXT_MODEL, "prompt": "a", "max_tokens": 200, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=0.02)
    wait_for_nobody(served, "qkit_requests_running")


def test_it_can_be_benched_with_what_it_takes(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    found = any_server.accepted_parameters(served.url, COMPLETIONS, TEXT_MODEL)
    assert found == {"add_special_tokens", "ignore_eos", "repetition_penalty"}


def test_metrics(served: Served) -> None:
    assert figure(served, "qkit_generation_tokens_total") > 50
    assert figure(served, "qkit_time_to_first_token_seconds_count") > 5
    assert figure(served, 'qkit_requests_total{status="400"}') > 5


def test_a_connection_may_wait(served: Served) -> None:
    check_keeps_connections(served)


def test_a_dead_server_is_seen_and_started_again(served: Served) -> None:
    before = [process for process in served.below() if "qkit.server.onnx_app" in " ".join(process.cmdline()[1:4])]
    assert before
    before[-1].kill()
    served.wait_for("restarting in 1 s", BUSY_SECONDS)
    assert "out-of-memory killer" in served.stderr.read_text()
    deadline = time.monotonic() + 60
    while served.stderr.read_text().count("ready after") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert chat(served.client()).choices


def test_sigterm_drains(served: Served) -> None:
    """Last, since it ends the server; no process is left."""
    below = served.below()
    check_drains(served, chat, tokens=200, seconds=30)
    assert not psutil.wait_procs(below, timeout=5)[1]
