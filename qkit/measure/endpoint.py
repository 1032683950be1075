"""Who is asked in a serve contract: a server over HTTP, or a folder through transformers."""

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
FORCED = 100.0  # added to the logit of a token that shall be said: the most that OpenAI's logit_bias takes
REQUEST_SECONDS = 60.0


def read_if_there(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(file) if file.is_file() else {}
    return found


# --- who is asked ---------------------------------------------------------------------------------------------------


class Subject(Protocol):
    """What the checks ask of a server, or of a folder in its place."""

    max_model_len: int | None

    def folder(self) -> Path | None:
        """The model folder that it serves, when it is on this machine."""

    def prompt_ids(
        self, messages: Sequence[Any], tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> list[int] | str | None:
        """The ids that it makes of a conversation; why it refuses; None if it cannot be asked."""

    def counted(self, messages: Sequence[Any], variables: Mapping[str, Any]) -> int | None:
        """How many tokens the prompt of an answer has where the request says `tools: []`; None if that is refused."""

    def stops_at(self, prompt: Sequence[int], token: int) -> bool:
        """Whether saying this token ends an answer."""

    def said(
        self, messages: Sequence[Any], tools: Sequence[Any], variables: Mapping[str, Any], text: str
    ) -> dict[str, Any] | str:
        """Its message when it can say nothing but `text`; or why it does not take tools."""


class FolderSubject:
    """What a program will do that loads a folder as it is."""

    def __init__(self, path: Path):
        self.path = path
        config = read_if_there(path / "config.json")
        self.max_model_len: int | None = config.get("max_position_embeddings")
        self.refusal = "" if (path / "tokenizer_config.json").is_file() else "it holds no tokenizer"
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
        """The generation config decides; without one transformers and vLLM take the config's. onnxruntime-genai has a config of its own."""
        if genai := read_if_there(self.path / "genai_config.json"):
            return token in _listed(genai["model"]["eos_token_id"])
        own, config = read_if_there(self.path / "generation_config.json"), read_if_there(self.path / "config.json")
        named = own.get("eos_token_id", config.get("eos_token_id"))
        return token in _listed(named)

    def said(
        self, messages: Sequence[Any], tools: Sequence[Any], variables: Mapping[str, Any], text: str
    ) -> dict[str, Any] | str:
        return "only a server does"


class ServerSubject:
    """What a running server says when asked."""

    def __init__(self, url: str, model: str | None, headers: Mapping[str, str] | None = None):
        import httpx

        self.url = url
        base = url.rstrip("/").removesuffix("/v1")
        with network.reaching(ServerError, f"{url} is no address", "write it as http://HOST:PORT"):
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
        """The entry of /v1/models."""
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
        """What is looked for in an answer."""
        what = f"the server at {self.url} answers otherwise than OpenAI's API has it"
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
        """A server that cannot be made to say a token is taken at the word of its folder."""
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
    """Turns as OpenAI's API has them: a call's arguments are text there, and thinking goes by vLLM's two names, the newer and the older."""
    return [
        {
            **turn,
            **({"tool_calls": _calls(turn)} if turn.get("tool_calls") else {}),
            **({"reasoning": turn["reasoning_content"]} if "reasoning_content" in turn else {}),
        }
        for turn in messages
    ]


def _given(variables: Mapping[str, Any]) -> dict[str, Any]:
    """A row's variables of the template, as a request has them."""
    return {"chat_template_kwargs": dict(variables)} if variables else {}


def _calls(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    made = []
    for number, call in enumerate(turn["tool_calls"]):
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        made.append({"id": f"call_{number}", **call, "function": {**function, "arguments": text}})
    return made
