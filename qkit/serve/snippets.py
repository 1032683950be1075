"""Requests to copy: for curl and for Python."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from qkit.model.provenance import Purpose
from qkit.plugins.task import Task, open_task
from qkit.server.process import Server

HELLO = {"role": "user", "content": "Hello"}


def curl(running: Server, purpose: Purpose | None = None) -> str:
    """A line to paste into a shell. The key is not in it, but is read from the shell's environment."""
    path, body = "/v1/chat/completions", json.dumps({"model": running.name, "messages": [HELLO], "max_tokens": 64})
    if purpose:
        task = open_task(purpose.task)
        path, body = task.ENDPOINT, json.dumps({"model": running.name, "input": _input(task)})
    key = '-H "Authorization: Bearer $VLLM_API_KEY" ' if running.headers else ""
    return f"curl {running.url}{path} {key}-H 'Content-Type: application/json' -d {shlex.quote(body)}"


def python(running: Server, purpose: Purpose | None = None) -> str:
    """The same request in Python, on one line."""
    if purpose:
        return _post(running, open_task(purpose.task))
    key = 'os.environ["VLLM_API_KEY"]' if running.headers else '"none"'
    modules = "os, openai" if running.headers else "openai"
    client = f'openai.OpenAI(base_url="{running.url}/v1", api_key={key})'
    arguments = f"model={json.dumps(running.name)}, messages={json.dumps([HELLO])}"
    return f"import {modules}; print({client}.chat.completions.create({arguments}).choices[0].message.content)"


def _post(running: Server, task: Task) -> str:
    headers = ', headers={"Authorization": "Bearer " + os.environ["VLLM_API_KEY"]}' if running.headers else ""
    modules, body = "os, httpx" if running.headers else "httpx", {"input": _input(task)}
    return f'import {modules}; print(httpx.post("{running.url}{task.ENDPOINT}", json={body}{headers}).json()["data"])'


def _input(task: Task) -> Any:
    """The task's example as the input of a request: one text as itself, as vLLM takes it."""
    return next(iter(task.EXAMPLE.values())) if len(task.EXAMPLE) == 1 else dict(task.EXAMPLE)


def describe(running: Server, names: Sequence[str], purpose: Purpose | None = None) -> dict[str, Any]:
    """The output of `--json`: the server, its models, and both requests."""
    requests = {"curl": curl(running, purpose), "python": python(running, purpose)}
    return {**running.describe(), "models": list(names), **requests}
