"""What a serve contract is checked against: a server over HTTP, or a model folder through transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qkit.core import network
from qkit.core.errors import ModelError, ServerError
from qkit.core.files import read_json

if TYPE_CHECKING:
    import httpx


Found = TypeVar("Found")
FORCED = 100.0  # logit bias that forces a token: the maximum of OpenAI's logit_bias
REQUEST_SECONDS = 60.0


def read_if_there(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(file) if file.is_file() else {}
    return found


# --- who is asked ---------------------------------------------------------------------------------------------------


class Subject(Protocol):
    """What the checks need from a server, or from a folder."""

    max_model_len: int | None

    def folder(self) -> Path | None:
        """The model folder that it serves, if it is on this machine."""

    def prompt_ids(
        self, messages: Sequence[Any], tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> list[int] | str | None:
        """The prompt's token ids; the reason as text if it refuses the conversation; None if it has no such endpoint."""

    def counted(self, messages: Sequence[Any], variables: Mapping[str, Any]) -> int | None:
        """The number of prompt tokens of a request with `tools: []`; None if it refuses the request."""

    def stops_at(self, prompt: Sequence[int], token: int) -> bool:
        """Whether this token ends an answer."""

    def said(
        self, messages: Sequence[Any], tools: Sequence[Any], variables: Mapping[str, Any], text: str
    ) -> dict[str, Any] | str:
        """Its message when it is constrained to generate `text`; the reason as text if it does not accept tools."""


class FolderSubject:
    """What any program does that loads this folder."""

    def __init__(self, path: Path):
        self.path = path
        config = read_if_there(path / "config.json")
        self.max_model_len: int | None = config.get("max_position_embeddings")
        self.refusal = "" if (path / "tokenizer_config.json").is_file() else "it has no tokenizer"
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
            return self.refusal or str(error)[:300]
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def counted(self, messages: Sequence[Any], variables: Mapping[str, Any]) -> int | None:
        made = self.prompt_ids(messages, [], variables)
        return len(made) if isinstance(made, list) else None

    def stops_at(self, prompt: Sequence[int], token: int) -> bool:
        """By generation_config.json; without it, transformers and vLLM use config.json. onnxruntime-genai has its own config."""
        if genai := read_if_there(self.path / "genai_config.json"):
            return token in _listed(genai["model"]["eos_token_id"])
        own, config = read_if_there(self.path / "generation_config.json"), read_if_there(self.path / "config.json")
        named = own.get("eos_token_id", config.get("eos_token_id"))
        return token in _listed(named)

    def said(
        self, messages: Sequence[Any], tools: Sequence[Any], variables: Mapping[str, Any], text: str
    ) -> dict[str, Any] | str:
        return "only a server parses tool calls"


class ServerSubject:
    """What a running server answers."""

    def __init__(self, url: str, model: str | None, headers: Mapping[str, str] | None = None):
        import httpx

        self.url = url
        base = url.rstrip("/").removesuffix("/v1")
        with network.reaching(ServerError, f"{url} is not an address", "write it as http://HOST:PORT"):
            self.client = httpx.Client(base_url=base, headers=headers, timeout=REQUEST_SECONDS)
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
        """The model's entry in /v1/models."""
        models = self._read(self._ask("GET", "/v1/models"), network.models)
        offered = [entry for entry in models if model in (None, entry["id"])]
        if not offered:
            names = ", ".join(entry["id"] for entry in models)
            raise ServerError(f"the server at {self.url} does not serve {model}; it offers {names}")
        return {**models[0], **offered[0]}

    def _ask(self, method: str, path: str, body: Any = None, refusable: bool = False) -> httpx.Response:
        with network.reaching(ServerError, f"no server answers at {self.url}", "start one with `qkit serve`"):
            answer = self.client.request(method, path, json=body)
        if answer.status_code != 200 and not refusable:
            raise self._unexpected(answer)
        return answer

    def _unexpected(self, answer: httpx.Response) -> ServerError:
        path = answer.request.url.path
        return ServerError(f"the server at {self.url} answered {answer.status_code} to {path}: {answer.text[:300]}")

    def _read(self, answer: httpx.Response, pick: Callable[[Any], Found]) -> Found:
        """Read a part of an answer.

        Raises:
            ServerError: the answer does not have that part.
        """
        what = f"the server at {self.url} does not answer as OpenAI's API does"
        with network.reaching(ServerError, what, network.ADDRESS):
            return pick(answer.json())

    def folder(self) -> Path | None:
        folder = Path(self.described.get("root") or "")
        return folder if (folder / "config.json").is_file() else None

    def prompt_ids(
        self, messages: Sequence[Any], tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> list[int] | str | None:
        body = {"model": self.model, "messages": as_request(messages), "add_generation_prompt": True}
        offered: dict[str, Any] = {"tools": list(tools)} if tools else {} if tools is not None else {"tools": None}
        more = {**offered, **_given(variables)}
        answer = self._ask("POST", "/tokenize", {**body, **more}, refusable=True)
        if answer.status_code in (404, 405):
            return None
        if answer.status_code != 200:
            return answer.text[:300]
        tokens: list[int] = self._read(answer, lambda document: network.part(document, "tokens"))
        return tokens

    def counted(self, messages: Sequence[Any], variables: Mapping[str, Any]) -> int | None:
        body = {"model": self.model, "messages": as_request(messages), "tools": [], **_given(variables)}
        answer = self._ask(
            "POST", "/v1/chat/completions", {**body, "max_tokens": 1, "temperature": 0.0}, refusable=True
        )
        if answer.status_code != 200:
            return None
        return self._read(answer, lambda document: int(network.part(document, "usage", "prompt_tokens")))

    def stops_at(self, prompt: Sequence[int], token: int) -> bool:
        """If the server rejects the logit bias, its folder's configuration decides."""
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": 3, "temperature": 0.0}
        asked, folder = {**body, "logit_bias": {str(token): FORCED}}, self.folder()
        answer = self._ask("POST", "/v1/completions", asked, refusable=folder is not None)
        if answer.status_code == 400 and folder is not None:
            return FolderSubject(folder).stops_at(prompt, token)
        if answer.status_code != 200:
            raise self._unexpected(answer)
        reason = self._read(answer, lambda document: network.part(document, "choices", 0, "finish_reason"))
        return bool(reason == "stop")

    def said(
        self, messages: Sequence[Any], tools: Sequence[Any], variables: Mapping[str, Any], text: str
    ) -> dict[str, Any] | str:
        body = {
            "model": self.model,
            "messages": as_request(messages),
            "tools": list(tools),
            **_given(variables),
            "tool_choice": "auto",
            "temperature": 0.0,
            "structured_outputs": {"choice": [text]},
        }
        answer = self._ask("POST", "/v1/chat/completions", body, refusable=True)
        if answer.status_code != 200:
            return answer.text[:300]
        message: dict[str, Any] = self._read(answer, lambda document: network.part(document, "choices", 0, "message"))
        return message


def _listed(tokens: Any) -> list[Any]:
    return tokens if isinstance(tokens, list) else [tokens]


def as_request(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the form of OpenAI's API: a call's arguments are text, and thinking has both of vLLM's names, the newer and the older."""
    return [
        {
            **turn,
            **({"tool_calls": _calls(turn)} if turn.get("tool_calls") else {}),
            **({"reasoning": turn["reasoning_content"]} if "reasoning_content" in turn else {}),
        }
        for turn in messages
    ]


def _given(variables: Mapping[str, Any]) -> dict[str, Any]:
    """A row's template variables in the form of a request."""
    return {"chat_template_kwargs": dict(variables)} if variables else {}


def _calls(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    made = []
    for number, call in enumerate(turn["tool_calls"]):
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        made.append({"id": f"call_{number}", **call, "function": {**function, "arguments": text}})
    return made
