"""The server of a run that is up now."""

from __future__ import annotations

from qkit.core.files import read_json
from qkit.run.directory import Run


def live_server(run: Run) -> dict[str, object] | None:
    """The server that the stage `serve` has up for this run right now, or None."""
    import httpx
    import psutil

    note = run.root / ".work" / "serve" / "server.json"
    if not note.exists():
        return None
    described: dict[str, object] = read_json(note)
    if not psutil.pid_exists(int(str(described["pid"]))):
        return None  # left by a run that was killed; by now its port may be somebody else's
    try:
        healthy = httpx.get(f"{described['url']}/health", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return None
    return described if healthy else None
