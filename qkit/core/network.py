"""Requests to remote services: whatever goes wrong there becomes one message without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qkit.core.errors import QkitError, UserError

REASON_CHARACTERS = 300
HUB_SECONDS = 120.0  # timeout of a request to the hub


@contextmanager
def reaching(kind: type[UserError], what: str, remedy: str) -> Iterator[None]:
    """For a block that only sends a request and reads its answer.

    The errors of a service's client have no common base class: the hub's client raises those of two HTTP libraries and its own, and an
    unexpected answer fails in whatever code reads it.

    Raises:
        kind: something went wrong. `what` names the request, `remedy` what the user can do.
    """
    try:
        yield
    except QkitError:
        raise
    except Exception as error:
        raise kind(f"{what} ({describe(error)}); {remedy}") from error


@contextmanager
def reaching_hub(kind: type[UserError], what: str, remedy: str) -> Iterator[None]:
    """The same for the hub, with a timeout: its client waits indefinitely by default.

    Raises:
        kind: as in `reaching`.
    """
    with reaching(kind, what, remedy):
        from huggingface_hub import get_session

        get_session().timeout = HUB_SECONDS
        yield


def describe(error: BaseException) -> str:
    """An error on one line: its type and its message."""
    message = " ".join(str(error).split())[:REASON_CHARACTERS]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
