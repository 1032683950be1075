"""The environment: `make setup` creates it, and `qkit doctor` tests it; further environments for programs that need other versions.

In: the machine. Out: a virtual environment; a report. Start with doctor.py. bootstrap.py runs on its own, before qkit is installed.
"""
