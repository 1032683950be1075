"""Kinds of task: one file each, whose name is what a recipe's `task` says. The contract is plugins/task.py.

In: a record of a data set. Out: an example, and whether an answer to it is right. No task imports another. Start with chat.py.
"""
