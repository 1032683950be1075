"""A tokenizer with several chat templates: `tool_use` for conversations that offer tools, `default` for all others, everywhere the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.chats import ADD, REQUESTS, call, result, said, user
from helpers.data_traps.models import Tiny, build, tokenizer_of
from qkit.chat import template
from qkit.core.errors import ModelError
from qkit.export._gguf.tokenizer import template_of, templates_of
from qkit.model import tokenizer as model_tokenizer
from qkit.plugins.example import Conversation
from qkit.recipe import schema
from qkit.recipe.schema import Data
from qkit.server import lora
from qkit.tasks._conversation.checks import of_rows
from qkit.tasks._conversation.encode import tokenize

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
# It ends turns with another token, which no conversation without tools shows.
WITH_TOOLS = (
    "<tools>{{ tools | tojson }}</tools>{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}{{ call.function.arguments | tojson }}</call>{% endfor %}"
    "<|eot|>{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
NAMED = {"default": PLAIN, "tool_use": WITH_TOOLS, "rag": "never {{ messages }}"}
MODEL = Tiny(special=("<|im_start|>", "<|eot|>"))
CALLED = said("", tool_calls=[call(0, arguments={"b": 1, "a": None})])
TURNS = (user("a"), CALLED, result("3"), said("three"))


def tokenizer() -> Any:
    made = tokenizer_of(MODEL)
    made.chat_template = dict(NAMED)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with the templates in files of their own."""
    made = build(MODEL, tmp_path / "base")
    tokenizer().save_pretrained(made)
    assert {file.name for file in (made / template.OTHERS).iterdir()} == {"tool_use.jinja", "rag.jinja"}
    return made


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """The same as older folders have it: a list in the tokenizer's settings."""
    made = build(MODEL, tmp_path / "older")
    (made / "chat_template.jinja").unlink()
    file = made / "tokenizer_config.json"
    listed = [{"name": name, "template": text} for name, text in NAMED.items()]
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": listed}))
    return made


def test_rows_with_tools_meet_the_template_for_tools() -> None:
    reader = template.renderer(tokenizer())
    examples = [Conversation(TURNS, tools=(ADD,)), Conversation((TURNS[0], TURNS[3]))]
    rows = [row for result in tokenize(reader, examples, Data(loss="assistant")) for row in result.rows]
    texts = [reader.tokenizer.decode(row.input_ids) for row in rows]
    assert texts[0].startswith("<tools>[{") and '<call>add{"b": 1, "a": null}</call><|eot|>' in texts[0]
    assert texts[1] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nthree<|im_end|>"
    learnt = [reader.tokenizer.decode([i for i in row.labels if i != -100]) for row in rows]
    assert learnt == ['<call>add{"b": 1, "a": null}</call><|eot|>three<|eot|>', "three<|im_end|>"]
    seen = of_rows.facts(reader, len(reader.tokenizer))
    assert [list(of_rows.examine(reader, seen, row, "assistant", closely=True)) for row in rows] == [[], []]


def test_calls_where_no_tools_are_offered_are_still_found_missing() -> None:
    reader = template.renderer(tokenizer())
    [result] = tokenize(reader, [Conversation(TURNS)], Data())
    [row] = result.rows
    found = of_rows.examine(reader, of_rows.facts(reader, len(reader.tokenizer)), row, "completion", closely=True)
    assert "tool_calls" in {name for name, _ in found}


def test_both_templates_ends_of_turns_stop_an_answer() -> None:
    tokens = template.special_tokens(template.renderer(tokenizer()), None, len(tokenizer()))
    assert tokenizer().convert_ids_to_tokens(tokens["stop"]) == ["<|im_end|>", "<|eot|>"]
    assert tokens["pad"] not in tokens["stop"]


def test_the_server_chooses_as_training_does(folder: Path) -> None:
    pytest.importorskip("prometheus_client")
    from qkit.server.onnx_requests import Chat, chat_prompt

    of = model_tokenizer.load_tokenizer(folder, schema.Model(source=str(folder)))
    for body in ({**REQUESTS["one part"], "tools": []}, {**REQUESTS["one part"], "tools": None}, REQUESTS["one part"]):
        assert of.decode(chat_prompt(of, Chat.model_validate({"model": "m", **body}))).startswith("<|im_start|>system")
    asked = Chat.model_validate({"model": "m", "messages": list(TURNS[:3]), "tools": [ADD]})
    assert of.decode(chat_prompt(of, asked)) == template.render(of, TURNS[:3], (ADD,))


def test_a_model_without_a_default_one_is_refused_in_words(tmp_path: Path) -> None:
    made = tokenizer()
    made.chat_template = {"rag": PLAIN, "tool_use": WITH_TOOLS}
    with pytest.raises(ModelError, match=r"rag, tool_use\) is called default"):
        template.use_template_of_recipe(made, None, tmp_path)


@pytest.mark.parametrize("kind", ["folder", "older"])
def test_a_gguf_file_names_them(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    gguf = pytest.importorskip("gguf")
    from qkit.export._gguf.tokenizer import add_tokenizer

    base: Path = request.getfixturevalue(kind)
    (base / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert templates_of(base) == NAMED and template_of(base) == PLAIN
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    add_tokenizer(writer, base, len(tokenizer()))
    written = {key: value.value for part in writer.kv_data for key, value in part.items() if "chat_template" in key}
    assert written["tokenizer.chat_template"] == PLAIN
    assert written["tokenizer.chat_template.tool_use"] == WITH_TOOLS
    assert set(written["tokenizer.chat_templates"]) == {"tool_use", "rag"}


def test_vllm_is_given_an_adapter_s_tokenizer_where_one_template_would_not_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "b"}')
    (folder / "config.json").unlink()
    assert AutoTokenizer.from_pretrained(folder).chat_template == NAMED  # as vLLM loads what --tokenizer names
    monkeypatch.setattr(lora, "check_adapter", lambda *_: {"max_lora_rank": 8})
    assert lora.options(folder, "a")["tokenizer"] == str(folder)
    assert "chat-template" not in lora.options(folder, "a")
