"""The error that qkit's own servers answer a request with."""

from __future__ import annotations


class Refused(Exception):
    """A request that gets an error instead of an answer. `param`: the parameter that is at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param = param
        self.status = status
