"""The old place of qkit.server.admission, which the command lines of servers, compose files and manifests name."""

from __future__ import annotations

from qkit.server.admission import Admission, main

__all__ = ["Admission"]

if __name__ == "__main__":
    main()
