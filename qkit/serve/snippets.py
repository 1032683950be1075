"""Requests to copy: for curl and for Python."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from qkit.server.process import Server

HELLO = {"role": "user", "content": "Hello"}


def curl(running: Server) -> str:
    """A line to paste into a shell. The key is not in it, but is read from the shell's environment."""
    body = json.dumps({"model": running.name, "messages": [HELLO], "max_tokens": 64})
    key = '-H "Authorization: Bearer $VLLM_API_KEY" ' if running.headers else ""
    return f"curl {running.url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d {shlex.quote(body)}"


def python(running: Server) -> str:
    """The same request in Python, on one line."""
    key = 'os.environ["VLLM_API_KEY"]' if running.headers else '"none"'
    modules = "os, openai" if running.headers else "openai"
    client = f'openai.OpenAI(base_url="{running.url}/v1", api_key={key})'
    arguments = f"model={json.dumps(running.name)}, messages={json.dumps([HELLO])}"
    return f"import {modules}; print({client}.chat.completions.create({arguments}).choices[0].message.content)"


def describe(running: Server, names: Sequence[str]) -> dict[str, Any]:
    """The output of `--json`: the server, its models, and both requests."""
    return {**running.describe(), "models": list(names), "curl": curl(running), "python": python(running)}
