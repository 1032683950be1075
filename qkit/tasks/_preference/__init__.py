"""The task on pairs of answers: which of two answers to one prompt is preferred.

A record goes through reading.py (record -> two conversations) and encoder.py (-> one row that holds the prompt once, and both answers).
checks.py says what can be wrong with pairs, and scoring.py measures a model by them. Start with ../preference.py.
"""
