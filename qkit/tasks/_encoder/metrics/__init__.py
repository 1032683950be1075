"""Metrics and their bootstrap intervals. In: references and predictions of the same rows. Out: figures by name, and how far chance moves them.

classes.py, regression.py and entities.py make a `Sample` of the rows; resampling.py computes its figures on the rows and on resamples of them.
Start with resampling.py.
"""
