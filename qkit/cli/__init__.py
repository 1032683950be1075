"""The command line: verbs, options, what is printed, exit codes. No other package prints or exits.

In: argv. Out: a call of one function in a package below, its result on stdout as text or JSON, and an exit code. Start with app.py, which
maps each verb to its file in verbs/; a verb's own options are declared in that file, shared ones in options.py.
"""
