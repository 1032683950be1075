"""What answers records: an artifact with labels, or one that generates text, opened in this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qkit.chat import template
from qkit.plugins.example import RowError
from qkit.plugins.runtime import Encodes, Generates
from qkit.plugins.task import Prepared, Service

Answer = Mapping[str, Any]
ANSWER_KEYS = ("answer", "finish_reason", "tool_calls", "prompt_tokens", "completion_tokens")  # of generated text


class Predictor(ABC):
    """Answers requests. `window`: how many at once at most; within it they are sorted by length."""

    window: int

    @abstractmethod
    def predict(self, requests: Sequence[Mapping[str, Any]]) -> list[Answer | RowError]:
        """The answer to each request, or why there is none."""

    def names(self, example: Mapping[str, Any]) -> Collection[str]:
        """The keys that answers can have. `example`: a request."""
        (answer,) = self.predict([example])
        return () if isinstance(answer, RowError) else answer.keys()

    def close(self) -> None:
        """Release the model."""


@dataclass
class LabelPredictor(Predictor):
    """An artifact with labels. `options`: of each request, such as top_k."""

    service: Service
    runtime: Encodes
    options: Mapping[str, Any]
    window: int = 2048

    def predict(self, requests: Sequence[Mapping[str, Any]]) -> list[Answer | RowError]:
        prepared = self.service.prepare([{**request, **self.options} for request in requests])
        rows = [row for one in prepared if isinstance(one, Prepared) for row in one.rows]
        logits = iter(self.runtime.logits(rows))
        return [
            self.service.answer(one, [next(logits) for _ in one.rows]) if isinstance(one, Prepared) else one
            for one in prepared
        ]

    def close(self) -> None:
        self.runtime.close()


@dataclass
class ChatPredictor(Predictor):
    """An artifact that generates text, greedily. `stop`: the tokens that end an answer; `runtime` is a Runtime.

    `system`: the turn that training put in front of conversations without one of their own.
    """

    tokenizer: Any
    runtime: Any
    stop: frozenset[int]
    max_new_tokens: int
    batch_size: int = 32
    system: str | None = None
    window: int = 128

    def predict(self, requests: Sequence[Mapping[str, Any]]) -> list[Answer | RowError]:
        prompts = [self._prompt(request) for request in requests]
        asked = [prompt for prompt in prompts if not isinstance(prompt, RowError)]
        runtime: Generates = self.runtime
        answers = iter(runtime.generate(asked, self.max_new_tokens, self.stop, self.batch_size))
        return [prompt if isinstance(prompt, RowError) else self._answer(prompt, next(answers)) for prompt in prompts]

    def _prompt(self, request: Mapping[str, Any]) -> list[int] | RowError:
        messages = request["messages"]
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        try:
            variables = request.get("chat_template_kwargs") or {}
            text = template.render(self.tokenizer, messages, request.get("tools"), variables=variables)
        except template.TemplateRefusal as error:
            return RowError(f"the chat template does not accept its messages: {error}")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _answer(self, prompt: Sequence[int], ids: Sequence[int]) -> Answer:
        ended = bool(ids) and ids[-1] in self.stop
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        return {"answer": text, "finish_reason": "stop" if ended else "length", **usage}

    def names(self, example: Mapping[str, Any]) -> Collection[str]:
        return ANSWER_KEYS

    def close(self) -> None:
        self.runtime.close()
