"""What answers records: a server at a URL, asked by several clients at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qkit.commands.predict.predictors import ANSWER_KEYS, Answer, Predictor
from qkit.plugins.example import RowError
from qkit.plugins.task import Task
from qkit.server.client import Client, json_at

CLIENTS = 8
TEXTS = 32  # of a request
TOO_BUSY = (429, 503)


class LabelServerPredictor(Predictor):
    """A server with a task's endpoint. Texts of similar length share a request."""

    window = 2048

    def __init__(self, client: Client, model: str, task: Task, options: Mapping[str, Any]):
        self.client, self.model, self.task, self.options = client, model, task, options

    def predict(self, requests: Sequence[Mapping[str, Any]]) -> list[Answer | RowError]:
        order = sorted(range(len(requests)), key=lambda place: sum(len(str(text)) for text in requests[place].values()))
        parts = [order[begin : begin + TEXTS] for begin in range(0, len(order), TEXTS)]
        results: dict[int, Answer | RowError] = {}
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = pool.map(lambda part: self._together([requests[place] for place in part]), parts)
            for part, of_part in zip(parts, answers, strict=True):
                results.update(zip(part, of_part, strict=True))
        return [results[place] for place in range(len(requests))]

    def _together(self, requests: Sequence[Mapping[str, Any]]) -> list[Answer | RowError]:
        """The answers to requests that are sent as one; each alone if the server refuses one of them."""
        inputs = [_input(one) for one in requests]
        body = {"model": self.model, "input": inputs, **self.options}
        answer = self.client.send("POST", self.task.ENDPOINT, body)
        if answer.status_code == 400 and len(requests) > 1:
            return [each for one in requests for each in self._together([one])]
        if answer.status_code == 400:
            return [RowError(_reason(answer))]
        data = self.client.read(self.client.expect_ok(answer), lambda document: list(json_at(document, "data")))
        return [{name: value for name, value in item.items() if name != "index"} for item in data]

    def close(self) -> None:
        self.client.close()


def _input(request: Mapping[str, Any]) -> Any:
    """A request as an entry of `input`: one text as itself, which vLLM understands too."""
    text, *more = request.values()
    return text if isinstance(text, str) and not more else dict(request)


class ChatServerPredictor(Predictor):
    """A server of the OpenAI API, asked greedily."""

    window = 256

    def __init__(self, client: Client, model: str, max_new_tokens: int):
        self.client, self.model, self.max_new_tokens = client, model, max_new_tokens

    def predict(self, requests: Sequence[Mapping[str, Any]]) -> list[Answer | RowError]:
        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(self._answer, requests))

    def names(self, example: Mapping[str, Any]) -> Collection[str]:
        return ANSWER_KEYS

    def _answer(self, request: Mapping[str, Any]) -> Answer | RowError:
        body = {"model": self.model, "temperature": 0, "max_tokens": self.max_new_tokens, **request}
        answer = self.client.send("POST", "/v1/chat/completions", body)
        if answer.status_code == 400:
            return RowError(_reason(answer))
        return self.client.read(self.client.expect_ok(answer), _of_chat)

    def close(self) -> None:
        self.client.close()


def _of_chat(document: Any) -> Answer:
    choice, usage = json_at(document, "choices", 0), document.get("usage") or {}
    message = json_at(choice, "message")
    calls = {"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {}
    counts = {name: usage[name] for name in ("prompt_tokens", "completion_tokens") if name in usage}
    return {"answer": message.get("content") or "", "finish_reason": choice.get("finish_reason"), **calls, **counts}


def _reason(answer: Any) -> str:
    """What a server says is wrong with a request."""
    try:
        return str(json_at(answer.json(), "error", "message"))
    except ValueError:
        return " ".join(answer.text.split())[:300]


def endpoints(client: Client, entry: Mapping[str, Any], tasks: Mapping[str, Task]) -> Iterator[str]:
    """The tasks whose endpoint a server has: the one that its entry of the model names, or those that do not answer 404.

    Raises:
        ServerError: the server does not answer.
    """
    for name, task in tasks.items():
        named = entry.get("task")
        if named == name or (named is None and client.send("POST", task.ENDPOINT, {}).status_code not in (404, 405)):
            yield name
