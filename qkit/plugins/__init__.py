"""What can be added by adding one file: the contracts of a task, an exporter and a runtime.

The files are in tasks/, export/formats/ and runtimes/; a file's name is the name that recipes use. Imports recipe and core.
Start with the contract you mean to fulfil.
"""
