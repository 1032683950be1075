"""What a chat template is given, held against what vLLM gives it: golden/vllm_conversations.json is vLLM's own answer.

QKIT_UPDATE_GOLDEN=1 asks the installed vLLM again; a slow test does so without writing.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.chats import (
    ADD,
    BARE,
    FILE,
    FIND,
    MODEL,
    ONE_CALL,
    REQUESTS,
    SAME,
    TEMPLATES,
    parts,
    result,
    said,
    system,
    user,
)
from helpers.data_traps.models import build, tokenizer_of
from helpers.paths import TESTS
from qkit.chat import conversation, template
from qkit.plugins.example import Conversation, RowError
from qkit.recipe.schema import Data
from qkit.runtimes import vllm
from qkit.tasks._conversation.encode import tokenize
from qkit.tasks._conversation.rows import EncodedRow
from qkit.tasks._conversation.turns import Notes, tools_of, turns_of

ORACLE = TESTS / "helpers" / "vllm_oracle.py"
NOTES = Notes(Data())


THOUGHTFUL = {request for request in REQUESTS if "thinking" in request}


def ask_vllm(folder: Path, templates: dict[str, str]) -> dict[str, Any]:
    """What the installed vLLM makes of the requests under these templates."""
    asked = json.dumps({"model": str(build(MODEL, folder)), "templates": templates, "requests": REQUESTS})
    done = subprocess.run([sys.executable, ORACLE], input=asked, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if os.environ.get("QKIT_UPDATE_GOLDEN"):
        told = ask_vllm(tmp_path_factory.mktemp("oracle"), TEMPLATES)
        FILE.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def rendered(tokenizer: Any, body: dict[str, Any]) -> str | None:
    """The prompt that training makes of a record with these turns and tools; None where it refuses it."""
    try:
        turns = [turn for turn, _ in turns_of(body["messages"], "messages", NOTES)]
        return template.render(tokenizer, turns, tuple(tools_of(body.get("tools"), NOTES)))
    except (template.TemplateRefusal, RowError):
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_gives_a_template_what_vllm_gives_it(name: str, golden: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(MODEL)
    tokenizer.chat_template = TEMPLATES[name]
    told = golden[name]
    assert conversation.goes_through_parts(TEMPLATES[name]) == (told["form"] == "openai")
    prompts = {request: rendered(tokenizer, body) for request, body in REQUESTS.items()}
    assert prompts == told["prompts"] and sum(prompt is not None for prompt in prompts.values()) >= 8


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_way_to_say_nothing_says_nothing(name: str) -> None:
    tokenizer = tokenizer_of(MODEL)
    tokenizer.chat_template = TEMPLATES[name]
    for way, (body, same) in SAME.items():
        assert rendered(tokenizer, body) == rendered(tokenizer, REQUESTS[same]), way


def test_the_golden_file_tells_the_forms_apart(golden: dict[str, Any]) -> None:
    """The parts that it is about are in it: one text of two lines, two parts, and a call in the order of the API."""
    assert "Be\nbrief." in golden["chatml"]["prompts"]["parts"]
    assert "[Be][brief.]" in golden["parts"]["prompts"]["parts"] and "[][" not in golden["parts"]["prompts"]["one part"]
    assert '"function": {"arguments": {"b": 1, "a": null}, "name": "add"}' in golden["whole"]["prompts"]["two calls"]
    assert '"name": "bare", "description": null, "parameters": null' in golden["whole"]["prompts"]["tools"]


@pytest.mark.slow
@pytest.mark.skipif(not vllm.installed(), reason="vLLM is not installed")
def test_the_installed_vllm_still_does_so(golden: dict[str, Any], tmp_path: Path) -> None:
    """And of the templates that TRL ships, which are those of models that people train, it takes the form that we take."""
    import trl

    shipped = {file.name: file.read_text(encoding="utf-8") for file in Path(trl.__file__).parent.glob("chat_templates/*.jinja")}  # fmt: skip
    told = ask_vllm(tmp_path, TEMPLATES | shipped)
    assert {name: told[name] for name in TEMPLATES} == golden
    forms = {name: conversation.goes_through_parts(text) for name, text in shipped.items()}
    assert forms == {name: told[name]["form"] == "openai" for name in shipped} and 0 < sum(forms.values()) < len(forms)
    for name, text in shipped.items():
        tokenizer = tokenizer_of(MODEL)
        tokenizer.chat_template = text
        prompts = {request: rendered(tokenizer, body) for request, body in REQUESTS.items()}
        written = set(REQUESTS) - (
            THOUGHTFUL if conversation.HARMONY in text else set()
        )  # vLLM has no template for these
        assert {request: prompts[request] for request in written} == {r: told[name]["prompts"][r] for r in written}, (
            name
        )


def test_what_a_server_leaves_out_of_a_function_is_noted() -> None:
    notes = Notes(Data())
    assert list(tools_of([FIND, BARE, {"name": "f", "required": ["a"]}], notes))
    assert list(notes.unread) == ["tools.x", "tools.function.returns", "tools.required"]


# --- what is learnt ---------------------------------------------------------------------------------------------------


def rows_of(name: str, messages: list[dict[str, Any]], loss: str = "assistant") -> tuple[Any, list[EncodedRow]]:
    tokenizer = tokenizer_of(MODEL)
    tokenizer.chat_template = TEMPLATES[name]
    turns = tuple(turn for turn, _ in turns_of(messages, "messages", NOTES))
    [encoded] = tokenize(
        template.renderer(tokenizer), [Conversation(turns, tools=tuple(tools_of([ADD], NOTES)))], Data(loss=loss)
    )
    assert encoded.error is None
    return tokenizer, list(encoded.rows)


def test_a_call_is_learnt_with_its_name_first_and_asked_about_as_servers_write_it() -> None:
    """A turn that calls is a row of its own where the template shows that a server has handed the call on."""
    tokenizer, made = rows_of("qwen3", [user("a"), ONE_CALL, result("3"), user("b"), said("c")])
    assert len(made) == 2
    learnt = [tokenizer.decode([label for label in row.labels if label != -100]) for row in made]
    assert "c<|im_end|>" in learnt[0] and '{"name": "add", "arguments": {"b": 1, "a": null}}' in learnt[1]
    assert '{"arguments": {"b": 1, "a": null}, "name": "add"}' in tokenizer.decode(made[0].input_ids[: made[0].start])


@pytest.mark.parametrize("name", ["chatml", "parts", "qwen3"])
def test_the_turns_that_are_kept_make_the_prompt_again(name: str) -> None:
    """Through JSON, as they are kept in test.parquet and sent by the serve contract."""
    messages = [system(parts("Be", "brief.")), user(parts("a", "b")), ONE_CALL, result(parts("3", "4")), said("c")]
    tokenizer, made = rows_of(name, messages, "completion")
    [row] = made
    kept = json.loads(json.dumps([row.messages, row.tools]))
    again = template.render(tokenizer, *kept)
    assert tokenizer(again, add_special_tokens=False)["input_ids"] == list(row.input_ids[: row.start])


@pytest.mark.parametrize(("mark", "kept"), [("", ""), (conversation.HARMONY, "so")])
def test_thinking_by_a_name_that_no_server_gives_is_learnt_and_not_sent(mark: str, kept: str) -> None:
    tokenizer = tokenizer_of(MODEL)
    tokenizer.chat_template = mark + "{% for m in messages %}[{{ m.thinking }}]{{ m.content }}{% endfor %}"
    turns = [user("a"), said("b", reasoning_content="so")]
    assert template.render(tokenizer, turns, answered=True) == f"{mark}[]a[so]b"
    assert template.render(tokenizer, [*turns, user("c")]) == f"{mark}[]a[{kept}]b[]c"


def test_a_text_in_parts_goes_to_another_process_whole() -> None:
    text = pickle.loads(pickle.dumps(conversation.Parted(("a", "", "b"))))
    assert text == "a\nb" and text.parts == ("a", "", "b")
