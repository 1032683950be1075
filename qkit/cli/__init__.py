"""The command line: verbs, options, what is printed, exit codes. Nothing else prints or exits.

In: argv. Out: a call of one function below, and its result on the screen or as JSON. Start with app.py.
"""
