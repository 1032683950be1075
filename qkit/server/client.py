"""The client of OpenAI-compatible servers: one place that cleans up URLs, sends keys, sets timeouts and translates errors.

`httpx` is imported when a client is made, so that commands that contact no server start without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from qkit.core.errors import QkitError, ServerError
from qkit.core.files import read_json
from qkit.core.network import describe
from qkit.run.directory import Run

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

REQUEST_SECONDS = 60.0
HEALTH_SECONDS = 5.0
CHECK_URL = "is the server up, and is this its address?"  # the remedy, unless a caller knows a better one
ANSWER_CHARACTERS = 300  # of a refused request's answer, for the message


def root_url(url: str) -> str:
    """The URL of a server without a trailing slash or `/v1`: both spellings name the same server."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def bearer(key: str | None) -> dict[str, str]:
    """The header that carries an API key; empty without a key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


class Client:
    """Connections to the server at `url`. Use it as a context manager, or call `close`. Threads may share it.

    `remedy` ends the message of an error: what the user can do when the server does not answer.

    Raises, from every method but `is_healthy`:
        ServerError: the URL is malformed, or the server cannot be reached, refuses, or does not speak the OpenAI API.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        timeout: float = REQUEST_SECONDS,
        remedy: str = CHECK_URL,
    ):
        import httpx

        self.url = root_url(url)
        self.remedy = remedy
        with self._translated("has a malformed URL"):
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def send(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """The answer to a request, whatever its status."""
        with self._translated("does not answer"):
            return self._http.request(method, path, json=body)

    def request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """The answer to a request that must succeed."""
        return self.expect_ok(self.send(method, path, body))

    def streamed(self, path: str, body: Any) -> Iterator[bytes]:
        """The parts of the answer to a POST as they arrive; it must succeed. Closing the iterator early closes the connection."""
        with self._translated("does not answer"), self._http.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                answer.read()
            yield from self.expect_ok(answer).iter_bytes()

    def expect_ok(self, answer: httpx.Response) -> httpx.Response:
        """`answer`, if its status is 200; otherwise its text is in the error."""
        if answer.status_code == 200:
            return answer
        text = " ".join(answer.text.split())[:ANSWER_CHARACTERS]
        message = f"the server at {self.url} answered {answer.status_code} to {answer.request.url.path}: {text}"
        raise ServerError(message, url=self.url, status=answer.status_code, reason=text)

    def read(self, answer: httpx.Response, pick: Callable[[Any], T]) -> T:
        """What `pick` takes out of the JSON of an answer. Whatever `pick` raises means that the answer has another form."""
        with self._translated("does not answer as the OpenAI API specifies"):
            return pick(answer.json())

    def models(self) -> list[dict[str, Any]]:
        """The entries of /v1/models."""
        return self.read(self.request("GET", "/v1/models"), model_entries)

    def entry(self, model: str | None) -> dict[str, Any]:
        """The entry of a model in /v1/models; None: of the first. A server that does not have it is an error."""
        entries = self.models()
        found = next((one for one in entries if model in (None, one["id"])), None)
        if found is None:
            names = ", ".join(one["id"] for one in entries) or "nothing"
            raise ServerError(f"{self.url} does not serve {model or 'a model'}, but {names}", url=self.url)
        return found

    def is_healthy(self) -> bool:
        """Whether /health answers 200. A server that cannot be reached is not healthy, which is not an error."""
        try:
            return self.send("GET", "/health").status_code == 200
        except ServerError:
            return False

    @contextmanager
    def _translated(self, problem: str) -> Iterator[None]:
        """Errors of httpx and of JSON readers share no base class, so every error inside becomes a ServerError."""
        try:
            yield
        except QkitError:
            raise
        except Exception as error:
            reason = describe(error)
            message = f"the server at {self.url} {problem} ({reason}); {self.remedy}"
            raise ServerError(message, url=self.url, reason=reason) from error


def json_at(document: Any, *path: str | int) -> Any:
    """The value at `path` (keys and indices) in a JSON document.

    Raises:
        ValueError: there is no such path.
    """
    value = document
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{'.'.join(map(str, path))} is missing: {str(document)[:80]}") from None
    return value


def model_entries(document: Any) -> list[dict[str, Any]]:
    """The entries of an answer to /v1/models; each has an `id`.

    Raises:
        ValueError: the document is not a list of models.
    """
    entries = json_at(document, "data")
    if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get("id"), str) for e in entries):
        raise ValueError(f"not a list of models: {str(document)[:80]}")
    return entries


def running_server(run: Run) -> dict[str, object] | None:
    """The description of the server that the serve stage has up for this run at the moment, or None."""
    import psutil

    note = run.root / ".work" / "serve" / "server.json"
    if not note.exists():
        return None
    description: dict[str, object] = read_json(note)
    if not psutil.pid_exists(int(str(description["pid"]))):
        return None  # left behind by a run that was killed; another program may have the port by now
    with Client(str(description["url"]), timeout=HEALTH_SECONDS) as client:
        return description if client.is_healthy() else None
