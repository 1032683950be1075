"""Requests of the OpenAI API, read and checked, as the ONNX server understands them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qkit.chat import template
from qkit.chat.conversation import NOTHING, call_of, content_of, tools_sent
from qkit.server.onnx_engine import Sampling
from qkit.tasks._conversation.formats import RESERVED

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI has it
MOST_IDS = 2**31 - 1  # the engine's own integers
# Parameters that change nothing in an answer, and values of others that do not.
IDLE = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
    }
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "top_logprobs", "min_p", "min_tokens", "priority"), (0,)),
    **dict.fromkeys(("length_penalty", "best_of"), (1,)),
    **dict.fromkeys(("echo", "logprobs", "use_beam_search", "early_stopping", "include_stop_str_in_output"), (False,)),
    **dict.fromkeys(("return_token_ids", "return_tokens_as_token_ids"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens", "include_reasoning"), (True,)),
    **dict.fromkeys(("tool_choice", "function_call"), ("auto", "none")),
    "parallel_tool_calls": (True, False),  # of an answer that holds none
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
NEEDED = frozenset({"model", "messages", "prompt"})  # where nothing is not the same as no such parameter


class Refused(Exception):
    """A request that is not answered. `param`: what in it is wrong."""

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param = param
        self.status = status


# --- what is asked ------------------------------------------------------------------------------------------------------


class Asked(BaseModel):
    """Parameters that both endpoints know; others are kept, to be named in the refusal."""

    model_config = ConfigDict(extra="allow")
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=MOST_IDS)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_nothings(cls, given: Any) -> Any:
        """Clients write null, and what else is nothing, for what they leave to the server."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if name in NEEDED or value not in NOTHING}

    def take(self, own: Mapping[str, Any]) -> None:
        """The model's own values for what the request does not say."""
        for name, value in own.items():
            if name not in self.model_fields_set:
                setattr(self, name, value)

    def check(self, served: str) -> None:
        """Raise Refused for another model, and for what this server does not do."""
        if self.model != served:
            raise Refused(f"the model `{self.model}` does not exist; there is `{served}`", "model", 404)
        for name, value in (self.model_extra or {}).items():
            neutral = NEUTRAL.get(name, (False,))  # what is switched off needs no support
            if name not in IDLE and not any(_same(value, one) for one in neutral):
                raise Refused(f"`{name}` is not supported by this server", name)
        if self.seed is not None and self.temperature > 0:
            raise Refused("`seed` is not supported by this server, but for temperature 0", "seed")

    @property
    def stops(self) -> list[str]:
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]

    def sampling(self, room: int, default: int) -> Sampling:
        """`room`: tokens that are left beside the prompt."""
        wanted = min(self.max_tokens or default, room)
        few = wanted if self.ignore_eos else 0
        return Sampling(wanted, self.temperature, self.top_p, max(self.top_k, 0), few, self.repetition_penalty)


class Chat(Asked):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False

    def variables(self) -> dict[str, Any]:
        """What the chat template is given beside messages and tools; an effort switches thinking on or off, as vLLM has it."""
        effort = self.reasoning_effort
        given = {} if effort is None else {"enable_thinking": effort != "none"}
        given |= self.chat_template_kwargs | ({} if effort is None else {"reasoning_effort": effort})
        if reserved := RESERVED & given.keys():
            raise Refused(f"`chat_template_kwargs` cannot hold {', '.join(sorted(reserved))}", "chat_template_kwargs")
        if self.continue_final_message and self.add_generation_prompt:
            raise Refused("`continue_final_message` goes with `add_generation_prompt` false", "continue_final_message")
        asked = {"add_generation_prompt": self.add_generation_prompt}
        asked |= {"continue_final_message": True} if self.continue_final_message else {}
        return {**given, **asked, **({"documents": self.documents} if self.documents else {})}


class Completion(Asked):
    """POST /v1/completions: one prompt, as text or token ids, or a list that holds one."""

    prompt: Any
    add_special_tokens: bool = True


def _same(value: Any, other: Any) -> bool:
    """Equal, where false is not 0 and true is not 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def as_templates_have_it(message: Mapping[str, Any], where: str = "messages") -> dict[str, Any]:
    """A message of the API, its content as text that remembers its parts, the arguments of its calls as objects.

    Raises:
        Refused: it has no role, a part of it is no text, or a call has no function with arguments in JSON.
    """
    if not isinstance(message.get("role"), str):
        raise Refused(f"`{where}.role` is missing, or no text", "messages")
    if message.get("function_call"):
        raise Refused(f"`{where}.function_call` is not supported by this server; write `tool_calls`", "messages")
    try:
        content = content_of(message.get("content"), f"`{where}`", "this server reads text")
        return {
            **message,
            "content": content,
            "tool_calls": [call_of(call) for call in message.get("tool_calls") or ()],
        }
    except ValueError as error:
        raise Refused(f"`{where}`: {error}", "messages") from None


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """The functions that a request offers, as a template is given them.

    Raises:
        Refused: one is not a function with a name, or its description and parameters are no text and no object.
    """
    for number, tool in enumerate(tools or ()):
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise Refused(f"`tools[{number}]` is not of the form {{'type': 'function', 'function': {{...}}}}", "tools")
        for key, kind in (("name", str), ("description", str | None), ("parameters", dict | None)):
            if not isinstance(function.get(key), kind):
                raise Refused(f"`tools[{number}].function.{key}` is missing, or not of the right type", "tools")
    return tools_sent(tools)


def chat_prompt(tokenizer: Any, asked: Chat) -> list[int]:
    """The ids of a conversation, rendered by the model's own template as training rendered it.

    Raises:
        Refused: the template does not take these messages.
    """
    messages = [as_templates_have_it(message, f"messages[{number}]") for number, message in enumerate(asked.messages)]
    tools = read_tools(asked.tools)
    try:
        text = template.render(tokenizer, messages, tools, variables=asked.variables())
    except template.TemplateRefusal as error:
        raise Refused(f"the chat template does not take these `messages`: {error}", "messages") from None
    ids: list[int] = tokenizer(text, add_special_tokens=asked.add_special_tokens)["input_ids"]
    return ids


def text_prompt(tokenizer: Any, asked: Completion) -> list[int]:
    """The ids of a prompt: its own, or those of its text.

    Raises:
        Refused: it is neither, or several, or has ids that the vocabulary lacks.
    """
    given: Any = asked.prompt
    if isinstance(given, list) and given and isinstance(given[0], str | list):
        if len(given) > 1:
            raise Refused("`prompt`: one at a time is supported by this server", "prompt")
        given = given[0]
    if isinstance(given, str):
        given = tokenizer(given, add_special_tokens=asked.add_special_tokens)["input_ids"]
    if not isinstance(given, list) or not all(type(token) is int for token in given):
        raise Refused("`prompt` is a text, or token ids, or a list that holds one of these", "prompt")
    if not given or not all(0 <= token < len(tokenizer) for token in given):
        raise Refused("`prompt` is empty, or holds ids that the vocabulary lacks", "prompt")
    return given


# --- the server ---------------------------------------------------------------------------------------------------------


OWN = ("temperature", "top_p", "top_k", "repetition_penalty")  # of a generation config, as vLLM takes them for requests


def own_sampling(folder: Path) -> dict[str, Any]:
    """How the model wants to be sampled where a request does not say."""
    file = folder / "generation_config.json"
    held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {name: held[name] for name in OWN if held.get(name) is not None}
