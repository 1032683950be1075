"""The load tool against a server that keeps its own log: the same requests, on two clocks and by three ways of counting."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest

from helpers.sse import FIRST, GAP, TEXT, Fake, Sent, serving
from qkit.bench.load import DirectLoad, HeldOutPrompts, Load, Prompt, RandomPrompts
from qkit.bench.record import Repeat, Request, figures
from qkit.bench.tool import CHAT, COMPLETIONS, LoadTool, parse
from qkit.core.errors import ServerError
from qkit.plugins.runtime import Timing

pytestmark = pytest.mark.slow

TOKENS = 12
LOAD = Load(requests=8, output_tokens=TOKENS, concurrency=4)
PROMPTS = tuple(Prompt("x" * length, length) for length in range(5, 13))  # a token is a byte for the tiny tokenizer


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def tool(fake: Fake, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadTool]:
    log = tmp_path_factory.mktemp("tool") / "load.log"
    with LoadTool(fake.url, "steady", tiny_model, HeldOutPrompts(PROMPTS), 0, log) as tool:
        yield tool


def measured(tool: LoadTool, fake: Fake, model: str, load: Load = LOAD) -> tuple[Repeat, dict[str, Any], list[Sent]]:
    """A load sent to one of the server's models: as a repeat, as the tool tells it itself, and as the server saw it."""
    tool.target["model"] = model
    fake.log.pop(model, None)
    repeat = tool.measure(load, 1)
    return repeat, json.loads((Path(tool._folder.name) / "result.json").read_text()), fake.log[model]


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steady(tool: LoadTool, fake: Fake) -> tuple[Repeat, dict[str, Any], list[Sent]]:
    return measured(tool, fake, "steady")


def test_our_figures_are_the_tools_own(steady: tuple[Repeat, dict[str, Any], list[Sent]]) -> None:
    repeat, reported, _ = steady
    ours = figures([repeat])
    for name, its in (("ttft_seconds", "ttft"), ("tpot_seconds", "tpot"), ("itl_seconds", "itl")):
        assert ours[name]["mean"] * 1000 == pytest.approx(reported[f"mean_{its}_ms"], rel=1e-9)
        assert ours[name]["p50"] * 1000 == pytest.approx(reported[f"median_{its}_ms"], rel=1e-9)
        assert ours[name]["p99"] * 1000 == pytest.approx(reported[f"p99_{its}_ms"], rel=1e-9)
    assert ours["e2e_seconds"]["mean"] == pytest.approx(mean(reported["latencies"]), rel=1e-9)
    assert ours["output_tokens_per_second"] == pytest.approx(reported["output_throughput"], rel=1e-9)
    assert ours["total_tokens_per_second"] == pytest.approx(reported["total_token_throughput"], rel=1e-9)
    assert ours["requests_per_second"] == pytest.approx(reported["request_throughput"], rel=1e-9)


def nearest(found: Sequence[float], wanted: Sequence[float]) -> float:
    """How far apart the two clocks are, as a share, for the request that was disturbed least: the machine may be busy with other things."""
    return min(abs(ours / theirs - 1) for ours, theirs in zip(found, wanted, strict=True))


def test_our_figures_agree_with_the_servers_clock(steady: tuple[Repeat, dict[str, Any], list[Sent]]) -> None:
    """Request by request, told apart by their prompts. What the client sees cannot be sooner than what the server did."""
    requests = sorted(steady[0].requests, key=lambda r: r.prompt_tokens)
    sent = sorted(steady[2], key=lambda s: s.prompt)
    assert [r.prompt_tokens for r in requests] == [s.prompt for s in sent]
    firsts, ends = [s.chunks[0] - s.arrived for s in sent], [s.chunks[-1] - s.arrived for s in sent]
    assert all(r.ttft > first and r.e2e > end for r, first, end in zip(requests, firsts, ends, strict=True))
    assert nearest([r.ttft for r in requests], firsts) < 0.05
    between = [(s.chunks[-1] - s.chunks[0]) / (s.tokens - 1) for s in sent]
    assert nearest([r.tpot for r in requests], between) < 0.05
    assert steady[0].seconds > max(s.chunks[-1] for s in sent) - min(s.arrived for s in sent)


async def ask(url: str, prompt: str) -> tuple[float, list[float], int]:
    """One request of a client that has nothing of ours: when it was sent, when each chunk came, what usage says."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"model": "client", "prompt": prompt, "max_tokens": TOKENS, "stream": True})
    begin = time.perf_counter()
    writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    times, tokens = [], 0
    while b"[DONE]" not in (line := await reader.readline()):
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            times += [time.perf_counter()] * bool(event["choices"])
            tokens = event.get("usage", {}).get("completion_tokens", tokens)
    writer.close()
    return begin, times, tokens


async def ask_all(url: str) -> list[tuple[float, list[float], int]]:
    slots = asyncio.Semaphore(LOAD.concurrency or 1)

    async def one(prompt: str) -> tuple[float, list[float], int]:
        async with slots:
            return await ask(url, prompt)

    return await asyncio.gather(*(one(prompt.text) for prompt in PROMPTS))


@pytest.fixture(scope="module")
def asked(fake: Fake) -> list[tuple[float, list[float], int]]:
    return asyncio.run(ask_all(fake.url))


def test_definitions_are_those_of_a_client_of_forty_lines(asked: list[tuple[float, list[float], int]]) -> None:
    """Its own arithmetic on its own clock, and ours on what the tool would have written of the same requests."""
    seconds = max(times[-1] for _, times, _ in asked) - min(begin for begin, _, _ in asked)
    written = {
        "duration": seconds,
        "ttfts": [times[0] - begin for begin, times, _ in asked],
        "itls": [[b - a for a, b in pairwise(times)] for _, times, _ in asked],
        "input_lens": [1] * len(asked),
        "output_lens": [tokens for *_, tokens in asked],
        "errors": [""] * len(asked),
    }
    ours = figures([parse(written)])
    assert ours["ttft_seconds"]["p50"] == pytest.approx(median(times[0] - begin for begin, times, _ in asked))
    assert ours["tpot_seconds"]["p50"] == pytest.approx(median((t[-1] - t[0]) / (n - 1) for _, t, n in asked))
    assert ours["output_tokens_per_second"] == pytest.approx(sum(n for *_, n in asked) / seconds)


def test_the_tool_and_that_client_see_the_same_server(
    steady: tuple[Repeat, dict[str, Any], list[Sent]], asked: list[tuple[float, list[float], int]]
) -> None:
    for found in (
        [(request.ttft, request.tpot) for request in steady[0].requests],
        [(times[0] - begin, (times[-1] - times[0]) / (tokens - 1)) for begin, times, tokens in asked],
    ):
        assert nearest([first for first, _ in found], [FIRST] * len(found)) < 0.05
        assert nearest([between for _, between in found], [GAP] * len(found)) < 0.05


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_tokens_of_single_chunks(steady: tuple[Repeat, dict[str, Any], list[Sent]]) -> None:
    repeat, _, sent = steady
    assert [request.tokens for request in repeat.requests] == [s.tokens for s in sent] == [TOKENS] * LOAD.requests
    assert [1 + len(request.gaps) for request in repeat.requests] == [TOKENS] * LOAD.requests
    assert sorted(request.prompt_tokens for request in repeat.requests) == [p.tokens for p in PROMPTS]


def test_a_chunk_may_hold_several_tokens(tool: LoadTool, fake: Fake, tiny_model: Path) -> None:
    """Tokens are those of usage, and so of the tokenizer; chunks are fewer, and ITL is between chunks."""
    from transformers import AutoTokenizer

    repeat, reported, sent = measured(tool, fake, "several")
    tokenizer, record = AutoTokenizer.from_pretrained(str(tiny_model)), figures([repeat])
    by_tokenizer = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in reported["generated_texts"]]
    assert by_tokenizer == [r.tokens for r in repeat.requests] == [s.tokens for s in sent] == [TOKENS] * LOAD.requests
    assert record["tokens"] == LOAD.requests * TOKENS and record["chunks"] == record["tokens"] // len(TEXT)
    first = repeat.requests[0]
    assert first.tpot == pytest.approx((first.e2e - first.ttft) / (TOKENS - 1))
    assert mean(first.gaps) > 2 * first.tpot


def test_a_chunk_that_only_says_whose_turn_it_is_is_no_token(fake: Fake, tool: LoadTool) -> None:
    """The role comes at once, the first token after a while; tests/bench/test_bench_stream.py has the other kinds of chunk."""
    deltas = [{"role": "assistant", "content": ""}, *({"content": letter} for letter in TEXT), {}]
    times = [0.0, *(FIRST + i * GAP for i in range(len(TEXT))), FIRST + len(TEXT) * GAP]
    fake.scripts["role"] = [
        (at, {"choices": [{"delta": d, "finish_reason": None if d else "stop"}]})
        for at, d in zip(times, deltas, strict=True)
    ]
    fake.scripts["role"].append((times[-1], {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}))
    before, tool.target["endpoint"], tool.accepted = tool.accepted, CHAT, frozenset()
    try:
        tool.target["model"] = "role"
        repeat = tool.measure(Load(2, 3, 2), 1)
    finally:
        tool.target["endpoint"], tool.accepted = COMPLETIONS, before
    assert nearest([request.ttft for request in repeat.requests], [FIRST] * 2) < 0.05
    assert nearest([request.tpot for request in repeat.requests], [GAP] * 2) < 0.05
    assert [request.tokens for request in repeat.requests] == [3, 3]


def test_other_prompt_tokens_than_were_sent_are_an_error(tool: LoadTool, fake: Fake) -> None:
    with pytest.raises(ServerError, match=r"counts \d+ tokens in a prompt of \d+ \(4 of 4 prompts differ\)"):
        measured(tool, fake, "miscounts", Load(4, 1, 4))


# --- failures ---------------------------------------------------------------------------------------------------------


def test_failed_requests_are_counted_and_in_no_figure(tool: LoadTool, fake: Fake) -> None:
    repeat, _, sent = measured(tool, fake, "half", Load(6, 2, 6))
    assert len(sent) == 6 and len(repeat.requests) == len(repeat.errors) == 3
    assert figures([repeat])["failed_requests"] == 3


def test_an_answer_that_breaks_off_has_failed(tool: LoadTool, fake: Fake) -> None:
    """To the tool it is a success as soon as it has begun."""
    repeat, reported, _ = measured(tool, fake, "breaks", Load(4, 3, 4))
    assert len(repeat.requests) == len(repeat.errors) == 2 and reported["completed"] == 4
    assert set(repeat.errors) == {"the answer ended after 1 of 3 tokens"}


def test_a_server_that_answers_nothing_is_an_error(tool: LoadTool, fake: Fake) -> None:
    with pytest.raises(ServerError, match="failed every request"):
        measured(tool, fake, "fails", Load(2, 2, 2))


def test_what_the_tool_does_not_like_is_said(tool: LoadTool) -> None:
    with pytest.raises(ServerError, match=r"(?s)the load tool failed: .*log: .*load\.log"):
        tool.measure(Load(0, 2, request_rate=-1.0), 1)


# --- how it is asked --------------------------------------------------------------------------------------------------


def test_arguments_of_closed_and_open_loops(tool: LoadTool) -> None:
    def value(command: Sequence[str], name: str) -> str | None:
        return command[command.index(name) + 1] if name in command else None

    closed, opened = tool.arguments(LOAD, 1), tool.arguments(Load(8, TOKENS, request_rate=2.5), 2)
    assert value(closed, "--max-concurrency") == "4" and value(closed, "--request-rate") is None
    assert value(opened, "--request-rate") == "2.5" and value(opened, "--max-concurrency") is None
    assert value(closed, "--seed") != value(opened, "--seed")
    assert value(closed, "--extra-body") != value(opened, "--extra-body")  # a prefix cache of its own for each repeat


def test_what_a_server_does_not_take_is_not_sent(fake: Fake, tiny_model: Path, tmp_path: Path) -> None:
    tool = LoadTool(
        fake.url,
        "m",
        tiny_model,
        HeldOutPrompts(PROMPTS),
        0,
        tmp_path / "log",
        accepted=frozenset({"add_special_tokens"}),
    )
    command = tool.arguments(LOAD, 1)
    assert json.loads(command[command.index("--extra-body") + 1]) == {"add_special_tokens": False}
    tool.__exit__()


def test_repeats_have_other_prompts(tool: LoadTool) -> None:
    few = Load(3, 1, 3)
    prompts_for = [[prompt.tokens for prompt in tool.prompts_for(few, number)] for number in (0, 1, 2)]
    assert prompts_for == [[5, 6, 7], [8, 9, 10], [11, 12, 5]]


def test_random_prompts_are_the_tools(fake: Fake, tiny_model: Path, tmp_path: Path) -> None:
    tool = LoadTool(fake.url, "steady", tiny_model, RandomPrompts(64, 0.5), 0, tmp_path / "log")
    command = tool.arguments(LOAD, 0)
    assert command[command.index("--dataset-name") + 1] == "random"
    assert tool.description == "random, 64 tokens +-50 %"
    tool.__exit__()


def test_a_detailed_result_is_parsed() -> None:
    result = {
        "duration": 2.0, "ttfts": [0.5, 0.0], "itls": [[0.1, 0.2], []], "input_lens": [7, 7], "output_lens": [3, 0], "errors": ["", "gone"],
    }  # fmt: skip
    assert parse(result, 0.25) == Repeat(2.0, (Request(0.5, (0.1, 0.2), 7, 3),), ("gone",), 0.25)


class _Clockwork:
    """A runtime in this process that gives each batch's prompts their tokens at 1, 2, 3 ... seconds."""

    def __init__(self) -> None:
        self.seen: list[list[Sequence[int]]] = []

    def timed(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[Timing]:
        self.seen.append(list(prompts))
        return [Timing([float(1 + i) for i in range(output_tokens)]) for _ in prompts]


def test_direct_load_is_batch_by_batch() -> None:
    runtime: Any = _Clockwork()
    repeat = DirectLoad(runtime, [[1], [2, 2], [3, 3, 3]]).measure(Load(4, 3, 2), 1)
    assert runtime.seen == [[[2, 2], [3, 3, 3]], [[1], [2, 2]]]
    assert repeat.seconds == 6.0 and len(repeat.requests) == 4
    assert repeat.requests[1] == Request(1.0, (1.0, 1.0), 3, 3)
