"""What the serve contract queries: a server over HTTP, or a model folder through transformers in its place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qkit.core.errors import ModelError, ServerError
from qkit.core.files import read_json
from qkit.server.client import Client, json_at

FORCED = 100.0  # added to the logit of a token that must come next: the largest value that OpenAI's logit_bias takes
REQUEST_SECONDS = 60.0
REFUSAL_CHARACTERS = 300
START_SERVER = "start one with `qkit serve`, or correct the URL"


def read_if_there(file: Path) -> dict[str, Any]:
    document: dict[str, Any] = read_json(file) if file.is_file() else {}
    return document


class Subject(Protocol):
    """What the checks need to know of a server, or of the folder that it would load."""

    max_model_len: int | None

    def folder(self) -> Path | None:
        """The model folder that is served, if it is on this machine."""

    def prompt_ids(
        self, messages: Sequence[Any], tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> list[int] | str | None:
        """The token ids of a conversation; the reason of a refusal; or None if this cannot be queried."""

    def prompt_length(self, messages: Sequence[Any], variables: Mapping[str, Any]) -> int | None:
        """The number of prompt tokens of a request that says `tools: []`, or None if it is refused."""

    def stops_at(self, prompt: Sequence[int], token: int) -> bool:
        """Whether this token ends an answer."""

    def parsed_message(
        self, messages: Sequence[Any], tools: Sequence[Any], variables: Mapping[str, Any], text: str
    ) -> dict[str, Any] | str:
        """The message that the server returns when its answer must be `text`; or the reason why it does not take tools."""


class FolderSubject:
    """What programs do that load a folder as it is."""

    def __init__(self, path: Path):
        self.path = path
        config = read_if_there(path / "config.json")
        self.max_model_len: int | None = config.get("max_position_embeddings")
        self.refusal = "" if (path / "tokenizer_config.json").is_file() else "the folder has no tokenizer"
        self.tokenizer: Any = None

    def folder(self) -> Path:
        return self.path

    def prompt_ids(
        self, messages: Sequence[Any], tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> list[int] | str | None:
        from qkit.chat import template
        from qkit.model import tokenizer
        from qkit.recipe import schema

        try:
            self.tokenizer = self.tokenizer or tokenizer.load_tokenizer(self.path, schema.Model(source=str(self.path)))
            text = template.render(self.tokenizer, messages, tools, variables=variables)
        except (ModelError, template.TemplateRefusal, OSError, ValueError) as error:
            return self.refusal or str(error)[:REFUSAL_CHARACTERS]
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def prompt_length(self, messages: Sequence[Any], variables: Mapping[str, Any]) -> int | None:
        ids = self.prompt_ids(messages, [], variables)
        return len(ids) if isinstance(ids, list) else None

    def stops_at(self, prompt: Sequence[int], token: int) -> bool:
        """By the generation config, which transformers and vLLM prefer to config.json. onnxruntime-genai has a config of its own."""
        if genai := read_if_there(self.path / "genai_config.json"):
            return token in _listed(genai["model"]["eos_token_id"])
        generation = read_if_there(self.path / "generation_config.json")
        config = read_if_there(self.path / "config.json")
        return token in _listed(generation.get("eos_token_id", config.get("eos_token_id")))

    def parsed_message(
        self, messages: Sequence[Any], tools: Sequence[Any], variables: Mapping[str, Any], text: str
    ) -> dict[str, Any] | str:
        return "only a server parses tool calls"


class ServerSubject:
    """A running server, queried over HTTP.

    Raises, from the constructor and from each method:
        ServerError: the server does not answer, or not as the OpenAI API says, or does not serve `model`.
    """

    def __init__(self, url: str, model: str | None, headers: Mapping[str, str] | None = None):
        self.client = Client(url, headers, REQUEST_SECONDS, START_SERVER)
        try:
            self.described = self._described(model)
        except BaseException:
            self.client.close()
            raise
        self.model = str(self.described["id"])
        self.max_model_len: int | None = self.described.get("max_model_len")

    def __enter__(self) -> ServerSubject:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def _described(self, model: str | None) -> dict[str, Any]:
        """The entry of `model` in /v1/models; of an adapter, with what only its base's entry says."""
        models = self.client.models()
        offered = [entry for entry in models if model in (None, entry["id"])]
        if not offered:
            names = ", ".join(entry["id"] for entry in models)
            url = self.client.url
            raise ServerError(f"the server at {url} does not serve {model}; it offers {names or 'no model'}", url=url)
        return {**models[0], **offered[0]}

    def folder(self) -> Path | None:
        folder = Path(self.described.get("root") or "")
        return folder if (folder / "config.json").is_file() else None

    def prompt_ids(
        self, messages: Sequence[Any], tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> list[int] | str | None:
        offered: dict[str, Any] = {"tools": list(tools)} if tools else {} if tools is not None else {"tools": None}
        body = {**self._chat(messages, variables), "add_generation_prompt": True, **offered}
        answer = self.client.send("POST", "/tokenize", body)
        if answer.status_code in (404, 405):
            return None
        if answer.status_code != 200:
            return answer.text[:REFUSAL_CHARACTERS]
        tokens: list[int] = self.client.read(answer, lambda document: json_at(document, "tokens"))
        return tokens

    def prompt_length(self, messages: Sequence[Any], variables: Mapping[str, Any]) -> int | None:
        body = {**self._chat(messages, variables), "tools": [], "max_tokens": 1, "temperature": 0.0}
        answer = self.client.send("POST", "/v1/chat/completions", body)
        if answer.status_code != 200:
            return None
        return self.client.read(answer, lambda document: int(json_at(document, "usage", "prompt_tokens")))

    def stops_at(self, prompt: Sequence[int], token: int) -> bool:
        """By forcing the token. If the server does not support that, by the folder that it serves."""
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": 3, "temperature": 0.0}
        answer = self.client.send("POST", "/v1/completions", {**body, "logit_bias": {str(token): FORCED}})
        folder = self.folder()
        if answer.status_code == 400 and folder is not None:
            return FolderSubject(folder).stops_at(prompt, token)
        self.client.expect_ok(answer)
        reason = self.client.read(answer, lambda document: json_at(document, "choices", 0, "finish_reason"))
        return bool(reason == "stop")

    def parsed_message(
        self, messages: Sequence[Any], tools: Sequence[Any], variables: Mapping[str, Any], text: str
    ) -> dict[str, Any] | str:
        forced = {"tool_choice": "auto", "temperature": 0.0, "structured_outputs": {"choice": [text]}}
        body = {**self._chat(messages, variables), "tools": list(tools), **forced}
        answer = self.client.send("POST", "/v1/chat/completions", body)
        if answer.status_code != 200:
            return answer.text[:REFUSAL_CHARACTERS]
        message: dict[str, Any] = self.client.read(answer, lambda document: json_at(document, "choices", 0, "message"))
        return message

    def _chat(self, messages: Sequence[Any], variables: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a request that holds a row's conversation and the variables of its template."""
        given = {"chat_template_kwargs": dict(variables)} if variables else {}
        return {"model": self.model, "messages": as_request(messages), **given}


def _listed(tokens: Any) -> list[Any]:
    return tokens if isinstance(tokens, list) else [tokens]


def as_request(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turns in the form of the OpenAI API: arguments of calls are JSON text, and thinking has both of vLLM's names, the older and the newer."""
    return [
        {
            **turn,
            **({"tool_calls": _calls(turn)} if turn.get("tool_calls") else {}),
            **({"reasoning": turn["reasoning_content"]} if "reasoning_content" in turn else {}),
        }
        for turn in messages
    ]


def _calls(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    calls = []
    for number, call in enumerate(turn["tool_calls"]):
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({"id": f"call_{number}", **call, "function": {**function, "arguments": text}})
    return calls
