"""What the ONNX server makes of requests, before its engine is asked: prompts, refusals, and parameters that change nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.chats import FILE, MODEL, REQUESTS, SAME, TEMPLATES, call, said, user
from helpers.data_traps.models import tokenizer_of

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from fastapi.testclient import TestClient
from pydantic import ValidationError

from qkit.chat import template
from qkit.server.onnx_app import Metrics, Service, build
from qkit.server.onnx_engine import Ended
from qkit.server.onnx_requests import (
    Chat,
    Completion,
    ModelDefaults,
    chat_prompt,
    model_defaults,
    text_prompt,
)
from qkit.server.refusal import Refused

GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))
TALK = {"messages": [user("a")]}


def tokenizer(text: str = TEMPLATES["chatml"]) -> Any:
    made = tokenizer_of(MODEL)
    made.chat_template = text
    return made


def asked(body: dict[str, Any]) -> Chat:
    made = Chat.model_validate({"model": "m", **body})
    made.check("m")
    return made


def written(of: Any, body: dict[str, Any]) -> str | None:
    """The prompt as text; None where it is refused."""
    try:
        text: str = of.decode(chat_prompt(of, asked(body)))
        return text
    except Refused:
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_makes_the_prompts_that_vllm_makes(name: str) -> None:
    of = tokenizer(TEMPLATES[name])
    assert {request: written(of, body) for request, body in REQUESTS.items()} == GOLDEN[name]["prompts"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_way_to_say_nothing_says_nothing(name: str) -> None:
    of = tokenizer(TEMPLATES[name])
    for way, (body, same) in SAME.items():
        assert written(of, body) == written(of, REQUESTS[same]), way


# What OpenAI's clients send where they were told nothing, and values that ask for what is done anyway.
DEFAULTS: dict[str, Any] = {
    "n": 1, "temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {},
    "logprobs": False, "top_logprobs": 0, "parallel_tool_calls": True, "store": False, "service_tier": "auto", "user": "u",
    "seed": None, "stream": False, "stream_options": None, "response_format": {"type": "text"}, "modalities": ["text"],
    "tool_choice": "none", "tools": [], "documents": [], "chat_template_kwargs": {}, "stop": [], "metadata": {}, "audio": None,
    "functions": [], "function_call": "none", "prediction": None, "web_search_options": None, "verbosity": "medium",
    "min_p": 0, "top_k": 0, "length_penalty": 1.0, "skip_special_tokens": True, "add_generation_prompt": True, "echo": False,
    "continue_final_message": False, "bad_words": [], "stop_token_ids": [], "ignore_eos": False, "include_reasoning": True,
}  # fmt: skip


def test_what_changes_nothing_is_let_through() -> None:
    of = tokenizer()
    plain = chat_prompt(of, asked(TALK))
    for name, value in DEFAULTS.items():
        for nothing in (value, None, *(() if name in ("n", "temperature", "top_p", "stream") else ("", [], {}))):
            assert chat_prompt(of, asked({**TALK, name: nothing})) == plain, (name, nothing)
    assert chat_prompt(of, asked({**TALK, **DEFAULTS})) == plain


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 0}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"min_p": 0.1}, "min_p"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"best_of": True}, "best_of"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"no_such_thing": "x"}, "no_such_thing"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"function": {"name": "f", "parameters": []}}]}, "tools"),
        ({"messages": [{"content": "a"}]}, "messages"),
        ({"messages": [user(["a"])]}, "messages"),
        ({"messages": [user([{"type": "text", "text": 1}])]}, "messages"),
        ({"messages": [user([{"type": "input_audio"}])]}, "messages"),
        ({"messages": [user(3)]}, "messages"),
        ({"messages": [user("a"), said(None, tool_calls=[call(0, arguments="[1]")])]}, "messages"),
        ({"messages": [user("a"), said(None, tool_calls=[{"id": "x"}])]}, "messages"),
        ({"messages": [user("a"), said(None, tool_calls=["f"])]}, "messages"),
        ({"messages": [user("a"), said(None, function_call={"name": "f", "arguments": "{}"})]}, "messages"),
        ({"chat_template_kwargs": {"tools": [1]}}, "chat_template_kwargs"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ],
)
def test_what_it_does_not_do_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as caught:
        chat_prompt(tokenizer(), asked({**TALK, **change}))
    assert (caught.value.param == param and f"`{param}" in str(caught.value)) or param in str(caught.value)


def test_variables_of_the_template() -> None:
    of = tokenizer(TEMPLATES["qwen3"])
    begun = [of.decode(chat_prompt(of, asked({**TALK, **more}))) for more in (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
        {"reasoning_effort": "high"},
        {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
        {},
    )]  # fmt: skip
    assert [text.endswith("<think>\n\n</think>\n\n") for text in begun] == [True, True, False, True, False]


def test_variables_and_thinking_reach_the_template() -> None:
    """As vLLM has them: variables that the template does not read change nothing, and what is no variable is refused."""
    of = tokenizer(
        "{% for m in messages %}{{ (m.reasoning_content or '') + m.content }}{% endfor %}{% if loud %}!{% endif %}<|im_end|>"
    )
    for name, nothing in (
        ("reasoning", {}),
        ("reasoning_content", {"reasoning": None}),
        ("reasoning", {"reasoning_content": ""}),
    ):
        turns = [user("a"), said("c", **{**nothing, name: "b"})]
        body = {"messages": turns, "chat_template_kwargs": {"loud": True, "other": 1}}
        assert of.decode(chat_prompt(of, asked(body))) == "abc!<|im_end|>", name
    with pytest.raises(Refused, match="`chat_template_kwargs` must not contain tokenize") as caught:
        chat_prompt(of, asked({**TALK, "chat_template_kwargs": {"tokenize": False}}))
    assert caught.value.param == "chat_template_kwargs"


def test_an_answer_that_is_begun_is_gone_on_with() -> None:
    of = tokenizer()
    begun = {"messages": [user("a"), said("so it")], "add_generation_prompt": False}
    whole = of.decode(chat_prompt(of, asked(begun)))
    assert whole == template.render(of, begun["messages"], answered=True) and whole.endswith("so it<|im_end|>\n")
    assert of.decode(chat_prompt(of, asked({**begun, "continue_final_message": True}))) == whole.removesuffix(
        "<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [([5, 6], [5, 6]), ([[5, 6]], [5, 6]), ("ab", None), (["ab"], None)],
)
def test_a_prompt_is_a_text_or_ids_or_one_of_them_in_a_list(prompt: Any, ids: list[int] | None) -> None:
    of = tokenizer()
    found = text_prompt(of, Completion.model_validate({"model": "m", "prompt": prompt}))
    assert found == (ids or of("ab")["input_ids"])


@pytest.mark.parametrize("prompt", [["a", "b"], [[5], [6]], [], "", [[]], [5, "a"], [True], [10**6], [-1], 5, {"a": 1}])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(Refused, match="`prompt`") as caught:
        text_prompt(tokenizer(), Completion.model_validate({"model": "m", "prompt": prompt}))
    assert caught.value.param == "prompt"


def test_what_is_needed_is_not_left_out() -> None:
    for body in ({}, {"messages": None}, {"messages": []}, {"messages": ""}):
        with pytest.raises(ValidationError, match="messages"):
            asked(body)


def generation_config(folder: Path, **values: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_the_models_sampling_applies_where_a_request_gives_none(tmp_path: Path) -> None:
    assert model_defaults(tmp_path) == ModelDefaults()
    config = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": None, "eos_token_id": 2}
    defaults = model_defaults(generation_config(tmp_path, **config))
    requests = [asked({**TALK, **body}) for body in ({}, {"temperature": 0}, {"temperature": None, "top_k": 5})]
    sampled = [request.with_defaults(defaults) for request in requests]
    assert [(one.temperature, one.top_k, one.top_p) for one in sampled] == [(0.6, 20, 1.0), (0, 20, 1.0), (0.6, 5, 1.0)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 3),
        ("temperature", "warm"),
        ("temperature", "\ud800"),
        ("top_p", 0),
        ("top_k", 2.5),
        ("top_k", [1]),
        ("repetition_penalty", -1),
        ("max_new_tokens", 0),
        ("min_p", 0.1),
    ],
)
def test_a_default_that_cannot_be_used_is_named_in_the_log(
    name: str, value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = generation_config(tmp_path, **{name: value, **({"top_k": 20} if name != "top_k" else {})})
    defaults = model_defaults(folder)
    assert defaults.max_new_tokens is None and defaults.sampling == ({"top_k": 20} if name != "top_k" else {})
    (message,) = caplog.messages
    assert name in message and "is ignored" in message and str(folder) in message


def test_defaults_are_converted_as_values_of_requests_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    defaults = model_defaults(generation_config(tmp_path, temperature="0.5", top_k=20.0, min_p=0.0, max_new_tokens=4))
    assert defaults == ModelDefaults({"temperature": 0.5, "top_k": 20}, 4)
    assert not caplog.messages


# --- the endpoints, without a model ----------------------------------------------------------------------------------


class NoEngine:
    """In the engine's place: each answer has as many tokens as the request allows, all of them the same."""

    failure, load = "", (0, 0)

    async def generate(self, prompt: list[int], sampling: Any) -> Any:
        for _ in range(sampling.max_tokens):
            yield 5
        yield Ended("length")


@pytest.fixture
def client() -> Iterator[TestClient]:
    service = Service.__new__(Service)
    service.name, service.folder, service.tokenizer = "m", Path(), tokenizer()
    service.max_model_len, service.vocab_size, service.defaults = 100, 10**6, ModelDefaults(max_new_tokens=4)
    service.engine = NoEngine()  # type: ignore[assignment]
    service.metrics = Metrics(service.engine)
    with TestClient(build(service), raise_server_exceptions=False) as client:
        yield client


HALF = "\ud83d"  # of a surrogate pair


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [user(f"a{HALF}")]}, "messages"),
        ("/v1/chat/completions", {"messages": [user([{"type": "text", "text": HALF}])]}, "messages"),
        ("/v1/chat/completions", {**TALK, "tools": [{"function": {"name": HALF}}]}, "tools"),
        ("/v1/chat/completions", {**TALK, "chat_template_kwargs": {HALF: 1}}, "chat_template_kwargs"),
        ("/v1/chat/completions", {**TALK, "model": HALF}, "model"),
        ("/v1/chat/completions", {**TALK, HALF: 1}, "\\ud83d"),
        ("/v1/completions", {"prompt": HALF}, "prompt"),
        ("/v1/completions", {"prompt": "a", "stop": [HALF]}, "stop"),
        ("/tokenize", {"prompt": HALF}, "prompt"),
        ("/tokenize", {"messages": [user(HALF)]}, "messages"),
    ],
)
def test_half_a_surrogate_pair_is_refused_by_name(
    client: TestClient, path: str, body: dict[str, Any], param: str
) -> None:
    answer = client.post(path, content=json.dumps({"model": "m", **body}), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, 400)
    assert error["type"] == "invalid_request_error" and "surrogate" in error["message"]


def test_a_whole_surrogate_pair_is_a_character(client: TestClient) -> None:
    plain = client.post("/tokenize", json={"prompt": "\U0001f600"}).json()
    headers = {"Content-Type": "application/json"}
    escaped = client.post("/tokenize", content=b'{"prompt": "\\ud83d\\ude00"}', headers=headers).json()
    assert escaped == plain and escaped["count"]


@pytest.mark.parametrize("nothing", [None, [], "", {}])
def test_a_prompt_beside_empty_messages_is_tokenized(client: TestClient, nothing: Any) -> None:
    plain = client.post("/tokenize", json={"prompt": "ab"})
    answer = client.post("/tokenize", json={"prompt": "ab", "messages": nothing})
    assert answer.status_code == 200 and answer.json() == plain.json()
    both = client.post("/tokenize", json={**TALK, "prompt": None})
    assert both.status_code == 200 and both.json() == client.post("/tokenize", json=TALK).json()


@pytest.mark.parametrize("nothing", [None, []])
def test_empty_messages_alone_are_an_error_about_messages(client: TestClient, nothing: Any) -> None:
    answer = client.post("/tokenize", json={"messages": nothing})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("body", "tokens"), [({}, 4), ({"max_tokens": 2}, 2), ({"max_tokens": 9}, 4), ({"max_completion_tokens": 3}, 3)]
)
def test_max_new_tokens_of_the_model_limits_every_answer(client: TestClient, body: Any, tokens: int) -> None:
    """As vLLM has it: a limit of the server, for requests that ask for more as well."""
    answer = client.post("/v1/chat/completions", json={"model": "m", **TALK, **body})
    assert answer.json()["usage"]["completion_tokens"] == tokens
    if "max_completion_tokens" not in body:
        plain = client.post("/v1/completions", json={"model": "m", "prompt": "a", **body})
        assert plain.json()["usage"]["completion_tokens"] == tokens
