"""The merge stage: makes the merges that a recipe allows, measures each against the adapter, and keeps the best.

In: base and adapter. Out: RUN/merge/, a whole model folder. The weights are merged by qkit/merging. Start with stage.py.
"""
