"""Asking somebody else's service, the hub or a server: whatever goes wrong there is one message, and no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qkit.core.errors import QkitError, UserError

SAID_CHARACTERS = 300
HUB_SECONDS = 120.0  # for the hub to say or take something
ADDRESS = "is the server up, and is this its address?"  # the remedy, where a server is asked


@contextmanager
def reaching(kind: type[UserError], what: str, remedy: str) -> Iterator[None]:
    """For a block that does nothing but ask, and read the answer.

    What a service can do to its client has no common base: the hub's client raises errors of two HTTP libraries and of none, and an answer
    that is not what it should be ends in whatever reads it.

    Raises:
        kind: something went wrong; `what` says what was asked for, `remedy` what to do.
    """
    try:
        yield
    except QkitError:
        raise
    except Exception as error:
        raise kind(f"{what} ({said(error)}); {remedy}") from error


@contextmanager
def reaching_hub(kind: type[UserError], what: str, remedy: str) -> Iterator[None]:
    """The same of the hub, whose client by itself waits for ever for an answer.

    Raises:
        kind: as `reaching`.
    """
    with reaching(kind, what, remedy):
        from huggingface_hub import get_session

        get_session().timeout = HUB_SECONDS
        yield


def said(error: BaseException) -> str:
    """An error in one line: its kind and its words."""
    words = " ".join(str(error).split())[:SAID_CHARACTERS]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def part(document: Any, *way: str | int) -> Any:
    """What lies in a JSON document behind these keys and numbers.

    Raises:
        ValueError: it has no such place.
    """
    found = document
    for step in way:
        try:
            found = found[step]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"its answer has no {'.'.join(map(str, way))}: {str(document)[:80]}") from None
    return found


def models(document: Any) -> list[dict[str, Any]]:
    """The entries of an answer to /v1/models; each has an `id`.

    Raises:
        ValueError: it is no such answer.
    """
    entries = part(document, "data")
    if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get("id"), str) for e in entries):
        raise ValueError(f"its answer is no list of models: {str(document)[:80]}")
    return entries
