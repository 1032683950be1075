"""One file per verb, or per group of similar verbs; each has an `app` with its commands.

In: parsed options. Out: one call into a package below qkit.cli, and its result on the screen. Only app.py imports these files, and only when
the verb is used; `qkit --help` imports none.
"""
