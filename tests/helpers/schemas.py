"""The JSON schemas of what qkit writes."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

SHOW_SCHEMA = json.loads(resources.files("qkit.report").joinpath("show.schema.json").read_text(encoding="utf-8"))
BENCH_SCHEMA = json.loads(resources.files("qkit.bench").joinpath("bench.schema.json").read_text(encoding="utf-8"))
FREE = {"environment", "device"}  # what they hold depends on the machine


def closed(schema: Any, name: str = "") -> Any:
    """The schema with every record closed, so that a key that it does not name is an error here, and only here."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: closed(value, key) for key, value in schema.items()}
    if "properties" in schema and isinstance(schema.get("type"), str) and name not in FREE:
        copy.setdefault("additionalProperties", False)
    return copy
