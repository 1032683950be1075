"""Requests of the OpenAI API: validated, and turned into prompts and sampling parameters for the ONNX server."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qkit.chat import template
from qkit.chat.conversation import NOTHING, call_of, content_of, tools_sent
from qkit.server.onnx_engine import Sampling
from qkit.server.refusal import Refused
from qkit.tasks._conversation.formats import RESERVED

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI has it
MAX_INT32 = 2**31 - 1  # the engine's integers
# What generation_config.json may set, as in vLLM, and the parameter of a request that it corresponds to.
DEFAULTS = {
    **{name: name for name in ("temperature", "top_p", "top_k", "repetition_penalty")},
    "max_new_tokens": "max_tokens",
}
# Parameters that never change an answer, and values of other parameters that do not.
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
    "parallel_tool_calls": (True, False),  # of an answer without calls
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
LOG = logging.getLogger("qkit")


# --- requests -----------------------------------------------------------------------------------------------------------


class GenerationRequest(BaseModel):
    """Parameters that both endpoints know. Others are kept, so that `check` can name them."""

    model_config = ConfigDict(extra="allow")
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=MAX_INT32)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _clean(cls, body: Any) -> Any:
        """Drop parameters whose value means "not given", which clients write for what they leave to the server.

        Raises:
            Refused: a text is not valid Unicode.
        """
        if not isinstance(body, dict):
            return body
        for name, value in body.items():
            _check_unicode(name, value)
        return {name: value for name, value in body.items() if value not in NOTHING or _is_required(cls, name)}

    def with_defaults(self, defaults: ModelDefaults) -> Self:
        """This request, with the model's values for the parameters that it does not give."""
        missing = {name: value for name, value in defaults.sampling.items() if name not in self.model_fields_set}
        return self.model_copy(update=missing)

    def check(self, served: str) -> None:
        """Raise Refused if the request names another model, or a parameter that this server does not support."""
        if self.model != served:
            raise Refused(f"the model `{self.model}` does not exist; this server has `{served}`", "model", 404)
        for name, value in (self.model_extra or {}).items():
            neutral = NEUTRAL.get(name, (False,))  # what is switched off needs no support
            if name not in IDLE and not any(_same(value, one) for one in neutral):
                raise Refused(f"`{name}` is not supported by this server", name)
        if self.seed is not None and self.temperature > 0:
            raise Refused("`seed` is supported by this server only with temperature 0", "seed")

    @property
    def stops(self) -> list[str]:
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]

    @property
    def wanted_tokens(self) -> int | None:
        """The length that the request asks for, or None if it leaves that to the server."""
        return self.max_tokens

    def sampling(self, room: int, default: int) -> Sampling:
        """`room`: the most tokens that the answer may have. `default`: its limit if the request gives none."""
        max_tokens = min(self.wanted_tokens or default, room)
        min_tokens = max_tokens if self.ignore_eos else 0
        top_k = max(self.top_k, 0)
        return Sampling(max_tokens, self.temperature, self.top_p, top_k, min_tokens, self.repetition_penalty)


class Chat(GenerationRequest):
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

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def variables(self) -> dict[str, Any]:
        """The variables of the chat template besides messages and tools. As in vLLM, an effort switches thinking on or off.

        Raises:
            Refused: a variable is reserved, or two of them contradict each other.
        """
        effort = self.reasoning_effort
        variables = {} if effort is None else {"enable_thinking": effort != "none"}
        variables |= self.chat_template_kwargs | ({} if effort is None else {"reasoning_effort": effort})
        if reserved := RESERVED & variables.keys():
            raise Refused(
                f"`chat_template_kwargs` must not contain {', '.join(sorted(reserved))}", "chat_template_kwargs"
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise Refused("`continue_final_message` needs `add_generation_prompt` false", "continue_final_message")
        switches = {"add_generation_prompt": self.add_generation_prompt}
        switches |= {"continue_final_message": True} if self.continue_final_message else {}
        return {**variables, **switches, **({"documents": self.documents} if self.documents else {})}


class Completion(GenerationRequest):
    """POST /v1/completions: one prompt, as text or token ids, or a list that contains one."""

    prompt: Any
    add_special_tokens: bool = True


def tokenize_request(body: Mapping[str, Any], served: str) -> Chat | Completion:
    """The request whose prompt /tokenize shows: a conversation if there are messages, otherwise a prompt.

    Raises:
        ValidationError: the body has neither, or a parameter of the wrong type.
        Refused: a text is not valid Unicode.
    """
    is_chat = body.get("messages") not in NOTHING or ("messages" in body and "prompt" not in body)
    return (Chat if is_chat else Completion).model_validate({"model": served, **body})


def _is_required(request: type[BaseModel], name: str) -> bool:
    """Whether an empty value of a parameter differs from no such parameter: the error must be about the value."""
    return name in request.model_fields and request.model_fields[name].is_required()


def _check_unicode(name: str, value: Any) -> None:
    """JSON can spell half of a surrogate pair, which no tokenizer and no UTF-8 answer can hold.

    Raises:
        Refused: the name or the value of a parameter contains one.
    """
    try:
        json.dumps({name: value}, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        param = name.encode("ascii", "backslashreplace").decode()
        raise Refused(f"`{param}` contains half of a surrogate pair, which is not valid Unicode", param) from None
    except RecursionError:
        raise Refused(f"`{name}` is nested too deeply", name) from None


def _same(value: Any, other: Any) -> bool:
    """Equal, but false is not 0 and true is not 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


# --- prompts ------------------------------------------------------------------------------------------------------------


def template_message(message: Mapping[str, Any], where: str = "messages") -> dict[str, Any]:
    """A message of the API in the form that chat templates read: its content is text, the arguments of its calls are objects.

    Raises:
        Refused: the role is missing, a part of the content is not text, or a call has no function with arguments in JSON.
    """
    if not isinstance(message.get("role"), str):
        raise Refused(f"`{where}.role` is missing, or is not a string", "messages")
    if message.get("function_call"):
        raise Refused(f"`{where}.function_call` is not supported by this server; use `tool_calls`", "messages")
    try:
        content = content_of(message.get("content"), f"`{where}`", "this server reads text")
        calls = [call_of(call) for call in message.get("tool_calls") or ()]
    except ValueError as error:
        raise Refused(f"`{where}`: {error}", "messages") from None
    return {**message, "content": content, "tool_calls": calls}


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """The functions that a request offers, in the form that chat templates read.

    Raises:
        Refused: a tool is not a function with a name, or its description is not a string, or its parameters are not an object.
    """
    for number, tool in enumerate(tools or ()):
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise Refused(f"`tools[{number}]` must have the form {{'type': 'function', 'function': {{...}}}}", "tools")
        for key, kind in (("name", str), ("description", str | None), ("parameters", dict | None)):
            if not isinstance(function.get(key), kind):
                raise Refused(f"`tools[{number}].function.{key}` is missing, or has the wrong type", "tools")
    return tools_sent(tools)


def prompt_ids(tokenizer: Any, request: Chat | Completion) -> list[int]:
    """The token ids that the answer to a request continues.

    Raises:
        Refused: there is no such prompt.
    """
    return chat_prompt(tokenizer, request) if isinstance(request, Chat) else text_prompt(tokenizer, request)


def chat_prompt(tokenizer: Any, request: Chat) -> list[int]:
    """The token ids of a conversation, rendered by the model's chat template as in training.

    Raises:
        Refused: the template rejects these messages.
    """
    messages = [template_message(message, f"messages[{number}]") for number, message in enumerate(request.messages)]
    tools = read_tools(request.tools)
    try:
        text = template.render(tokenizer, messages, tools, variables=request.variables())
    except template.TemplateRefusal as error:
        raise Refused(f"the chat template does not accept these `messages`: {error}", "messages") from None
    ids: list[int] = tokenizer(text, add_special_tokens=request.add_special_tokens)["input_ids"]
    return ids


def text_prompt(tokenizer: Any, request: Completion) -> list[int]:
    """The token ids of a prompt that is text or token ids.

    Raises:
        Refused: it is neither, there are several, or an id is not in the vocabulary.
    """
    prompt: Any = request.prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise Refused("`prompt`: this server supports one prompt per request", "prompt")
        prompt = prompt[0]
    if isinstance(prompt, str):
        prompt = tokenizer(prompt, add_special_tokens=request.add_special_tokens)["input_ids"]
    if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
        raise Refused("`prompt` must be text, token ids, or a list that contains one of these", "prompt")
    if not prompt or not all(0 <= token < len(tokenizer) for token in prompt):
        raise Refused("`prompt` is empty, or contains ids that are not in the vocabulary", "prompt")
    return prompt


# --- defaults of the model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelDefaults:
    """What generation_config.json sets, as vLLM reads it.

    `sampling`: values for parameters that a request does not give. `max_new_tokens`: a limit for all answers.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None


def model_defaults(folder: Path) -> ModelDefaults:
    """The defaults in a model folder. A value that a request could not have is ignored; the log names it."""
    file = folder / "generation_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if config.get("min_p"):
        LOG.warning("%s: min_p=%r is ignored: this server does not support it", file, config["min_p"])
    values = {name: _default(file, name, config[name]) for name in DEFAULTS if config.get(name) is not None}
    values = {name: value for name, value in values.items() if value is not None}
    return ModelDefaults(max_new_tokens=values.pop("max_new_tokens", None), sampling=values)


def _default(file: Path, name: str, value: Any) -> Any:
    """A value of generation_config.json, converted as the same value of a request would be; None if it is invalid."""
    parameter = DEFAULTS[name]
    try:
        return getattr(GenerationRequest.model_validate({"model": "", parameter: value}), parameter)
    except (ValidationError, Refused) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        LOG.warning("%s: %s=%r is ignored: %s", file, name, value, problem)
        return None
