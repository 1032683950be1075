"""The serve stage and `qkit serve`: a server for a run, a folder or a hub id.

In: an artifact and recipe.serve. Out: a server that has been checked against the run, or its manifests for other machines.
Start with serving.py (what is served), lifecycle.py (how), stage.py (the stage in a run).
"""
