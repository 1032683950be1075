"""Bench any server that speaks the OpenAI API."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qkit.bench import stream
from qkit.bench.load import BEYOND_OPENAI, HeldOut, Synthetic, beyond_openai
from qkit.bench.stage import as_text, held_out_prompts, measure, record, tokenizer_folder
from qkit.bench.tool import CHAT, COMPLETIONS, Tool
from qkit.core.errors import RecipeError, ServerError, UserError, short
from qkit.core.files import make_folder, write_json
from qkit.core.progress import Progress
from qkit.model import tokenizer as model_tokenizer
from qkit.recipe.load import override
from qkit.recipe.schema import Bench
from qkit.run.directory import Run
from qkit.server.client import Client, bearer, root_url

# Fields of a record that only a run's artifact has.
UNKNOWN = ("model_sha256", "disk_bytes", "startup_seconds", "argv", "peak_bytes", "meter", "training", "quality")
SEED = 42
PROBE_SECONDS = 60.0
SPREAD = 0.5  # of random prompts: from half to one and a half times as many tokens


@dataclass(frozen=True)
class BenchTarget:
    """A server and what to send it. `run`: the run whose held-out prompts are sent; without one, prompts are random."""

    url: str
    model: str | None
    tokenizer: str | None
    prompt_tokens: int = 128
    chat: bool = False
    run: Path | None = None
    overrides: Sequence[str] = ()


def run(target: BenchTarget, out: Path, progress: Progress) -> list[dict[str, Any]]:
    """Measure every load of the bench settings; returns the records, and writes them into `out`.

    Raises:
        UserError: neither a run nor a tokenizer was named.
        ServerError: it does not answer, or answers none of the requests.
    """
    url = root_url(target.url)
    prompts, tokenizer, section = _prompts(target)
    name = target.model or _only_model(url)
    make_folder(out)
    about = {"runtime": "url", "artifact": name, **dict.fromkeys(UNKNOWN)}
    records = []
    endpoint = CHAT if target.chat else COMPLETIONS
    takes = taken(url, endpoint, name)
    if "ignore_eos" not in takes:
        progress.say(f"bench: {url} does not accept ignore_eos, so the model decides how long answers are")
    with Tool(url, name, tokenizer, prompts, SEED, out / "load.log", endpoint, takes) as source:
        for measured in measure(source, section, None):
            progress.say(f"bench: {name} {measured.name}: {measured.rate('output_tokens_per_second'):.1f} tokens/s")
            records.append(record(measured, source, section, SEED, about))
            write_json(out / f"{name.replace('/', '-')}-{measured.name}.json", records[-1])
    return records


def _prompts(target: BenchTarget) -> tuple[HeldOut | Synthetic, Path | str, Bench]:
    """What is sent, the tokenizer for it, and the bench settings: of the run that was named, or defaults, with the overrides."""
    if target.run is None:
        if target.tokenizer is None:
            raise UserError(
                "`qkit bench url` needs prompts: --run RUN sends its held-out ones, --tokenizer DIR sends random ones"
            )
        return Synthetic(target.prompt_tokens, SPREAD), target.tokenizer, _section({}, target.overrides)
    if target.chat:
        raise UserError(
            "--chat sends random prompts: a run's held-out prompts are already rendered, and the server would render them again; omit --run"
        )
    opened = Run.open(target.run)
    rows = as_text(model_tokenizer.tokenizer_of(opened.recipe.model), held_out_prompts(opened))
    section = _section(opened.recipe.bench.model_dump(mode="json"), target.overrides)
    return rows, target.tokenizer or tokenizer_folder(opened), section


def _section(settings: dict[str, Any], overrides: Sequence[str]) -> Bench:
    raw: dict[str, Any] = {"bench": settings}
    for text in overrides:
        override(raw, text)
    if others := sorted(raw.keys() - {"bench"}):
        raise RecipeError(f"--set {others[0]}...: `qkit bench url` takes settings of the section bench only")
    try:
        return Bench.model_validate(raw["bench"])
    except ValidationError as error:
        problems = [
            f"bench.{'.'.join(map(str, e['loc']))}: {e['msg']}, got {short(repr(e['input']))}" for e in error.errors()
        ]
        raise RecipeError("\n".join(problems)) from None


def taken(url: str, endpoint: str, name: str) -> frozenset[str]:
    """Which of BEYOND_OPENAI a server takes: some refuse a request for a parameter that they do not know. Found out by asking.

    Raises:
        ServerError: it cannot be reached, or does not answer in time.
    """
    with _client(url) as client:
        if _answers(client, endpoint, name, BEYOND_OPENAI):
            return frozenset(BEYOND_OPENAI)
        return frozenset(key for key in BEYOND_OPENAI if _answers(client, endpoint, name, [key]))


def _answers(client: Client, endpoint: str, name: str, extra: Collection[str]) -> bool:
    body = stream.body(endpoint == CHAT, name, "a", 1, beyond_openai(extra))
    return client.send("POST", endpoint, body).status_code == 200


def _client(url: str) -> Client:
    """With the API key that the load tool sends."""
    return Client(url, bearer(os.environ.get("OPENAI_API_KEY")), PROBE_SECONDS)


def _only_model(url: str) -> str:
    """The model of a server that has one.

    Raises:
        ServerError: it does not answer, or has several.
    """
    with _client(url) as client:
        names = [entry["id"] for entry in client.models()]
    if len(names) != 1:
        raise ServerError(f"{url} has {len(names)} models; say which with --model: {', '.join(names)}")
    return str(names[0])
