"""A server that is not ours, through the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from helpers.command import qkit
from helpers.sample import SAMPLE
from helpers.schemas import BENCH_SCHEMA as SCHEMA
from helpers.sse import Fake, serving
from qkit.bench import any_server
from qkit.bench.any_server import BenchTarget
from qkit.bench.load import EXTRA_PARAMETERS
from qkit.bench.tool import CHAT, COMPLETIONS
from qkit.core.errors import RecipeError, ServerError, UserError
from qkit.core.progress import Progress


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    with serving() as server:
        yield server


@pytest.mark.slow
def test_any_server_can_be_benched(fake: Fake, tiny_model: Path, tmp_path: Path) -> None:
    settings = ("bench.concurrency=[2]", "bench.repeats=2", "bench.output_tokens=3", "bench.slo_e2e_seconds=60")
    done = qkit(
        *("bench", "url", f"{fake.url}/v1", "--model", "steady", "--tokenizer", tiny_model, "--prompt-tokens", 16),
        *(part for setting in settings for part in ("--set", setting)),
        *("--price-per-hour", 2, "--out", tmp_path / "out", "--json"),
    )
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)
    jsonschema.validate(record, SCHEMA)
    assert record == json.loads((tmp_path / "out" / "steady-c2.json").read_text())
    assert (record["runtime"], record["artifact"], record["concurrency"], record["prompts"]) == ("url", "steady", 2, 4)
    assert record["tokens"] == 12 and record["ttft_seconds"]["p50"] > 0.3
    assert record["goodput_per_second"] == pytest.approx(record["requests_per_second"])
    assert record["cost"]["price_per_hour"] == 2 and record["memory"]["rss_tree"] == []
    assert "tokens/s" in done.stderr


@pytest.mark.parametrize("chat", [False, True])
def test_what_a_server_takes_is_found_out_by_asking(fake: Fake, chat: bool) -> None:
    endpoint = CHAT if chat else COMPLETIONS
    assert any_server.accepted_parameters(fake.url, endpoint, "steady") == frozenset(EXTRA_PARAMETERS)
    assert any_server.accepted_parameters(fake.url, endpoint, "strict") == frozenset()


@pytest.mark.slow
def test_a_strict_server_can_be_benched(fake: Fake, tiny_model: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    progress = Progress()
    progress.notify = messages.append  # type: ignore[method-assign]
    settings = BenchTarget(
        fake.url, "strict", str(tiny_model), 16, overrides=("bench.concurrency=[2]", "bench.output_tokens=3")
    )
    (record,) = any_server.run(settings, tmp_path, progress)
    assert record["failed_requests"] == 0 and record["tokens"] == 18
    assert any("does not accept ignore_eos" in text for text in messages)


@pytest.mark.parametrize(
    ("settings", "error", "messages"),
    [
        ({}, UserError, "--run RUN to send its held-out prompts"),
        ({"run": SAMPLE, "chat": True}, UserError, "--chat"),
        ({"tokenizer": "t", "overrides": ["bench.repeats=0"]}, RecipeError, "bench.repeats"),
        ({"tokenizer": "t", "overrides": ["serve.port=0"]}, RecipeError, "only settings of the bench section"),
        ({"tokenizer": "t", "model": None}, ServerError, "answered 404 to /v1/models"),
    ],
)
def test_what_cannot_be_asked(
    fake: Fake, tmp_path: Path, settings: dict[str, Any], error: type[UserError], messages: str
) -> None:
    target = BenchTarget(**{"url": fake.url, "model": "m", "tokenizer": None, **settings})
    with pytest.raises(error, match=messages):
        any_server.run(target, tmp_path, Progress())


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9.*is the server up"):
        any_server.run(BenchTarget("http://127.0.0.1:9", None, "t"), tmp_path, Progress())
