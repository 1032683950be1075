"""The serve stage and `qkit serve`: what is served, and the server's life: started, restarted when it dies, drained.

In: an artifact (of a run, a folder or a model of the hub) and `recipe.serve`. Out: a running server that has been checked against the run, or
manifests for other machines. No other stage imports it. Start with serving.py (what is served), then lifecycle.py (start, restart, drain) and
stage.py (as a stage of a run).
"""
