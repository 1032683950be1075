"""Kinds of task: one file each, whose name is what a recipe's `task` says. The contract is plugins/task.py, docs/tasks.md shows how to add one.

In: a record of a data set. Out: everything that depends on the kind of task, from a row's columns to the limits of an artifact's distance.
No task imports another; what several share is in a folder _FAMILY/. Start with chat.py, then _conversation/task.py, which it extends.
"""
