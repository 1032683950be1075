"""Requests to copy: curl and Python."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from qkit.server.process import Server

# --- saying -------------------------------------------------------------------------------------------------------------

HELLO = {"role": "user", "content": "Hello"}


def curl(running: Server) -> str:
    """A line to paste into a shell. The key stays where it is: in the shell's environment."""
    body = json.dumps({"model": running.name, "messages": [HELLO], "max_tokens": 64})
    key = '-H "Authorization: Bearer $VLLM_API_KEY" ' if running.headers else ""
    return f"curl {running.url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d {shlex.quote(body)}"


def python(running: Server) -> str:
    """The same for Python, in one line."""
    key = 'os.environ["VLLM_API_KEY"]' if running.headers else '"none"'
    modules = "os, openai" if running.headers else "openai"
    client = f'openai.OpenAI(base_url="{running.url}/v1", api_key={key})'
    asked = f"model={json.dumps(running.name)}, messages={json.dumps([HELLO])}"
    return f"import {modules}; print({client}.chat.completions.create({asked}).choices[0].message.content)"


def describe(running: Server, names: Sequence[str]) -> dict[str, Any]:
    """The same, for `--json`."""
    return {**running.describe(), "models": list(names), "curl": curl(running), "python": python(running)}
