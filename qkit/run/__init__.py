"""The run directory: one folder for each stage, and the manifest.

In: a recipe. Out: `Run` (directory.py), through which every stage finds its inputs and leaves its outputs. Imports recipe and core.
Start with directory.py; stages.py is the table of the stages.
"""
