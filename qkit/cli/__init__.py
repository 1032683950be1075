"""The command line: verbs, options, output and exit codes. No other package prints or exits.

In: argv. Out: one call into a package below, its result on stdout as text or JSON, and an exit code. Nothing imports this package. Start
with app.py, which maps each verb to its file in verbs/. A verb's own options are declared in that file, shared ones in options.py.
"""
