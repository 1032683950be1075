"""When an answer's tokens came, of streams as servers write them: by hand, and from a server with known times."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from helpers.sse import serving
from qkit.bench.record import Repeat, Request, figures
from qkit.bench.stream import NO_USAGE, Answer, Events, StreamClient
from qkit.bench.tool import CHAT, COMPLETIONS

ROLE = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
EMPTY: dict[str, Any] = {"choices": [{"delta": {}}]}
END = {"choices": [{"delta": {}, "finish_reason": "stop"}]}


def delta(**message: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": message, "finish_reason": None}]}


def usage(tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}}


CALL = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}

# --- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "holds"),
    [
        (ROLE, False),
        (EMPTY, False),
        (END, False),
        (usage(3), False),
        (delta(content=None, tool_calls=[], reasoning_content=""), False),
        (delta(tool_calls=[{"index": 0, "id": "c1", "type": "function", "function": {"arguments": ""}}]), False),
        (delta(content="\n"), True),
        (delta(role="assistant", content="a"), True),
        (delta(reasoning="hm"), True),
        (delta(reasoning_content="hm"), True),
        (delta(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]), True),
        (delta(content=[{"type": "text", "text": ""}]), False),
        (delta(refusal="No."), True),
        (delta(tool_calls=[CALL]), True),
        (delta(function_call={"name": "f"}), True),
        ({"choices": [{"text": "a"}]}, True),
        ({"choices": [{"text": ""}]}, False),
        ({"choices": [{"text": "", "token_ids": [2]}]}, True),
        ({"choices": [{"text": "a", "token_ids": []}]}, False),
        ({"choices": [{"delta": None}]}, False),
        ({"id": "x", "object": "chat.completion.chunk"}, False),
    ],
)
def test_a_chunk_counts_when_it_holds_what_the_model_wrote(event: dict[str, Any], holds: bool) -> None:
    answer = Answer()
    answer.take(event, 1.0)
    assert answer.times == [1.0] * holds


def read(*chunks: tuple[float, dict[str, Any]]) -> Answer:
    answer = Answer()
    for seconds, event in chunks:
        answer.take(event, seconds)
    return answer


def test_the_end_is_the_last_token_and_not_the_word_that_it_has_ended() -> None:
    answer = read((1.0, delta(content="a")), (1.5, delta(content="b")), (4.0, END), (4.0, usage(2)))
    assert answer.chunks() == [1.0, 1.5] and answer.tokens == 2


def test_tokens_without_text_came_before_the_end() -> None:
    """Five tokens are counted and two were seen: three special ones followed, in chunks without text."""
    answer = read((1.0, delta(content="a")), (1.5, delta(content="b")), (2.0, EMPTY), (3.0, END), (3.0, usage(5)))
    assert answer.chunks() == [1.0, 3.0]
    alone = read((1.0, delta(content="abc")), (3.0, END), (3.0, usage(3)))
    assert alone.chunks() == [1.0, 3.0]


def test_ids_tell_of_tokens_without_text() -> None:
    chunks = [(float(i), {"choices": [{"text": "a" * (i == 1), "token_ids": [5]}]}) for i in (1, 2, 3)]
    assert read(*chunks, (9.0, END)).chunks() == [1.0, 2.0, 3.0]
    assert read(*chunks).tokens == 3


def test_usage_may_come_with_every_chunk() -> None:
    counted = [(float(i), {**delta(content="a"), "usage": {"completion_tokens": i}}) for i in (1, 2, 3)]
    assert read(*counted).tokens == 3


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([ROLE, END], "the answer has no tokens"),
        ([ROLE, END, usage(4)], "the server counted 4, none of them with text"),
        ([delta(content="a"), {"error": {"message": "out of memory"}}], "reported an error.*out of memory"),
        ([delta(content="a"), {"object": "error", "message": "out of memory"}], "reported an error.*out of memory"),
        ([delta(content="a"), {"message": "out of memory", "code": 500}], "reported an error.*out of memory"),
        ([delta(content="a"), {"detail": "out of memory"}], "reported an error.*out of memory"),
        ([delta(content="a"), {"choices": [{"delta": {}, "finish_reason": "error"}]}], "reported an error.*'error'"),
        ([delta(content="a"), {"choices": [{"delta": {}, "finish_reason": "abort"}]}], "reported an error.*'abort'"),
    ],
)
def test_what_is_no_answer_is_said(chunks: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(*((1.0, chunk) for chunk in chunks)).chunks()


# --- events -----------------------------------------------------------------------------------------------------------

WRITTEN = [
    'data: {"a": "ü"}\n\ndata: {"b": 2}\n\ndata: [DONE]\n\n',
    'data:{"a": "ü"}\r\n\r\ndata:{"b": 2}\r\n\r\n',
    ': ping\n\nevent: x\nid: 1\ndata: {"a": "ü"}\n\n: ping\n\n:\n\ndata: {"b": 2}\n\n',
    'data: {"a":\ndata: "ü"}\n\ndata: {"b": 2}',
    'data: {"a": "ü"}\ndata: {"b": 2}\ndata: [DONE]\n',
    'data: {"a": "ü"}\r\rdata: {"b": 2}\r\r',
    '\ufeffdata: {"a": "ü"}\n\ndata: {"b": 2}\n\n',
    'data:\n\ndata: {"a": "ü"}\n\nretry: 5\n\ndata: {"b": 2}\n\n',
]


@pytest.mark.parametrize("text", WRITTEN)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_found_however_they_are_cut(text: str, size: int) -> None:
    events, raw = Events(), text.encode()
    result = [e for at in range(0, len(raw), size) for e in events.feed(raw[at : at + size])]
    assert [*result, *events.feed(b"", last=True)] == [{"a": "ü"}, {"b": 2}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('event: error\ndata: {"message": "out of memory", "choices": [1]}\n\n', "reported an error.*out of memory"),
        ("event: error\ndata: out of memory\n\n", "reported an error.*out of memory"),
        ('data: {"a": 1}\n\ndata: [DONE]\n\ndata: {"choices": [{"text": "b"}]}\n\n', "continues after"),
    ],
)
def test_an_event_that_is_no_part_of_an_answer_is_said(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(Events().feed(text.encode()))


def test_a_text_under_two_names_is_one_and_a_state_is_none() -> None:
    call = {"type": "function", "status": "in_progress", "function": {"arguments": "1"}}
    for message in ({"reasoning": "hm", "reasoning_content": "hm"}, {"reasoning_content": "hm", "thinking": "hm"}):
        assert read((1.0, delta(**message))).texts == ["hm"]
    assert read((1.0, delta(tool_calls=[call]))).texts == ["1"]


@pytest.mark.parametrize("text", ["data: {oops\n\n", "data: [1]\n\n", "data: <html>"])
def test_what_is_no_event_is_said(text: str) -> None:
    events = Events()
    with pytest.raises(ValueError, match=r"not (JSON|a JSON object)"):
        assert not [*events.feed(text.encode()), *events.feed(b"", last=True)]


# --- against a server ---------------------------------------------------------------------------------------------------

FIRST, GAP = 0.3, 0.06  # seconds to the first token, and from one to the next
LETTERS = [(FIRST + i * GAP, delta(content=c)) for i, c in enumerate("abcde")]
LAST = LETTERS[-1][0]
SCRIPTS: dict[str, list[tuple[float, Any]]] = {
    "role": [(0.0, ROLE), *LETTERS, (LAST, END), (LAST, usage(5))],
    "empty": [(0.05, EMPTY), *LETTERS, (FIRST + 0.5 * GAP, EMPTY), (LAST + 0.2, END), (LAST + 0.2, usage(5))],
    "pings": [
        (0.0, ROLE),
        *((at / 100, ": keep-alive\n\n") for at in range(1, 50, 2)),
        *LETTERS,
        (LAST, END),
        (LAST, usage(5)),
    ],
    "thinks": [
        (0.0, ROLE),
        *((at, delta(reasoning=e["choices"][0]["delta"]["content"])) for at, e in LETTERS[:3]),
        *LETTERS[3:],
        (LAST, {**END, "usage": usage(5)["usage"]}),
    ],
    "calls": [
        (0.0, ROLE),
        (FIRST, delta(tool_calls=[CALL])),
        *((at, delta(tool_calls=[{"index": 0, "function": {"arguments": "1"}}])) for at, _ in LETTERS[1:]),
        (LAST, END),
        (LAST, usage(5)),
    ],
    "pairs": [
        (0.0, ROLE),
        *((FIRST + i * GAP, delta(content="ab")) for i in range(5)),
        (LAST, END),
        (LAST, usage(9)),
    ],
    "uncounted": [(0.0, ROLE), *LETTERS, (LAST, END), (LAST, "data: [DONE]\n\n")],
    "plain": [(FIRST + i * GAP, {"choices": [{"text": "a"}]}) for i in range(5)]
    + [(LAST, usage(5)), (LAST, "data: [DONE]\n\n")],
    "blank": [(0.0, {"choices": [{"text": ""}]})]
    + [(FIRST + i * GAP, {"choices": [{"text": "a"}]}) for i in range(5)]
    + [(LAST, usage(5)), (LAST, "data: [DONE]\n\n")],
    "buffered": [(FIRST, "".join(f"data: {json.dumps(e)}\n\n" for _, e in LETTERS)), (FIRST, END), (FIRST, usage(5))],
    "cut short": [*LETTERS, (LAST, usage(5))],
    "garbage": [*LETTERS, (LAST, "data: <html>\n\n")],
    "nothing": [(0.0, ROLE), (LAST, END), (LAST, usage(0))],
    "breaks off": [*LETTERS, (LAST, {"error": {"message": "out of memory"}})],
}


@dataclass
class Output:
    """What the load tool keeps of a request, as far as a reader fills it."""

    success: bool = False
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    latency: float = 0.0
    output_tokens: int = 0
    prompt_len: int = 0
    generated_text: str = ""
    error: str = ""
    start_time: float = 0.0


async def ask_all(url: str) -> tuple[dict[str, Output], StreamClient]:
    """Every script once, all at the same time."""
    reader = StreamClient(Output)

    async def one(session: aiohttp.ClientSession, model: str) -> Output:
        place, ask = (COMPLETIONS, reader.completions) if model in ("plain", "blank") else (CHAT, reader.chat)
        asked = SimpleNamespace(model=model, model_name=None, prompt="xyz", output_len=9, prompt_len=3, request_id=None)
        asked.api_url, asked.extra_body, asked.extra_headers = url + place, None, None
        result: Output = await ask(asked, session)
        return result

    async with aiohttp.ClientSession() as session:
        return dict(zip(SCRIPTS, await asyncio.gather(*(one(session, name) for name in SCRIPTS)), strict=True)), reader


@pytest.fixture(scope="module")
def answers() -> tuple[dict[str, Output], StreamClient]:
    with serving() as server:
        server.scripts.update({name: sorted(script, key=lambda step: step[0]) for name, script in SCRIPTS.items()})
        return asyncio.run(ask_all(server.url))


@pytest.mark.parametrize(
    ("model", "tokens", "gap"),
    [
        *((name, 5, GAP) for name in ("role", "empty", "pings", "thinks", "calls", "plain", "blank")),
        ("pairs", 9, GAP / 2),
        ("uncounted", 0, GAP),
    ],
)
def test_the_first_token_is_the_first(
    answers: tuple[dict[str, Output], StreamClient], model: str, tokens: int, gap: float
) -> None:
    result = answers[0][model]
    assert result.success and not result.error and result.output_tokens == tokens
    assert result.ttft == pytest.approx(FIRST, abs=0.05)
    request = Request(
        result.ttft, tuple(result.itl), 3, tokens or 5
    )  # the tool counts the text's tokens where nobody did
    assert request.tpot == pytest.approx(gap, rel=0.2)
    assert result.latency == pytest.approx(LAST, abs=0.05) and result.latency == pytest.approx(request.e2e)


def test_what_the_model_wrote_is_kept(answers: tuple[dict[str, Output], StreamClient]) -> None:
    assert answers[0]["thinks"].generated_text == answers[0]["uncounted"].generated_text == "abcde"
    assert answers[0]["calls"].generated_text == "f1111" and answers[0]["role"].prompt_len == 7


def test_answers_without_a_count_are_counted(answers: tuple[dict[str, Output], StreamClient]) -> None:
    assert answers[1].doubts[NO_USAGE] == 1


def test_an_answer_that_came_at_once_is_said_to(answers: tuple[dict[str, Output], StreamClient]) -> None:
    result = answers[0]["buffered"]
    assert figures([Repeat(1.0, (Request(result.ttft, tuple(result.itl), 3, 5),))])["doubts"] == [
        "1 of 1 answers arrived in one piece: their TTFT equals the end-to-end time, and they have no TPOT"
    ]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("breaks off", r"reported an error: .*out of memory"),
        ("garbage", "not JSON"),
        ("nothing", "the answer has no tokens"),
        ("cut short", "without a finish_reason"),
    ],
)
def test_what_went_wrong_is_said(answers: tuple[dict[str, Output], StreamClient], model: str, message: str) -> None:
    result = answers[0][model]
    assert not result.success and re.search(message, result.error)


# --- doubts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gaps", "message"),
    [
        (
            (1.0, 0.1, 0.1, 0.1),
            "first gap between chunks (1,000.0 ms) differs greatly from all others (100.0 ms) in 2 of 2",
        ),
        ((0.001, 0.1, 0.12, 0.1), "first gap between chunks (1.0 ms)"),
        ((0.1, 0.1, 0.1, 1.0), "last gap between chunks (1,000.0 ms)"),
        ((0.1, 0.12, 0.1, 0.001), None),
        ((0.1, 0.3, 0.05, 0.1), None),
        ((0.29, 0.1, 0.1, 0.1), None),
        ((1.0, 0.1), None),
    ],
)
def test_a_gap_that_is_like_no_other_is_flagged(gaps: tuple[float, ...], message: str | None) -> None:
    requests = (Request(0.001, gaps, 3, 1 + len(gaps)),) * 2
    doubts = figures([Repeat(2.0, requests)])["doubts"]
    assert (len(doubts) == 1 and message in doubts[0]) if message else not doubts


def test_one_odd_answer_of_many_is_no_doubt() -> None:
    usual = Request(0.1, (0.1,) * 4, 3, 5)
    assert not figures([Repeat(2.0, (usual, usual, Request(0.1, (2.0, 0.1, 0.1, 0.1), 3, 5)))])["doubts"]
