"""The contracts of what can be added with one file: a task, an exporter, a runtime.

The files belong in tasks/, export/formats/ and runtimes/; the name of the file is the name that recipes use (of a format, the part before
the dash). Imports recipe and core.
Start with the contract that you want to implement.
"""
