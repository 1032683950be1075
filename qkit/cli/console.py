"""Output to the terminal: results and progress, without what libraries print."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from qkit.core.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console


def stderr(keep: bool = False) -> Console:
    """A console on stderr, without markup. With `keep`, it still writes to the terminal after fd 2 has been redirected to a log."""
    from rich.console import Console

    return Console(file=duplicate(2) if keep else sys.stderr, markup=False)


class _Closing(io.TextIOWrapper):
    """A file that closes when nobody holds it any more."""

    def __del__(self) -> None:
        self.close()


def duplicate(descriptor: int) -> TextIO:
    """What is written to it goes where the descriptor leads now, also after that is redirected."""
    return _Closing(os.fdopen(os.dup(descriptor), "wb"))


def show(as_json: bool, value: Any, screen: Callable[[], Any]) -> None:
    """Print a result on stdout: `value` as one JSON document, or what `screen` returns, as text."""
    if as_json:
        print(json.dumps(value, indent=1))
        return
    from rich.console import Console

    drawn = screen()
    Console(markup=False).print(drawn, highlight=False, soft_wrap=isinstance(drawn, str))


def progress_on(console: Console, quiet: bool) -> Progress:
    """Progress as bars on a terminal, as plain lines in a log, or not at all with `quiet`."""
    from qkit.cli.progress_bars import Bars, Lines

    if quiet:
        return Progress()
    return Bars(console) if console.is_terminal else Lines(console)


def quiet_libraries() -> None:
    """Turn off the progress bars of libraries, which would fill a log, and set the log format."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DATASETS_DISABLE_PROGRESS_BARS", "1")
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


@contextmanager
def silence_stderr() -> Iterator[None]:
    """Discard what libraries write to fd 2 inside the block; exceptions pass through."""
    quiet_libraries()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    sys.stderr.flush()
    try:
        os.dup2(null, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


@contextmanager
def until_interrupted() -> Iterator[None]:
    """End the block without an error on Ctrl-C or SIGTERM, even if the parent shell started this process with SIGINT ignored."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
