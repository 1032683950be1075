"""What reports, screens and cards of runs with labels show, as plain data of plugins/sections.py.

In: the trained model's lines of predictions.jsonl and its metrics. Out: figures beside the score, and sections. Start with labels.py, whose
parts the others use; several.py is for texts with any number of labels, numbers.py for numbers.
"""
