"""Verbs that go across stages: a first recipe for a data set, merging anybody's adapters, comparing two artifacts, the training benchmark.

In: folders and hub ids. Out: what the stages would make and say. May import stages; only the command line imports it.
"""
