"""What a hub or a server can do to those who ask it: hang up, say nothing, or answer with what is no answer."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ANSWERS = {"page": b"<html>log in first</html>", "list": b"[1, 2]", "object": b"{}", "null": b"null"}
FAULTS = ("refused", "reset", "no HTTP", *ANSWERS)


@contextmanager
def failing(fault: str) -> Iterator[str]:
    """Its address. `silent` takes connections and says nothing; the others are FAULTS."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if fault == "refused":
            listening.close()
            yield address
            return
        held: list[socket.socket] = []
        threading.Thread(target=_serve, args=(listening, fault, held), daemon=True).start()
        try:
            yield address
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for one in held:
                one.close()


def _serve(listening: socket.socket, fault: str, held: list[socket.socket]) -> None:
    while True:
        try:
            asked, _ = listening.accept()
        except OSError:
            return
        held.append(asked)
        if fault != "silent":
            _answer(asked, fault)


def _answer(asked: socket.socket, fault: str) -> None:
    try:
        asked.recv(65536)
        if fault == "reset":
            asked.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif fault == "no HTTP":
            asked.sendall(b"\x00\x01220 mail ready\r\n\r\n")
        else:
            body = ANSWERS[fault]
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            asked.sendall(head.encode() + body)
    except OSError:
        pass  # it has gone away
    asked.close()
