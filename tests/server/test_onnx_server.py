"""What the ONNX server makes of requests, before its engine is asked: prompts, refusals, and parameters that change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.chats import FILE, MODEL, REQUESTS, SAME, TEMPLATES, call, said, user
from helpers.data_traps.models import tokenizer_of

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from pydantic import ValidationError

from qkit.chat import template
from qkit.server.onnx_requests import Chat, Completion, Refused, chat_prompt, own_sampling, text_prompt

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
    with pytest.raises(Refused, match="`chat_template_kwargs` cannot hold tokenize") as caught:
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


def test_the_model_s_own_sampling_is_what_a_request_gets_that_does_not_say(tmp_path: Path) -> None:
    assert own_sampling(tmp_path) == {}
    held = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": None, "eos_token_id": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(held))
    own = own_sampling(tmp_path)
    made = [asked({**TALK, **said}) for said in ({}, {"temperature": 0}, {"temperature": None, "top_k": 5})]
    for one in made:
        one.take(own)
    assert [(one.temperature, one.top_k, one.top_p) for one in made] == [(0.6, 20, 1.0), (0, 20, 1.0), (0.6, 5, 1.0)]
