"""The recipe: what to train, on what, and what to make of it.

In: a YAML file and `--set` overrides. Out: a frozen `Recipe` (schema.py), or one error with every problem in it. Only core lies below.
Start with schema.py; load.py reads a file, checks.py and idle.py refuse values that cannot stand together or that nothing would use.
"""
