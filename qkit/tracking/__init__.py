"""Experiment trackers: what train.report_to names receives the recipe, every figure of training, and the scores.

In: a recipe, and the events of a trainer. Out: runs in the trackers, whose local files are in RUN/trackers. train, evaluate and the pipeline
import it. Start with reporting.py; trackers.py lists what is known of each tracker.
"""
