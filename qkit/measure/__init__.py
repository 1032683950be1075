"""What several stages measure with: scores, distances to the model as trained, limits, and the contract of a server.

In: held-out rows and an open runtime. Out: figures with intervals, and verdicts. evaluate, merge, export, serve, verify,
bench and report import it. Start with parity.py (the distance) and gates.py (which limits apply; the figures are a task's GATES).
"""
