"""The subjects of the serve contract: a server, queried over HTTP, or a model folder, opened with transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qkit.core.errors import ModelError, ServerError
from qkit.core.files import read_json
from qkit.server.client import Client, json_at

FORCED = 100.0  # logit bias that forces a token: the maximum of OpenAI's logit_bias
REQUEST_SECONDS = 60.0
REFUSAL_CHARACTERS = 300
START_SERVER = "start one with `qkit serve`, or correct the URL"


def read_if_there(file: Path) -> dict[str, Any]:
    document: dict[str, Any] = read_json(file) if file.is_file() else {}
    return document


class Subject(Protocol):
    """What the checks query of a server, or of a folder that a server would load."""

    max_model_len: int | None

    def folder(self) -> Path | None:
        """The model folder that is served, if it is on this machine."""

    def prompt_ids(
        self, messages: Sequence[Any], tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> list[int] | str | None:
        """The token ids of a conversation; the reason if it is rejected; or None if the subject cannot be queried for them."""

    def prompt_length(self, messages: Sequence[Any], variables: Mapping[str, Any]) -> int | None:
        """The number of prompt tokens of a request with `tools: []`, or None if it is rejected."""

    def stops_at(self, prompt: Sequence[int], token: int) -> bool:
        """Whether this token ends an answer."""

    def parsed_message(
        self, messages: Sequence[Any], tools: Sequence[Any], variables: Mapping[str, Any], text: str
    ) -> dict[str, Any] | str:
        """The message that the server returns if its answer is forced to be `text`; or the reason why it does not accept tools."""


class FolderSubject:
    """A model folder, treated as programs do that load it directly."""

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
        """Read from the generation config, which transformers and vLLM prefer to config.json; onnxruntime-genai has its own config."""
        if genai := read_if_there(self.path / "genai_config.json"):
            return token in _listed(genai["model"]["eos_token_id"])
        generation = read_if_there(self.path / "generation_config.json")
        config = read_if_there(self.path / "config.json")
        return token in _listed(generation.get("eos_token_id", config.get("eos_token_id")))

    def parsed_message(
        self, messages: Sequence[Any], tools: Sequence[Any], variables: Mapping[str, Any], text: str
    ) -> dict[str, Any] | str:
        return "a folder cannot parse tool calls; only a server can"


class ServerSubject:
    """A running server, queried over HTTP.

    Raises, from the constructor and from each method:
        ServerError: the server does not answer, violates the OpenAI API, or does not serve `model`.
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
        """The entry of `model` in /v1/models; for an adapter, completed with the fields of its base's entry."""
        models = self.client.models()
        matches = [entry for entry in models if model in (None, entry["id"])]
        if not matches:
            names = ", ".join(entry["id"] for entry in models)
            url = self.client.url
            raise ServerError(f"the server at {url} does not serve {model}; it offers {names or 'no model'}", url=url)
        return {**models[0], **matches[0]}

    def folder(self) -> Path | None:
        folder = Path(self.described.get("root") or "")
        return folder if (folder / "config.json").is_file() else None

    def prompt_ids(
        self, messages: Sequence[Any], tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> list[int] | str | None:
        tool_options: dict[str, Any] = {"tools": list(tools)} if tools else {} if tools is not None else {"tools": None}
        body = {**self._chat(messages, variables), "add_generation_prompt": True, **tool_options}
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
        """Tested by forcing the token. If the server does not support that, read from the folder that it serves."""
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
        """The part of a request with a row's conversation and its chat template variables."""
        options = {"chat_template_kwargs": dict(variables)} if variables else {}
        return {"model": self.model, "messages": as_request(messages), **options}


def _listed(tokens: Any) -> list[Any]:
    return tokens if isinstance(tokens, list) else [tokens]


def as_request(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the form of the OpenAI API: call arguments are JSON text, and thinking has both of vLLM's names, the old and the new."""
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
