"""`python -m qkit` is the `qkit` command."""

from qkit.cli import main

if __name__ == "__main__":
    main()
