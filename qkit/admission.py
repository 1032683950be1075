"""Another name for qkit.server.admission: command lines of servers, compose files and manifests use it."""

from __future__ import annotations

from qkit.server.admission import Admission, main

__all__ = ["Admission"]

if __name__ == "__main__":
    main()
