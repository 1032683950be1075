"""Programs that qkit starts and that must not outlive it.

A server runs below a small guard (this file, run as a program) that reads its standard input. When qkit ends for any reason, `kill -9`
included, the pipe closes and the guard ends the server's whole process group. vLLM ignores SIGTERM while it starts and runs its engine in
further processes, hence the group, and SIGKILL after a grace period.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

GRACE_SECONDS = 10.0  # for the program, between SIGTERM and SIGKILL
TIDY_SECONDS = 3.0  # for the processes that it started, after it has ended


class Child:
    """A program in its own process group. Its output goes to a log file."""

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None):
        guard = [sys.executable, "-I", str(Path(__file__).resolve()), *argv]
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                guard,
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=sink,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def running(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> int:
        """End the program and everything that it started. Returns its exit status."""
        if self.process.stdin and not self.process.stdin.closed:
            self.process.stdin.close()
        return self.process.wait(timeout=2 * GRACE_SECONDS)


def run_to_end(argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a program until it ends; it dies with this process. Returns its exit status and its output, which is appended to `log`."""
    begin = log.stat().st_size if log.exists() else 0
    with log.open("ab") as sink:
        completed = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env={**os.environ, **(env or {})},
            preexec_fn=kill_when_parent_dies(),
            check=False,
        )
    return completed.returncode, log.read_bytes()[begin:].decode(errors="replace").replace("\r", "\n")


def die_with_parent(reads_stdin: bool = False) -> None:
    """Make a stage's process end when the `qkit run` that started it ends. Called before anything else.

    The parent holds the other end of standard input. A stage that reads standard input itself (`reads_stdin`) notices the end by itself.
    On Linux, the kernel also kills the process, immediately and even while the interpreter is busy.
    """
    if request := kill_when_parent_dies():
        request()
    if reads_stdin:
        return

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                continue
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def kill_when_parent_dies() -> Callable[[], None] | None:
    """A function for `preexec_fn`: it asks Linux to kill the calling process when its parent dies. None on other systems."""
    if sys.platform != "linux":
        return None
    import ctypes

    libc = ctypes.CDLL(None)  # loaded here, since few calls are safe between fork and exec
    return lambda: libc.prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def _guard(argv: Sequence[str]) -> int:
    """Run `argv` until it ends or standard input closes; then end the rest of the process group."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # only the pipe ends it
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, preexec_fn=_default_signals)

    def watch() -> None:
        while os.read(0, 4096):
            continue
        child.terminate()
        try:
            child.wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()

    threading.Thread(target=watch, daemon=True).start()
    status = child.wait()
    if status < 0:  # a killed program cannot log this itself
        sys.stdout.write(f"ended by {signal.Signals(-status).name}, exit code: {status}\n")
        sys.stdout.flush()
    _end_group()
    return status if status >= 0 else 128 - status


def _default_signals() -> None:
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)


def _end_group() -> None:
    """Wait briefly for the rest of our process group, then send SIGKILL to what is left of it.

    The trackers of shared memory come last: they free it once its users have ended, killed or not.
    """
    for find in (_without_trackers, _others):
        deadline = time.monotonic() + TIDY_SECONDS
        while find() and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in find():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _without_trackers() -> list[int]:
    """The other processes of our group, except Python's trackers of shared memory."""
    return [pid for pid in _others() if b"resource_tracker" not in _command_line(pid)]


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""  # it has ended


def _others() -> list[int]:
    """The other processes of our group that have not ended."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            state, _, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(group) == os.getpgrp() and int(folder.name) != os.getpid() and state != "Z":
                pids.append(int(folder.name))
    return pids


if __name__ == "__main__":
    raise SystemExit(_guard(sys.argv[1:]))
