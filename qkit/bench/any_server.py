"""Bench any server that speaks the OpenAI API."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qkit.bench import stream
from qkit.bench.load import EXTRA_PARAMETERS, HeldOutPrompts, RandomPrompts, extra_body
from qkit.bench.stage import held_out_prompts, measure, record, text_prompts, tokenizer_folder
from qkit.bench.tool import CHAT, COMPLETIONS, LoadTool
from qkit.core.errors import RecipeError, ServerError, UserError, short
from qkit.core.files import make_folder, write_json
from qkit.core.progress import Progress
from qkit.model import tokenizer as model_tokenizer
from qkit.recipe.load import override
from qkit.recipe.schema import Bench
from qkit.run.directory import Run
from qkit.server.client import Client, bearer, root_url

# Fields of a record that are known only for an artifact of a run.
RUN_ONLY_FIELDS = (
    "model_sha256",
    "disk_bytes",
    "startup_seconds",
    "argv",
    "peak_bytes",
    "meter",
    "training",
    "quality",
)
SEED = 42
PROBE_SECONDS = 60.0
LENGTH_SPREAD = 0.5  # random prompts have from half to one and a half times `prompt_tokens`


@dataclass(frozen=True)
class BenchTarget:
    """A server and what to send it.

    `run`: the run whose held-out prompts are sent; without one, prompts are random, of about `prompt_tokens` tokens. `chat`: send to
    /v1/chat/completions instead of /v1/completions. `overrides`: settings of the recipe's bench section, as `bench.repeats=3`.
    """

    url: str
    model: str | None
    tokenizer: str | None
    prompt_tokens: int = 128
    chat: bool = False
    run: Path | None = None
    overrides: Sequence[str] = ()


def run(target: BenchTarget, out: Path, progress: Progress) -> list[dict[str, Any]]:
    """Measure every load of the bench settings. Write one record per load to `out`, and return the records.

    Raises:
        UserError: neither a run nor a tokenizer is given, or a run is given together with `chat`.
        RecipeError: an override is not a valid bench setting.
        ServerError: the server does not respond, or every request failed.
    """
    url = root_url(target.url)
    prompts, tokenizer, section = _prompts(target)
    name = target.model or _only_model(url)
    make_folder(out)
    metadata = {"runtime": "url", "artifact": name, **dict.fromkeys(RUN_ONLY_FIELDS)}
    records = []
    endpoint = CHAT if target.chat else COMPLETIONS
    accepted = accepted_parameters(url, endpoint, name)
    if "ignore_eos" not in accepted:
        progress.notify(f"bench: {url} does not accept ignore_eos, so the model decides when an answer ends")
    with LoadTool(url, name, tokenizer, prompts, SEED, out / "load.log", endpoint, accepted) as source:
        for measurement in measure(source, section, None):
            progress.notify(
                f"bench: {name} {measurement.name}: {measurement.rate('output_tokens_per_second'):.1f} tokens/s"
            )
            records.append(record(measurement, source, section, SEED, metadata))
            write_json(out / f"{name.replace('/', '-')}-{measurement.name}.json", records[-1])
    return records


def _prompts(target: BenchTarget) -> tuple[HeldOutPrompts | RandomPrompts, Path | str, Bench]:
    """The prompts, the tokenizer that counts them, and the bench settings of the run (or the defaults) with the overrides applied."""
    if target.run is None:
        if target.tokenizer is None:
            raise UserError(
                "`qkit bench url` needs prompts: pass --run RUN to send its held-out prompts, or --tokenizer DIR to send random prompts"
            )
        return RandomPrompts(target.prompt_tokens, LENGTH_SPREAD), target.tokenizer, _section({}, target.overrides)
    if target.chat:
        raise UserError(
            "--chat needs random prompts: a run's held-out prompts already went through the chat template, and the server would apply it "
            "again; omit --run"
        )
    opened = Run.open(target.run)
    rows = text_prompts(model_tokenizer.tokenizer_of(opened.recipe.model), held_out_prompts(opened))
    section = _section(opened.recipe.bench.model_dump(mode="json"), target.overrides)
    return rows, target.tokenizer or tokenizer_folder(opened), section


def _section(settings: dict[str, Any], overrides: Sequence[str]) -> Bench:
    raw: dict[str, Any] = {"bench": settings}
    for text in overrides:
        override(raw, text)
    if others := sorted(raw.keys() - {"bench"}):
        raise RecipeError(f"--set {others[0]}...: `qkit bench url` accepts only settings of the bench section")
    try:
        return Bench.model_validate(raw["bench"])
    except ValidationError as error:
        problems = [
            f"bench.{'.'.join(map(str, e['loc']))}: {e['msg']}, got {short(repr(e['input']))}" for e in error.errors()
        ]
        raise RecipeError("\n".join(problems)) from None


def accepted_parameters(url: str, endpoint: str, name: str) -> frozenset[str]:
    """Which of EXTRA_PARAMETERS a server accepts. Some servers reject a request with an unknown parameter, so each is tried.

    Raises:
        ServerError: the server cannot be reached, or does not respond in time.
    """
    with _client(url) as client:
        if _is_accepted(client, endpoint, name, EXTRA_PARAMETERS):
            return frozenset(EXTRA_PARAMETERS)
        return frozenset(key for key in EXTRA_PARAMETERS if _is_accepted(client, endpoint, name, [key]))


def _is_accepted(client: Client, endpoint: str, name: str, extra: Collection[str]) -> bool:
    request_body = stream.request_body(endpoint == CHAT, name, "a", 1, extra_body(extra))
    return client.send("POST", endpoint, request_body).status_code == 200


def _client(url: str) -> Client:
    """A client with the same API key as the load tool."""
    return Client(url, bearer(os.environ.get("OPENAI_API_KEY")), PROBE_SECONDS)


def _only_model(url: str) -> str:
    """The name of the server's model.

    Raises:
        ServerError: the server does not respond, or does not have exactly one model.
    """
    with _client(url) as client:
        names = [entry["id"] for entry in client.models()]
    if len(names) != 1:
        raise ServerError(f"{url} has {len(names)} models; choose one with --model: {', '.join(names)}", url=url)
    return str(names[0])
