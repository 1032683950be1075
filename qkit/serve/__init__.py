"""The serve stage and `qkit serve`: a server for a run, a model folder or a model of the hub.

In: an artifact and `recipe.serve`. Out: a running server that has been checked against the run, or manifests for other machines.
No other stage imports it. Start with serving.py (what is served), then lifecycle.py (start to end), stage.py (as a stage of a run).
"""
