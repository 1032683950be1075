"""One file for each verb, or for a few that are alike; each has an `app` with its commands.

In: parsed options. Out: one call into a package below qkit.cli, and its result on the screen. app.py imports a file only when its verb is
used; `qkit --help` imports none.
"""
