"""What the user asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Job:
    """Whom to talk to. `target`: a run, a model's folder or a URL. `artifact`: of a run; `model`, `key`: of a server.

    `sampling`: parameters of a request that were given (temperature, top_p, top_k, max_tokens, seed); the model's defaults fill the rest.
    `beside`: what answers each question too.
    """

    target: str
    artifact: str | None = None
    model: str | None = None
    key: str = ""
    system: str | None = None
    beside: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
