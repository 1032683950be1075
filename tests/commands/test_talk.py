"""`qkit chat`: what is typed, what is answered, and what is kept of it. Models are scripts here; test_talk_models.py has real ones."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from helpers.command import qkit_here
from helpers.tiny import build_tokenizer, tiny_settings
from helpers.tiny_labelled import settings
from qkit.cli import talking
from qkit.commands.talk import sampling, targets
from qkit.commands.talk.dialogue import Dialogue
from qkit.commands.talk.job import Job
from qkit.commands.talk.reply import STOPPED, Reply, calls_in
from qkit.commands.talk.speakers import Local, Speaker, parameters, prompt_ids
from qkit.commands.talk.typed import Command, Typing, read
from qkit.core.errors import MissingArtifact, ModelError, ServerError, UserError
from qkit.plugins.task import open_task
from qkit.recipe.load import load
from qkit.recipe.schema import Data
from qkit.run.directory import Run
from qkit.runtimes._continued import Continuation
from qkit.server.onnx_engine import Sampling
from qkit.server.onnx_requests import ModelDefaults

TOKENIZER = build_tokenizer()
END = TOKENIZER.eos_token_id


class Scripted(Continuation):
    """A model that says `says`, after every prompt, and then ends; it counts what it reads."""

    def __init__(self, says: str, ends: bool = True) -> None:
        super().__init__()
        self.script = [*TOKENIZER(says, add_special_tokens=False)["input_ids"], *([END] if ends else [])]
        self.prompts: list[list[int]] = []

    def keep(self, count: int) -> int:
        return count

    def read(self, new: Sequence[int]) -> Any:
        ids = [*self.ids, *new]
        if not self.prompts or ids[: len(self.prompts[-1])] != self.prompts[-1] or len(new) > 1:
            self.prompts.append(ids)
        place = len(ids) - len(self.prompts[-1])
        logits = np.full(len(TOKENIZER), -9.0, np.float32)
        logits[self.script[place % len(self.script)]] = 9.0
        return logits


def local(model: Continuation, limit: int = 512, defaults: ModelDefaults | None = None, **given: Any) -> Local:
    return Local(TOKENIZER, model, frozenset({END}), limit, given, defaults or ModelDefaults())


class Echo(Speaker):
    """Says the question, in pieces; fails or is interrupted where it is told to."""

    def __init__(self) -> None:
        self.heard: list[list[Mapping[str, Any]]] = []
        self.attempts: list[int] = []

    def answer(self, messages: Sequence[Mapping[str, Any]], reply: Reply, attempt: int) -> Iterator[str]:
        self.heard.append([*messages])
        self.attempts.append(attempt)
        question = str(messages[-1]["content"])
        if question == "fail":
            raise UserError("it is too hard")
        for word in question.split():
            if word == "ctrl-c":
                raise KeyboardInterrupt
            reply.text += word
            yield word
        reply.reason, reply.tokens, reply.prompt_tokens = "stop", len(reply.text), len(messages)


def listened(answers: Any) -> list[str]:
    return ["".join(answering.pieces) for answering in answers]


# --- what is typed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (["a", "", "b "], ["a", "", "b "]),
        (["a\\", "b\\", "c", "d"], ["a\nb\nc", "d"]),
        (['"""a', "", "b\\", '"""', "c"], ["a\n\nb\\", "c"]),
        (['"""', "a", 'b"""', "c"], ["a\nb", "c"]),
        (['"""a"""'], ["a"]),
        (["a\\"], []),
        (['"""', "a"], []),
    ],
)
def test_lines_become_messages(lines: list[str], messages: list[str]) -> None:
    typing = Typing()
    assert [message for line in lines if (message := typing.take(line)) is not None] == messages
    assert typing.is_open is (not messages)
    assert typing.end() == ("a" if not messages else "") and not typing.is_open


def test_commands_and_questions_that_look_like_them() -> None:
    assert read("/system Be brief. ") == Command("/system", "Be brief.") and read("/reset") == Command("/reset")
    assert read("//etc/passwd") == "/etc/passwd" and read("a /quit") == "a /quit"
    with pytest.raises(
        UserError, match=r"^/rest: no such command, did you mean '/reset'\?; /help lists them, // begins"
    ):
        read("/rest")
    with pytest.raises(UserError, match=r"^/save FILE: name a file"):
        read("/save ")


# --- what is said -----------------------------------------------------------------------------------------------------


def test_each_speaker_continues_what_it_said_itself(tmp_path: Path) -> None:
    speakers = {"base": Echo(), "adapter": Echo()}
    dialogue = Dialogue(speakers, "Be brief.")
    assert listened(dialogue.next("a b")) == ["ab", "ab"] and listened(dialogue.next("c")) == ["c", "c"]
    turns = [("system", "Be brief."), ("user", "a b"), ("assistant", "ab"), ("user", "c")]
    for speaker in speakers.values():
        assert [(turn["role"], turn["content"]) for turn in speaker.heard[-1]] == turns
    assert listened(dialogue.again()) == ["c", "c"] and listened(dialogue.again()) == ["c", "c"]
    assert [len(heard) for heard in speakers["base"].heard] == [2, 4, 4, 4]
    assert speakers["base"].attempts == [0, 0, 1, 2]
    dialogue.reset("")
    listened(dialogue.next("d"))
    assert [turn["content"] for turn in speakers["base"].heard[-1]] == ["d"]
    with pytest.raises(UserError, match="/regen: there is no answer yet"):
        listened(Dialogue(speakers).again())


def test_what_was_not_answered_does_not_count() -> None:
    dialogue = Dialogue({"m": Echo()})
    listened(dialogue.next("a"))
    with pytest.raises(UserError, match="too hard"):
        listened(dialogue.next("fail"))
    assert [turn["content"] for turn in dialogue.messages("m")] == ["a", "a"]
    dialogue.question = "fail"
    with pytest.raises(UserError, match="too hard"):
        listened(dialogue.again())
    assert [turn["content"] for turn in dialogue.messages("m")] == ["a", "a"] and dialogue.attempts == 0


def test_a_saved_conversation_is_a_row_that_qkit_trains_on(tmp_path: Path) -> None:
    dialogue, file = Dialogue({"base": Echo(), "adapter": Echo()}, "Be brief."), tmp_path / "talk.jsonl"
    with pytest.raises(UserError, match="/save: there is no answer yet"):
        dialogue.save(file)
    listened(dialogue.next("a \u00e4"))
    assert [dialogue.save(file), dialogue.save(file)] == [1, 2]
    file.write_text(file.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    assert dialogue.save(file) == 3
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    example = open_task("chat").example(rows[0], None, "auto", Data())
    assert [(turn["role"], turn["content"]) for turn in example.messages] == [
        ("system", "Be brief."), ("user", "a \u00e4"), ("assistant", "a\u00e4"),
    ]  # fmt: skip
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    for name in ("other.jsonl", "talk.txt"):
        with pytest.raises(UserError, match=f"/save .*{name}"):
            dialogue.save(tmp_path / name)
    assert (tmp_path / "other.jsonl").read_text() == '{"text": "a"}\n'


@pytest.mark.parametrize(("reason", "trained"), [("stopped", False), ("length", False), ("stop", None)])
def test_an_answer_that_was_cut_off_is_saved_as_not_trained(reason: str, trained: bool | None, tmp_path: Path) -> None:
    dialogue = Dialogue({"base": Echo()})
    for answering in dialogue.next("a b c"):
        list(answering.pieces)
        answering.reply.reason = reason
    dialogue.save(tmp_path / "talk.jsonl")
    (row,) = map(json.loads, (tmp_path / "talk.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["messages"][-1].get("train") is trained
    assert "train" not in dialogue.messages("base")[-1]  # no server knows the key


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', ["f"]),
        ('<think>{"name": "g", "arguments": {}}</think>\n{"name": "f", "parameters": {}}', ["f"]),
        (
            'So:\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><tool_call>{"name": "g", "arguments": {}}',
            ["f", "g"],
        ),
        ('[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]', ["f", "g"]),
        ('[{"name": "f", "arguments": {}}, 1]', []),
        ('{"name": "f"}', []),
        ("f(1)", []),
        ("<tool_call>broken", []),
        ("[" * 100_000, []),
    ],
)
def test_calls_that_an_answer_is(text: str, names: list[str]) -> None:
    assert [call["name"] for call in calls_in(text)] == names


# --- a model in this process ------------------------------------------------------------------------------------------


def test_an_answer_ends_at_its_stop_token_and_is_streamed() -> None:
    model, reply = Scripted("h\u00e9!"), Reply()
    pieces = list(local(model).answer([{"role": "user", "content": "hi"}], reply, 0))
    assert pieces == ["h", "\u00e9", "!"] and reply.text == "h\u00e9!" and reply.reason == "stop"
    prompt = prompt_ids(TOKENIZER, [{"role": "user", "content": "hi"}])
    assert model.prompts == [prompt] and (reply.prompt_tokens, reply.computed_tokens) == (len(prompt), len(prompt))
    assert reply.tokens == 5 and reply.message() == {"role": "assistant", "content": "h\u00e9!"}


def test_a_second_turn_computes_only_what_is_new() -> None:
    model = Scripted("abc")
    dialogue = Dialogue({"m": local(model)})
    listened(dialogue.next("a question that is long enough to be seen"))
    first = model.computed
    (answering,) = list(dialogue.next("two"))
    "".join(answering.pieces)
    template_between = len(
        TOKENIZER("<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    )
    assert answering.reply.computed_tokens == template_between
    assert answering.reply.prompt_tokens == first + template_between
    assert model.computed == first + template_between + len("abc")


def test_a_beginning_that_changes_is_computed_from_there() -> None:
    model = Scripted("a")
    model.logits_after([5, 6, 7, 8])
    model.logits_after([5, 6, 9])
    assert model.computed == 5 and model.ids == [5, 6, 9]
    model.logits_after([5, 6, 9])
    assert model.computed == 6
    model.logits_after([5, 6])
    assert model.computed == 7 and model.ids == [5, 6]


def test_an_answer_has_the_length_that_a_server_would_give_it() -> None:
    asked = [{"role": "user", "content": "hi"}]
    size = len(prompt_ids(TOKENIZER, asked))
    for speaker, tokens in (
        (local(Scripted("a", ends=False), max_tokens=7), 7),
        (local(Scripted("a", ends=False), limit=size + 4), 4),
        (local(Scripted("a", ends=False), limit=size + 4, max_tokens=9), 4),
        (local(Scripted("a", ends=False), defaults=ModelDefaults({}, 3)), 3),
    ):
        reply = Reply()
        list(speaker.answer(asked, reply, 0))
        assert (reply.tokens, reply.reason) == (tokens, "length")
    with pytest.raises(UserError, match=rf"has {size} tokens, and the model reads {size} at most; /reset"):
        list(local(Scripted("a"), limit=size).answer(asked, Reply(), 0))


class Even(Scripted):
    """All letters are equally likely."""

    def read(self, new: Sequence[int]) -> Any:
        return np.where(np.arange(len(TOKENIZER)) > 40, 0.0, -99.0).astype(np.float32)


def test_a_seed_repeats_answers_and_another_attempt_is_another_answer() -> None:
    def said(attempt: int, **given: Any) -> str:
        reply = Reply()
        list(local(Even("a"), max_tokens=12, **given).answer([{"role": "user", "content": "hi"}], reply, attempt))
        return reply.text

    assert said(0, seed=1) == said(0, seed=1) != said(1, seed=1)
    assert said(0, seed=2) != said(0, seed=1) and said(0) != said(0)
    assert said(0, temperature=0) == said(1, temperature=0)


def test_sampling_is_that_of_transformers() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.normal(size=50) * 3
        k, p = int(rng.integers(1, 60)), float(rng.uniform(0.05, 0.99))
        warped = torch.tensor(scores)[None]
        warped = TopKLogitsWarper(k)(None, warped)
        warped = TopPLogitsWarper(p)(None, warped).softmax(-1)[0].numpy()
        np.testing.assert_allclose(sampling.probabilities(scores, k, p), warped, atol=1e-12)
        seen = rng.integers(0, 50, 30)
        penalized = RepetitionPenaltyLogitsProcessor(5.0)(torch.tensor(seen)[None], torch.tensor(scores)[None])
        greedy = Sampling(1, temperature=0, repetition_penalty=5.0)
        assert sampling.next_token(scores, greedy, seen.tolist(), None) == int(penalized.argmax())


def test_parameters_that_no_server_takes_are_refused() -> None:
    with pytest.raises(UserError, match=r"^--top-p 0: Input should be greater than 0"):
        parameters({"top_p": 0})


# --- the screen -------------------------------------------------------------------------------------------------------


def screen(dialogue: Dialogue, is_terminal: bool = False, **options: Any) -> tuple[talking.Screen, io.StringIO]:
    notes = io.StringIO()
    return talking.Screen(dialogue, Console(file=notes, width=200), is_terminal, **options), notes


def test_each_line_of_a_pipe_is_a_question(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b\n\n/regen\nc\\\nd\n/quit\ne\n"))
    shown, notes = screen(Dialogue({"m": Echo()}))
    shown.run()
    assert capsys.readouterr().out == "ab\nab\ncd\n"
    assert notes.getvalue().splitlines() == [
        "2 tokens; 1 prompt tokens",
        "2 tokens; 1 prompt tokens",
        "2 tokens; 3 prompt tokens",
    ]


def test_answers_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b\nc"))
    shown, notes = screen(Dialogue({"base": Echo(), "adapter": Echo()}), as_json=True)
    shown.run()
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["question"], one["model"], one["answer"]) for one in said] == [
        ("a b", "base", "ab"), ("a b", "adapter", "ab"), ("c", "base", "c"), ("c", "adapter", "c"),
    ]  # fmt: skip
    assert said[0]["finish_reason"] == "stop" and said[0]["completion_tokens"] == 2 and not notes.getvalue()


def test_two_speakers_answer_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))
    shown, notes = screen(Dialogue({"base": Echo(), "adapter": Echo()}), quiet=True)
    shown.run()
    assert capsys.readouterr().out == "base:\na\nadapter:\na\n" and not notes.getvalue()


@pytest.mark.parametrize(("line", "message"), [("fail", "too hard"), ("/no", "no such command")])
def test_an_error_ends_a_pipe_and_not_a_terminal(
    line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{line}\na\n"))
    with pytest.raises(UserError, match=message):
        screen(Dialogue({"m": Echo()}))[0].run()
    assert not capsys.readouterr().out
    typed(monkeypatch, line, "a")
    shown, notes = screen(Dialogue({"m": Echo()}), is_terminal=True)
    shown.run()
    assert capsys.readouterr().out == "a\n" and message in notes.getvalue()


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | BaseException) -> list[str]:
    """What somebody types at a terminal, and what they are prompted with."""
    prompts, left = [], [*lines, EOFError()]

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        line = left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    return prompts


def test_ctrl_c_stops_an_answer_and_twice_leaves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = KeyboardInterrupt()
    prompts = typed(monkeypatch, "a ctrl-c b", "c\\", stop, "d", "e ctrl-c", stop, "f")
    speaker = Echo()
    shown, notes = screen(Dialogue({"m": speaker}), is_terminal=True)
    shown.run()
    assert capsys.readouterr().out == "a\nd\ne\n" and prompts == ["> ", "> ", "... ", "> ", "> ", "> "]
    assert notes.getvalue().count(talking.LEAVE) == 1 and notes.getvalue().count(STOPPED) == 2
    assert [turn["content"] for turn in shown.dialogue.messages("m")] == ["a ctrl-c b", "a", "d", "d", "e ctrl-c", "e"]


def test_an_answer_that_was_stopped_before_it_began_does_not_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "a", "ctrl-c", "/help", "/system So.", "b")
    shown, notes = screen(Dialogue({"base": Echo(), "adapter": Echo()}), is_terminal=True)
    shown.run()
    assert capsys.readouterr().out == "base:\na\nadapter:\na\nbase:\n\nbase:\nb\nadapter:\nb\n"
    assert [turn["content"] for turn in shown.dialogue.messages("base")] == ["So.", "b", "b"]
    assert "/save FILE" in notes.getvalue()


def test_a_terminal_gets_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "a\x1b[2J\a\u00e4")
    screen(Dialogue({"m": Echo()}), is_terminal=True)[0].run()
    assert capsys.readouterr().out == "a\u241b[2J\u2407\u00e4\n"


# --- a server ---------------------------------------------------------------------------------------------------------


def chunk(reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def call(index: int, arguments: str, **more: Any) -> dict[str, Any]:
    name = {"name": more.pop("name")} if "name" in more else {}
    return chunk(tool_calls=[{"index": index, "function": {**name, "arguments": arguments}, **more}])


@contextlib.contextmanager
def answering(events: Sequence[Any], **entry: Any) -> Iterator[tuple[str, list[Any]]]:
    """A server that streams these events, and what it was sent. An integer is the status of a refusal; an Event is waited for."""
    sent: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = [{"id": "tuned", **entry}, {"id": "plain"}]
            self.reply(200, json.dumps({"data": models}).encode())

        def do_POST(self) -> None:
            sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            sent[-1]["key"] = self.headers.get("Authorization")
            if isinstance(events[0], int):
                self.reply(events[0], b'{"error": "no"}')
                return
            self.send_response(200)
            self.end_headers()
            for one in events:
                if isinstance(one, threading.Event):
                    one.wait(20)
                else:
                    self.wfile.write((one if isinstance(one, str) else f"data: {json.dumps(one)}\n\n").encode())

        def reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", sent
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 6}}


def test_a_server_gets_what_was_given_and_nothing_else() -> None:
    events = [
        chunk(content="a"),
        chunk(content="b"),
        chunk("stop"),
        {"choices": [], "usage": USAGE},
        "data: [DONE]\n\n",
    ]
    with answering(events) as (url, sent):
        talk = targets.opened(Job(url, key="k", system="So.", sampling={"top_p": 0.5, "seed": 3}))
        dialogue = Dialogue(talk.speakers, talk.system)
        assert listened(dialogue.next("hi")) == ["ab"]
        (again,) = list(dialogue.again())
        assert list(again.pieces) == ["a", "b"]
        talk.close()
    reply = again.reply
    assert (reply.reason, reply.tokens, reply.prompt_tokens, reply.computed_tokens) == ("stop", 4, 9, 3)
    messages = [{"role": "system", "content": "So."}, {"role": "user", "content": "hi"}]
    known = {
        "model": "tuned",
        "stream": True,
        "stream_options": {"include_usage": True},
        "key": "Bearer k",
        "top_p": 0.5,
    }
    assert sent == [{**known, "messages": messages, "seed": 3}, {**known, "messages": messages, "seed": 4}]


def test_thinking_and_calls_of_a_server_are_shown_as_such(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [
        chunk(reasoning_content="Let"), chunk(reasoning_content=" me."), chunk(content="So"), chunk(content="."),
        call(0, '{"a"', name="f", id="x"), call(0, ": 1}"), call(1, "{}", name="g"), chunk("tool_calls"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    with answering(events) as (url, _):
        talk = targets.opened(Job(url))
        shown, _ = screen(Dialogue(talk.speakers))
        shown.run()
        talk.close()
    assert capsys.readouterr().out == '<think>\nLet me.\n</think>\n\nSo.\n[tool call] f {"a": 1}\n[tool call] g {}\n'
    message = shown.dialogue.messages("tuned")[-1]
    assert message["content"] == "So." and message["reasoning_content"] == "Let me."
    assert message["tool_calls"][0] == {
        "id": "x",
        "type": "function",
        "function": {"name": "f", "arguments": '{"a": 1}'},
    }


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([400], "answered 400 to /v1/chat/completions"),
        ([chunk(content="a")], "broke off: it ended without a finish_reason"),
        ([chunk(content="a"), {"error": {"message": "full"}}], "broke off: .*full"),
        (["data: no\n\n"], "broke off: the stream has an event that is not JSON"),
    ],
)
def test_a_server_that_fails_is_one_message(events: list[Any], message: str) -> None:
    with answering(events) as (url, _):
        talk = targets.opened(Job(url))
        with pytest.raises(ServerError, match=message) as caught:
            listened(Dialogue(talk.speakers).next("hi"))
        talk.close()
    assert caught.value.url == url.removesuffix("/v1")


@pytest.mark.parametrize("beside", ["base", "plain"])
def test_beside_an_adapter_of_a_server_its_base_answers(beside: str) -> None:
    with answering([chunk("stop", content="a")], parent="plain") as (url, sent):
        talk = targets.opened(Job(url, beside=beside))
        listened(Dialogue(talk.speakers).next("hi"))
        talk.close()
        assert [one["model"] for one in sent] == ["plain", "tuned"]
        with pytest.raises(UserError, match=r"--beside other: beside tuned, .* serves plain"):
            targets.opened(Job(url, beside="other"))


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_a_real_terminal() -> None:
    """Ctrl-C ends an answer that goes on for ever; the conversation goes on, and Ctrl-D leaves."""
    import pty

    ended = threading.Event()
    main, side = pty.openpty()
    with answering([chunk(content="so it begins"), ended, chunk("stop")]) as (url, sent):
        argv = [sys.executable, "-m", "qkit", "chat", url]
        with subprocess.Popen(argv, stdin=side, stdout=side, stderr=side, start_new_session=True) as process:
            os.close(side)
            try:
                wait_for(main, "> ")
                os.write(main, b"hi\n")
                wait_for(main, "so it begins")
                process.send_signal(signal.SIGINT)
                wait_for(main, "stopped", "> ")
                ended.set()
                os.write(main, b"and now\n")
                wait_for(main, "first after", "> ")
                os.write(main, b"\x04")  # of which only somebody who is reading takes note
                assert process.wait(20) == 0
            finally:
                ended.set()
                process.kill()
    os.close(main)
    assert [turn["content"] for turn in sent[1]["messages"]] == ["hi", "so it begins", "and now"]


def wait_for(terminal: int, *texts: str) -> None:
    """Read a terminal until it has shown these texts, one after the other."""
    seen, deadline = "", time.monotonic() + 30
    for text in texts:
        while text not in seen and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.2)[0]:
                seen += os.read(terminal, 4096).decode(errors="replace")
        assert text in seen, seen
        seen = seen.partition(text)[2]


# --- targets that do not talk -----------------------------------------------------------------------------------------


def test_a_server_of_labels_is_for_predict() -> None:
    with (
        answering([], task="classify") as (url, _),
        pytest.raises(UserError, match="gives labels, not text: `qkit predict"),
    ):
        targets.opened(Job(url))


def new_run(folder: Path, recipe: dict[str, Any]) -> Run:
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    run = Run.create(folder / "run", load(folder / "recipe.yaml"))
    run.save_recipe()
    return run


def test_a_run_of_labels_is_for_predict(tmp_path: Path) -> None:
    run = new_run(tmp_path, settings(tmp_path / "model", tmp_path / "rows.jsonl"))
    done = qkit_here("chat", run.root)
    assert (
        done.returncode == 2 and f"task=classify gives labels, not text: `qkit predict {run.root} FILE" in done.stderr
    )


def test_the_artifact_that_answers_is_the_best_that_is_there(tmp_path: Path) -> None:
    formats = {"export": {"formats": ["vllm", "onnx-fp32", "onnx-int4"]}}
    run = new_run(tmp_path, {**tiny_settings(tmp_path / "m", tmp_path / "r.jsonl"), **formats})
    with pytest.raises(MissingArtifact, match="nothing is trained yet: `qkit run "):
        targets.chosen_artifact(run, None)
    seen = []
    for place in ("train/adapter", "merge", "export/vllm", "export/onnx-fp32", "export/onnx-int4", "verify"):
        (run.root / place).mkdir(parents=True)
        (run.root / place / "config.json").write_text("{}")
        if place == "verify":
            parity = {"onnx-fp32": {"status": "failed"}, "onnx-int4": {"status": "passed"}}
            (run.root / place / "parity.json").write_text(json.dumps({"parity": parity}))
        artifact, why = targets.chosen_artifact(run, None)
        seen.append((artifact.name, artifact.runtime, why))
    assert seen[0] == ("adapter", "transformers", "the best here, not verified")
    assert [name for name, *_ in seen[1:]] == ["merged", "merged", "onnx-fp32", "onnx-fp32", "onnx-int4"]
    assert seen[-1] == ("onnx-int4", "onnxruntime", "the best here, passed")
    assert targets.chosen_artifact(run, "onnx-fp32")[1] == "named, failed"
    with pytest.raises(MissingArtifact, match="has no artifact x; it has vllm, onnx-fp32, onnx-int4, merged, adapter"):
        targets.chosen_artifact(run, "x")
    with pytest.raises(UserError, match=r"vllm of .* is for vLLM: start `qkit serve .* --artifact vllm`"):
        targets.opened(Job(str(run.root), artifact="vllm"))
    with pytest.raises(UserError, match="--beside plain: beside a run only `base` answers"):
        targets.opened(Job(str(run.root), beside="plain"))
    with pytest.raises(UserError, match="--artifact merged: no effect with --beside base"):
        targets.opened(Job(str(run.root), beside="base", artifact="merged"))


def test_folders_that_do_not_talk(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(MissingArtifact, match="no such run or folder"):
        targets.opened(Job(str(folder)))
    folder.mkdir()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        targets.opened(Job(str(folder)))
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(UserError, match="gives labels, not text: `qkit predict"):
        targets.opened(Job(str(folder)))
    for option in ("artifact", "beside"):
        with pytest.raises(UserError, match=f"--{option} base: no effect with .*, which is not a run"):
            targets.opened(Job(str(folder), **{option: "base"}))
    bare = build_tokenizer()
    bare.chat_template = None
    bare.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    with pytest.raises(
        ModelError, match=r"this model has no chat template: use its instruct version, .*`qkit predict`"
    ):
        targets.opened(Job(str(folder)))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="an adapter without its base; give its run"):
        targets.opened(Job(str(folder)))
