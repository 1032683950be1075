"""`python -m qkit` is the `qkit` command."""

from __future__ import annotations

from qkit.cli.app import main

if __name__ == "__main__":
    main()
