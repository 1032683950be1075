"""What several stages measure with: scores, distances to the model as trained, limits, and the contract of a server.

In: held-out rows and an open runtime. Out: figures with intervals, and verdicts. merge, export, verify and bench import it.
Start with parity.py (the distance) and gates.py (the limits).
"""
