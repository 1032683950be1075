"""What answers a conversation: a model in this process. servers.py has the other kind."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qkit.chat import template
from qkit.commands.talk.reply import Reply
from qkit.commands.talk.sampling import next_token
from qkit.core.errors import UserError, short
from qkit.server.onnx_requests import GenerationRequest, ModelDefaults
from qkit.server.onnx_text import Text

if TYPE_CHECKING:
    from qkit.runtimes._continued import Continuation
    from qkit.server.onnx_engine import Sampling

Turn = Mapping[str, Any]


class Speaker(ABC):
    """Answers a conversation."""

    @abstractmethod
    def answer(self, messages: Sequence[Turn], reply: Reply, attempt: int) -> Iterator[str]:
        """Yield the answer's text as it is generated, and note all that is known of it in `reply`, also where it is interrupted.

        `attempt`: how often this answer was asked for before; with a seed, each attempt has its own random numbers.

        Raises:
            UserError: the conversation cannot be answered, such as one that is too long.
        """

    def close(self) -> None:
        """Release the model."""


@dataclass(frozen=True)
class Local(Speaker):
    """A model in this process, prompted with the token ids of training.

    `stop`: the tokens that end an answer; `limit`: tokens of prompt and answer; `given`, `defaults`: sampling, as a server has them.
    """

    tokenizer: Any
    text: Continuation
    stop: frozenset[int]
    limit: int
    given: Mapping[str, Any]
    defaults: ModelDefaults
    release: Callable[[], None] = lambda: None

    def answer(self, messages: Sequence[Turn], reply: Reply, attempt: int) -> Iterator[str]:
        import numpy as np

        begin, before = time.perf_counter(), self.text.computed
        prompt = prompt_ids(self.tokenizer, messages)
        sampling = self._sampling(len(prompt))
        seed = self.given.get("seed")
        random = np.random.default_rng(None if seed is None else [seed, attempt])
        ids, decoded = list(prompt), Text(self.tokenizer, ())
        reply.prompt_tokens, reply.tokens = len(prompt), 0
        try:
            for _ in range(sampling.max_tokens):
                ids.append(next_token(self.text.logits_after(ids), sampling, ids, random))
                reply.tokens += 1
                if reply.first_seconds is None:
                    reply.first_seconds = time.perf_counter() - begin
                    reply.computed_tokens = self.text.computed - before
                if ids[-1] in self.stop:
                    reply.reason = "stop"
                    break
                yield from _noted(decoded.add(ids[-1]), reply)
            reply.reason = reply.reason or "length"
            yield from _noted(decoded.end(), reply)
        finally:
            reply.seconds = time.perf_counter() - begin

    def _sampling(self, prompt_tokens: int) -> Sampling:
        """How this answer is sampled: as `qkit serve` would for a request with these parameters.

        Raises:
            UserError: the conversation leaves no room for an answer.
        """
        room = self.limit - prompt_tokens
        if room < 1:
            raise UserError(
                f"the conversation has {prompt_tokens:,} tokens, and the model reads {self.limit:,} at most; /reset begins a new one"
            )
        request = parameters(self.given).with_defaults(self.defaults)
        return request.sampling(min(room, self.defaults.max_new_tokens or room), room)

    def close(self) -> None:
        self.release()


def _noted(piece: str, reply: Reply) -> Iterator[str]:
    if piece:
        reply.text += piece
        yield piece


def parameters(given: Mapping[str, Any]) -> GenerationRequest:
    """The parameters as those of a request.

    Raises:
        UserError: one has a value that no server takes.
    """
    try:
        return GenerationRequest.model_validate({"model": "", **given})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        raise UserError(f"--{name.replace('_', '-')} {short(given[name])}: {first['msg']}") from None


def prompt_ids(tokenizer: Any, messages: Sequence[Turn]) -> list[int]:
    """The token ids of a conversation up to where the answer begins: those of training.

    Raises:
        UserError: the chat template refuses it.
    """
    try:
        text = template.render(tokenizer, messages)
    except template.TemplateRefusal as error:
        raise UserError(f"the chat template does not accept this conversation: {error}") from None
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
