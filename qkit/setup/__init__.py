"""The environment: made by `make setup`, tried by `qkit doctor`; extra environments for programs that need other versions.

In: the machine. Out: a virtual environment, a report. Start with doctor.py. bootstrap.py runs on its own, before qkit is installed.
"""
